# SPDX-License-Identifier: Apache-2.0
"""Layout primitives on QTensors: codes and scales are moved, nothing is dequantized.

One rule per primitive of JAX, over its operands and parameters. A rule returns what the primitive
returns, or None where the result cannot be stored as codes and scales (a slice through a group, a
cast that would round twice): then the array is computed. What a rule returns dequantizes to
exactly the bits that the primitive makes of the dequantized operands.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from . import qdot
from .blocks import Levels, from_levels, levels_of, view
from .qtensor import QTensor, dequantized, is_qtensor, pack_along

Along = Callable[[jax.Array, int], jax.Array]  # does something along one axis of an array


@dataclasses.dataclass
class _Parts:
    """A QTensor taken apart, axes counted from the front; changed in place by the rules."""

    q: QTensor
    shape: tuple[int, ...]
    packed: jax.Array
    codes: jax.Array | None  # instead of `packed`, once they were unpacked
    scales: list[jax.Array]  # the scale and, if there is one, the zero point; axes as `view`
    levels: Levels
    axis: int
    g: jax.Array | None

    @property
    def labels(self) -> list:
        return view(self.levels, len(self.shape))

    def view(self) -> tuple[list, list[int]]:
        """What the axes of the scales are, and how many scales may lie along each."""
        blocks = from_levels(self.levels, len(self.shape))
        split = self.shape if blocks is None else blocks.split_shape(self.shape)
        inside = lambda x: isinstance(x, tuple) and x[0] == "inside"  # noqa: E731
        return self.labels, [1 if inside(x) else n for x, n in zip(self.labels, split)]

    def scale_size(self, a: int) -> int:
        """How many scales there are along axis `a`, through which no cut goes."""
        return self.scales[0].shape[self.labels.index(a)]

    def build(self) -> QTensor:
        ndim, fmt, scale = len(self.shape), self.q.format, self.scales[0]
        zero = self.scales[1] if len(self.scales) > 1 else None
        blocks = from_levels(self.levels, ndim)
        axis = self.axis - ndim if fmt.code_bits < 8 else -1
        if self.codes is not None:
            return QTensor.from_codes(
                self.codes, scale, zero,
                format=fmt, dtype=self.q.dtype, blocks=blocks, global_scale=self.g, axis=axis,
            )  # fmt: skip
        zero = None if zero is None else pack_along(zero, fmt, -1)
        unused = self.q.unused
        return QTensor(self.packed, scale, zero, fmt, self.q.dtype, unused, blocks, axis, self.g)

    def along(self, a: int, f: Along, size: int, on_blocks: Along | None = None) -> None:
        """Does `f` along axis `a`, which has `size` values then.

        `on_blocks` does the same to whole groups, if they lie along this axis.
        """
        if self.codes is None and a == self.axis and self.q.format.code_bits < 8:
            self.codes = dataclasses.replace(self.q, packed=self.packed).codes
        if self.codes is not None:
            self.codes = f(self.codes, a)
        else:
            self.packed = f(self.packed, a)
        k = self.cut_by(a)
        place = self.labels.index(a if k is None else ("blocks", k))
        g = f if k is None else on_blocks
        assert g is not None
        self.scales = [s if s.shape[place] == 1 else g(s, place) for s in self.scales]
        self.shape = (*self.shape[:a], size, *self.shape[a + 1 :])
        if self.g is not None and a < self.g.ndim:
            self.g = f(self.g, a)

    def cut_by(self, a: int) -> int | None:
        """The number of the cut that goes through axis `a`."""
        return next((k for k, (axes, _) in enumerate(self.levels) if a in axes), None)

    def group(self, a: int) -> int | None:
        """The size of the groups along axis `a`, if they lie along it alone."""
        k = self.cut_by(a)
        return self.levels[k][1] if k is not None and self.levels[k][0] == (a,) else None

    def relabel(self, new: dict[int, int], ndim: int) -> tuple[Levels, list[int]]:
        """The cuts after axes were renamed, and the order in which the axes of scales then come."""
        levels = [(tuple(new[a] for a in axes), size) for axes, size in self.levels]
        old = [new.get(x, x) if isinstance(x, int) else x for x in self.labels]
        return levels, [old.index(x) for x in view(levels, ndim) if x in old]


def _open(q: QTensor) -> _Parts | None:
    """A QTensor taken apart; None where its scales are laid out as no `Quantizer` does it."""
    ndim, zero, g = q.ndim, q.zero_point, q.global_scale
    levels = levels_of(q.blocks, ndim)
    if g is not None and g.size == 1:
        g = g.reshape(())
    rank = len(view(levels, ndim))
    scales = [q.scale] if zero is None else [q.scale, zero]
    scales = [s.reshape((1,) * (rank - s.ndim) + s.shape) for s in scales]
    p = _Parts(q, q.shape, q.packed, None, scales, levels, q.axis % ndim, g)
    for s in scales:
        for x, most, n in zip(*p.view(), s.shape, strict=True):
            if n != most and (n != 1 or isinstance(x, tuple)):
                return None
    return p if g is None or g.shape == q.shape[: g.ndim] else None


# ---------------------------------------------------------------------- one rule a primitive


def transpose(q: QTensor, permutation: Sequence[int]) -> QTensor | None:
    p = _open(q)
    fixed = 0 if q.global_scale is None else q.global_scale.ndim
    if p is None or tuple(permutation[:fixed]) != tuple(range(fixed)):
        return None
    new = {old: i for i, old in enumerate(permutation)}
    levels, order = p.relabel(new, q.ndim)
    p.packed = lax.transpose(p.packed, tuple(permutation))
    p.scales = [lax.transpose(s, order) for s in p.scales]
    p.shape = tuple(p.shape[i] for i in permutation)
    p.levels, p.axis = levels, new[p.axis]
    return p.build()


def _factor(old: Sequence[int], new: Sequence[int]) -> list[tuple[tuple[int, ...], tuple]]:
    """Smallest runs of axes of both shapes, in order, with as many values each."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        first = i, j
        a, i = (old[i], i + 1) if i < len(old) else (1, i)
        b, j = (new[j], j + 1) if j < len(new) else (1, j)
        while a != b:
            if a < b:
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        groups.append((tuple(range(first[0], i)), tuple(range(first[1], j))))
    return groups


def reshape(q: QTensor, sizes: Sequence[int]) -> QTensor | None:
    new = tuple(sizes)
    if q.shape == new:
        return q
    p = _open(q)
    if p is None or not new or 0 in q.shape:
        return None
    change = _Reshape(p, new)
    groups = _factor(q.shape, new)
    if not all(change.regroup(olds, news) for olds, news in groups):
        return None
    if p.g is not None and p.g.ndim:
        ends = {len(olds) and olds[-1] + 1: len(news) and news[-1] + 1 for olds, news in groups}
        if p.g.ndim not in ends:
            return None
        p.g = p.g.reshape(new[: ends[p.g.ndim]])
    p.levels = [(sum((change.moved[a] for a in axes), ()), n) for axes, n in p.levels]
    p.shape = new
    labels, split = p.view()
    kept = [change.kept[x] if isinstance(x, int) else n for x, n in zip(labels, split, strict=True)]
    p.scales = [s.reshape(kept) for s in p.scales]
    packed = list(new)
    if change.axis is None and q.format.code_bits < 8:
        p.codes, p.axis = q.codes.reshape(new), len(new) - 1
        return p.build()
    p.axis, old = len(new) - 1 if change.axis is None else change.axis, p.axis
    packed[p.axis] = packed[p.axis] if change.axis is None else p.packed.shape[old]
    p.packed = p.packed.reshape(packed)
    return p.build()


class _Reshape:
    """Where the axes of a QTensor go when it is reshaped.

    Attributes:
        moved: for each axis that a cut goes through, the axes that take its place in the cut.
        kept: sizes of the new axes in the scales.
        axis: the new packed axis, if the old one is still there.
    """

    def __init__(self, parts: _Parts, new: tuple[int, ...]):
        self.p, self.new = parts, new
        self.moved: dict[int, tuple[int, ...]] = {}
        self.kept = [1] * len(new)
        self.axis: int | None = None

    def regroup(self, olds: tuple[int, ...], news: tuple[int, ...]) -> bool:
        """Whether axes that become others, with as many values, keep groups whole."""
        p, new = self.p, self.new
        real, fresh = [a for a in olds if p.shape[a] > 1], [b for b in news if new[b] > 1]
        cut = [a for a in olds if p.cut_by(a) is not None]
        if [p.shape[a] for a in real] == [new[b] for b in fresh]:  # only axes of size 1 come or go
            pairs = zip(*((olds, news) if len(olds) == len(news) == 1 else (real, fresh)))
            for a, b in pairs:
                self.axis = b if a == p.axis else self.axis
                self.moved[a] = (b,)
                self.kept[b] = 1 if a in cut else p.scale_size(a)
            return all(a in self.moved for a in cut)
        if not cut:
            shared = {p.scale_size(a) == 1 for a in real}
            if shared == {False}:
                self.kept[news[0] : news[-1] + 1] = [new[b] for b in news]
            return len(shared) == 1
        k = p.cut_by(cut[0])
        assert k is not None
        axes, size = p.levels[k]
        inner = tuple(a for a in axes if a in olds)
        at, count = axes.index(inner[0]), len(inner)
        if len(cut) != count or inner != olds[-count:] or axes[at : at + count] != inner:
            return False
        front = [a for a in olds[:-count] if p.shape[a] > 1]
        first = 0
        if count == len(axes) and math.prod(p.shape[a] for a in axes) % size == 0:
            if any(p.scale_size(a) == 1 for a in front):
                return False
            while math.prod(new[b] for b in news[first + 1 :]) % size == 0:
                first += 1
        elif front:
            return False
        for b in news[:first]:
            self.kept[b] = new[b]
        self.moved |= dict.fromkeys(inner, ()) | {inner[0]: news[first:]}
        return True


def _slice(q: QTensor, start: Sequence[int], limit: Sequence[int], strides: Any) -> QTensor | None:
    p = _open(q)
    if p is None:
        return None
    for a, (n, i, j, k) in enumerate(zip(q.shape, start, limit, strides or [1] * q.ndim)):
        size = p.group(a)
        if (i, j, k) == (0, n, 1):
            continue
        if p.cut_by(a) is None:
            p.along(a, _part(i, j, k), len(range(i, j, k)))
        elif size and k == 1 and i % size == 0 and (j % size == 0 or j == n) and j > i:
            p.along(a, _part(i, j), j - i, _part(i // size, -(-j // size)))
        else:
            return None
    return p.build()


def _part(start: int, limit: int, stride: int = 1) -> Along:
    return lambda x, axis: lax.slice_in_dim(x, start, limit, stride, axis)


def _dynamic_slice(q: QTensor, *starts: Any, slice_sizes: Sequence[int]) -> QTensor | None:
    p = _open(q)
    if p is None:
        return None
    for a, (n, start, size) in enumerate(zip(q.shape, starts, slice_sizes, strict=True)):
        if size == n:
            continue
        if p.cut_by(a) is not None:
            return None
        p.along(a, lambda x, c, i=start, m=size: lax.dynamic_slice_in_dim(x, i, m, c), size)
    return p.build()


def _block(q: QTensor, axis: int, i: Any, size: int) -> QTensor | None:
    """Block `i` of `size` along an axis, in whole bytes where that is the packed one; or None."""
    p, (codes, taken) = _open(q), q.format.unit
    if p is None or p.cut_by(axis) is not None:
        return None
    start = lambda n: lambda x, c: lax.dynamic_slice_in_dim(x, i * n, n, c)  # noqa: E731
    if axis != p.axis or q.format.code_bits >= 8:
        p.along(axis, start(size), size)
        return p.build()
    if size % codes:
        return None
    packed = start(size // codes * taken)(p.packed, axis)
    p.codes = p.packed  # stands for them: only the scales are cut here
    p.along(axis, start(size), size)
    p.codes, p.packed = None, packed
    return dataclasses.replace(p.build(), unused=0)


def _rev(q: QTensor, dimensions: Sequence[int]) -> QTensor | None:
    p = _open(q)
    if p is None:
        return None
    for a in dimensions:
        size = p.group(a)
        if p.cut_by(a) is not None and (size is None or q.shape[a] % size):
            return None
        flip = lambda x, c: lax.rev(x, (c,))  # noqa: E731
        p.along(a, flip, q.shape[a], flip)
    return p.build()


def _gather(q: QTensor, indices: Any, **params: Any) -> QTensor | None:
    """Rows by number, `table[ids]` and `jnp.take`: one axis is indexed, the others are whole."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    p = _open(q)
    if p is None or not _is_nan(params["fill_value"]) or len(numbers.start_index_map) != 1:
        return None
    (a,) = numbers.start_index_map
    batch = indices.shape[:-1]
    out_ndim = q.ndim - 1 + len(batch)
    places = [i for i in range(out_ndim) if i not in numbers.offset_dims]
    whole = all(n == m for i, (n, m) in enumerate(zip(sizes, q.shape, strict=True)) if i != a)
    if (
        not whole or sizes[a] != 1 or numbers.collapsed_slice_dims != (a,)
        or numbers.operand_batching_dims or places != list(range(a, a + len(batch)))
        or p.cut_by(a) is not None or out_ndim == 0
    ):  # fmt: skip
        return None
    fill = params["mode"] == lax.GatherScatterMode.FILL_OR_DROP

    def rows(x: jax.Array, axis: int, fill_value: Any = None) -> jax.Array:
        offsets = [i for i in range(x.ndim - 1 + len(batch)) if not axis <= i < axis + len(batch)]
        return lax.gather(
            x, indices,
            lax.GatherDimensionNumbers(tuple(offsets), (axis,), (axis,)),
            tuple(1 if i == axis else n for i, n in enumerate(x.shape)),
            mode=params["mode"], indices_are_sorted=params["indices_are_sorted"],
            unique_indices=params["unique_indices"], fill_value=fill_value,
        )  # fmt: skip

    place = p.labels.index(a)
    nan = 255 if q.scale.dtype == jnp.uint8 else None  # E8M0 and floats have a NaN
    for k, (s, out_of_bounds) in enumerate(zip(list(p.scales), (nan, 0), strict=False)):
        before, after = s.shape[:place], s.shape[place + 1 :]
        if fill:  # what is out of bounds is NaN, which scales can say
            s = jnp.broadcast_to(s, (*before, q.shape[a], *after))
        if fill or s.shape[place] == q.shape[a]:
            p.scales[k] = rows(s, place, out_of_bounds)
        else:
            p.scales[k] = s.reshape(*before, *[1] * len(batch), *after)
    new = {i: i if i < a else i + len(batch) - 1 for i in range(q.ndim) if i != a}
    p.levels = [(tuple(new[i] for i in axes), n) for axes, n in p.levels]
    p.shape = (*p.shape[:a], *batch, *p.shape[a + 1 :])
    if a == p.axis and q.format.code_bits < 8:
        p.codes, p.axis = rows(q.codes, a, 0), len(p.shape) - 1
    else:
        p.packed, p.axis = rows(p.packed, a, 0), new.get(p.axis, len(p.shape) - 1)
    if p.g is not None and a < p.g.ndim:
        p.g = rows(p.g, a)
    return p.build()


def _is_nan(fill_value: Any) -> bool:
    return fill_value is None or bool(np.isnan(fill_value))


def _concatenate(*operands: Any, dimension: int) -> QTensor | None:
    if not all(map(is_qtensor, operands)):
        return None
    opened = [p for p in map(_open, operands) if p is not None]
    kinds = {(q.format, q.dtype, q.blocks, q.axis, q.zero_point is None) for q in operands}
    if len(opened) < len(operands) or len(kinds) > 1:
        return None
    p, a = opened[0], dimension
    global_scales = [o.g for o in opened if o.g is not None]
    if global_scales and (
        len(global_scales) < len(opened) or any(g.ndim <= a for g in global_scales)
    ):
        return None
    size, place = p.group(a), p.labels.index(a) if p.cut_by(a) is None else None
    if place is None:
        if size is None or any(q.shape[a] % size for q in operands[:-1]):
            return None
        place = p.labels.index(("blocks", p.cut_by(a)))
    shapes = [list(o.scales[0].shape) for o in opened]
    if size is None:
        for shape, q in zip(shapes, operands, strict=True):
            shape[place] = q.shape[a]
    for i in (i for i in range(len(shapes[0])) if i != place):
        widest = max(shape[i] for shape in shapes)
        for shape in shapes:
            shape[i] = widest
    if any(math.prod(s) >= max(q.size, 2) for s, q in zip(shapes, operands, strict=True)):
        return None  # as many scales as values: no longer compressed
    p.scales = [
        lax.concatenate([jnp.broadcast_to(s, n) for s, n in zip(kind, shapes, strict=True)], place)
        for kind in zip(*(o.scales for o in opened), strict=True)
    ]
    if a == p.axis and p.q.format.code_bits < 8:
        p.codes = lax.concatenate([q.codes for q in operands], a)
    else:
        p.packed = lax.concatenate([q.packed for q in operands], a)
    p.shape = (*p.shape[:a], sum(q.shape[a] for q in operands), *p.shape[a + 1 :])
    if global_scales:
        p.g = lax.concatenate(global_scales, a)
    return p.build()


def _cast(q: QTensor, new_dtype: Any) -> QTensor | None:
    """From float32, in which values are computed, so that they are still rounded once."""
    if q.dtype not in (jnp.float32, new_dtype) or not jnp.issubdtype(new_dtype, jnp.floating):
        return None
    return dataclasses.replace(q, dtype=jnp.dtype(new_dtype))


def _broadcast(q: QTensor, shape: Sequence[int], broadcast_dimensions: Sequence[int]) -> Any:
    """Only new axes of size 1."""
    if math.prod(shape) != q.size or list(broadcast_dimensions) != sorted(broadcast_dimensions):
        return None
    return reshape(q, shape)


def _split(q: QTensor, sizes: Sequence[int], axis: int) -> list[QTensor] | None:
    ends = np.cumsum([0, *sizes]).tolist()
    start, limit = [0] * q.ndim, list(q.shape)
    out = []
    for i, j in zip(ends[:-1], ends[1:], strict=True):
        start[axis], limit[axis] = i, j
        out.append(_slice(q, start, limit, None))
    return None if any(x is None for x in out) else out


_RULES: dict[str, Callable] = {
    "transpose": lambda q, permutation: transpose(q, permutation),
    "reshape": lambda q, new_sizes, **_: reshape(q, new_sizes),
    "squeeze": lambda q, dimensions: reshape(
        q, [n for i, n in enumerate(q.shape) if i not in {d % q.ndim for d in dimensions}]
    ),
    "broadcast_in_dim": lambda q, *rest, shape, broadcast_dimensions, **_: _broadcast(
        q, shape, broadcast_dimensions
    ),
    "slice": lambda q, start_indices, limit_indices, strides: _slice(
        q, start_indices, limit_indices, strides
    ),
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "concatenate": _concatenate,
    "convert_element_type": lambda q, new_dtype, **_: _cast(q, new_dtype),
    "rev": _rev,
    "split": _split,
    "sharding_constraint": lambda q, sharding, **_: constrain(q, sharding),
    "name": lambda q, **_: q,
}
# Primitives that do the same to every array: to the parts of a QTensor too.
_EACH = frozenset("copy copy_p optimization_barrier pvary pcast".split())


def bind(
    eqn: Any, values: Sequence, run: Callable[[list], list], params: dict | None = None
) -> list:
    """The results of an equation some of whose operands may be QTensors.

    Args:
        eqn: the equation.
        values: its operands.
        run: runs it on arrays.
        params: its parameters, if they are not those of the equation.
    """
    if not any(map(is_qtensor, values)):
        return run(list(values))
    name = eqn.primitive.name
    given: dict[str, Any] = eqn.params if params is None else params
    if name in _EACH:
        flat, tree = jax.tree.flatten(list(values))
        if name == "optimization_barrier":
            return jax.tree.unflatten(tree, lax.optimization_barrier(flat))
        return jax.tree.unflatten(tree, [run([x])[0] for x in flat])
    out = None
    if name in _RULES and is_qtensor(values[0]):
        out = _RULES[name](*values, **given)
    elif name == "dot_general":
        out = qdot.dot_general(*values, run=run, part=_block, **given)
    if out is None:
        return run([dequantized(v) for v in values])
    return out if isinstance(out, list) else [out]


# ---------------------------------------------------------------------- for control flow


def stacked(q: QTensor) -> QTensor | None:
    """The QTensor with the leading axis in all of its arrays, so that a scan can slice them."""
    p = _open(q)
    if p is None or q.ndim < 2 or p.axis == 0 or p.cut_by(0) is not None:
        return None
    n = q.shape[0]
    p.scales = [jnp.broadcast_to(s, (n, *s.shape[1:])) for s in p.scales]
    if p.g is not None and p.g.ndim == 0:
        p.g = jnp.broadcast_to(p.g, (n,))
    return p.build()


def constrain(q: QTensor, sharding: Any) -> QTensor | None:
    """The QTensor with its arrays on the devices that a sharding of the array says; or None."""
    if not isinstance(sharding, NamedSharding):
        return None
    specs = partition(q, sharding.spec, dict(sharding.mesh.shape))
    if specs is None:
        return None
    put = lambda x, s: lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, s))  # noqa: E731
    return jax.tree.map(put, q, specs)


def packed_along_last(q: QTensor) -> QTensor:
    """The same, packed along its last axis."""
    return q if q.axis == -1 else QTensor.from_codes(
        q.codes, q.scale, q.zero_point,
        format=q.format, dtype=q.dtype, blocks=q.blocks, global_scale=q.global_scale,
    )  # fmt: skip


def partition(q: QTensor, spec: PartitionSpec, sizes: dict[str, int]) -> QTensor | None:
    """How the arrays of a QTensor are split when it is split by `spec`; a QTensor of specs.

    Args:
        q: arrays or `jax.ShapeDtypeStruct`s.
        spec: for the axes of the array.
        sizes: of the mesh axes.
    """
    ndim = q.ndim
    entries: list[Any] = [*spec, *[None] * (ndim - len(spec))]

    def parts(entry: Any) -> int:
        names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        return math.prod(sizes.get(n, 1) for n in names if isinstance(n, str))

    levels, axis = levels_of(q.blocks, ndim), q.axis % ndim
    n, (codes, _) = parts(entries[axis]), q.format.unit
    if n > 1 and q.shape[axis] % (n * codes):
        return None
    labels = view(levels, ndim)
    rank = len(q.scale.shape)
    if rank > len(labels):
        return None
    scale: list[Any] = []
    for x, size in zip(labels[len(labels) - rank :], q.scale.shape, strict=True):
        if isinstance(x, int):
            scale.append(entries[x] if size > 1 else None)
            continue
        axes, group = levels[x[1]]
        split = [entries[a] for a in axes if parts(entries[a]) > 1]
        if x[0] == "inside" or not split:
            scale.append(None)
        elif len(axes) != 1 or q.shape[axes[0]] % (group * parts(split[0])):
            return None
        else:
            scale.append(split[0])
    zero = q.packed_zero_point
    if zero is not None and scale and parts(scale[-1]) > 1:
        if q.scale.shape[-1] // parts(scale[-1]) % codes:
            return None
    g = q.global_scale
    return QTensor(
        PartitionSpec(*entries), PartitionSpec(*scale),  # type: ignore[arg-type]
        None if zero is None else PartitionSpec(*scale),  # type: ignore[arg-type]
        q.format, q.dtype, q.unused, q.blocks, q.axis,
        None if g is None else PartitionSpec(*entries[: len(g.shape)]),  # type: ignore[arg-type]
    )  # fmt: skip
