# SPDX-License-Identifier: Apache-2.0
"""Parts of QTensors, rows of them, and several joined into one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .qparts import Along, open_parts
from .qtensor import QTensor, is_qtensor


def slice(q: QTensor, start: Sequence[int], limit: Sequence[int], strides: Any) -> QTensor | None:
    p = open_parts(q)
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


def dynamic_slice(q: QTensor, *starts: Any, slice_sizes: Sequence[int]) -> QTensor | None:
    p = open_parts(q)
    if p is None:
        return None
    for a, (n, start, size) in enumerate(zip(q.shape, starts, slice_sizes, strict=True)):
        if size == n:
            continue
        if p.cut_by(a) is not None:
            return None
        p.along(a, lambda x, c, i=start, m=size: lax.dynamic_slice_in_dim(x, i, m, c), size)
    return p.build()


def block(q: QTensor, axis: int, i: Any, size: int) -> QTensor | None:
    """Block `i` of `size` along an axis, in whole bytes where that is the packed one; or None."""
    p, (codes, taken) = open_parts(q), q.format.unit
    if p is None or p.cut_by(axis) is not None:
        return None
    start = lambda n: lambda x, c: lax.dynamic_slice_in_dim(x, i * n, n, c)  # noqa: E731
    if axis != p.axis or q.format.code_bits >= 8:
        p.along(axis, start(size), size)
        return p.build()
    if size % codes:
        return None
    p.packed = start(size // codes * taken)(p.packed, axis)
    p.scales_along(axis, start(size), size)
    return dataclasses.replace(p.build(), unused=0)


def rev(q: QTensor, dimensions: Sequence[int]) -> QTensor | None:
    p = open_parts(q)
    if p is None:
        return None
    for a in dimensions:
        size = p.group(a)
        if p.cut_by(a) is not None and (size is None or q.shape[a] % size):
            return None
        flip = lambda x, c: lax.rev(x, (c,))  # noqa: E731
        p.along(a, flip, q.shape[a], flip)
    return p.build()


def gather(q: QTensor, indices: Any, **params: Any) -> QTensor | None:
    """Rows by number, `table[ids]` and `jnp.take`: one axis is indexed, the others are whole."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    p = open_parts(q)
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


def concatenate(*operands: Any, dimension: int) -> QTensor | None:
    if not all(map(is_qtensor, operands)):
        return None
    opened = [p for p in map(open_parts, operands) if p is not None]
    axis = lambda q: q.axis if q.format.code_bits < 8 else None  # noqa: E731
    kinds = {(q.format, q.dtype, q.blocks, axis(q), q.zero_point is None) for q in operands}
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


def split(q: QTensor, sizes: Sequence[int], axis: int) -> list[QTensor] | None:
    ends = np.cumsum([0, *sizes]).tolist()
    start, limit = [0] * q.ndim, list(q.shape)
    out = []
    for i, j in zip(ends[:-1], ends[1:], strict=True):
        start[axis], limit[axis] = i, j
        out.append(slice(q, start, limit, None))
    return None if any(x is None for x in out) else out
