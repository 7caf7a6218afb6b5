# SPDX-License-Identifier: Apache-2.0
"""The function with smaller arrays: its equations again, every array without what was removed.

Every array of the small function is the original one restricted to the kept indices. So constants
and `iota` are restricted, and only the primitives that have shapes among their parameters need a
rule; all others are bound as they are. Indices stay what they were (a removed class 2 does not make
class 3 a 2): where an array is indexed along an axis that lost some, they are looked up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from ..._errors import SiteError
from .. import _compat
from .flow import conv_view
from .graph import Graph, Node
from .groups import layer_axes
from .kept import Kept
from .means import Mean, norm_means
from .terms import Dims, Leaf


class Emit:
    """Runs the equations of a graph on smaller arrays.

    Args:
      graph: of the function.
      indices: by leaf the indices that stay.
      means: whether the means of norms are those of the channels that stay; otherwise every mean
        keeps its divisor, so that a removed channel counts as one of zeros.
    """

    def __init__(self, graph: Graph, indices: Mapping[Leaf, np.ndarray], means: bool = True):
        self.kept = Kept(indices, layer_axes(graph))
        self.means: Mapping[tuple[int, int], Mean] = norm_means(graph) if means else {}
        self._changed: dict[int, bool] = {}

    def run(self, n: Node, args: Sequence) -> list:
        """The results of a node whose inputs are restricted."""
        env: dict[Any, Any] = dict(zip(n.jaxpr.invars, args, strict=True))
        for v, c in zip(n.jaxpr.constvars, n.consts):
            env[v] = self.kept.restrict(c, n.dims[v])

        def read(v: Any) -> Any:
            return v.val if isinstance(v, Literal) else env[v]

        for i, eqn in enumerate(n.jaxpr.eqns):
            values = [read(v) for v in eqn.invars]
            with _compat.equation_scope(eqn):
                if (mean := self.means.get((id(n), i))) is not None:
                    values[mean.operand] = self._divisor(eqn, mean, values[mean.operand])
                rule = RULES.get(eqn.primitive.name) if self.hit(n, i) else None
                outs = rule(self, n, i, eqn, values) if rule else _compat.bind(eqn, values)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in n.jaxpr.outvars]

    def hit(self, n: Node, i: int) -> bool:
        """Whether an equation, or anything that it calls, sees a smaller array."""
        eqn = n.jaxpr.eqns[i]
        if any(self.changed(sub) for sub in n.subs.get(i, ())):
            return True
        return any(self.kept.changes(n.of(v)) for v in (*eqn.invars, *eqn.outvars))

    def changed(self, n: Node) -> bool:
        """Whether anything in a node gets smaller."""
        if id(n) not in self._changed:
            self._changed[id(n)] = any(map(self.kept.changes, set(n.dims.values()))) or any(
                map(self.kept.touches, n.layers)
            )
        return self._changed[id(n)]

    def _divisor(self, eqn: Any, mean: Mean, value: Any) -> Any:
        now = math.prod(map(self.kept.size, mean.terms)) - mean.less
        ratio = now / (mean.count - mean.less)
        if ratio == 1:
            return value
        ratio = ratio if eqn.primitive.name == "div" else 1 / ratio
        return value * np.asarray(ratio, eqn.invars[mean.operand].aval.dtype)


Resize = Callable[[Kept, list[Dims], list[Dims], Any, Any], Any]


def _resized(**rules: Resize) -> Callable:
    """The same primitive with parameters `f(kept, operands, results, old value, equation)`."""

    def rule(emit: Emit, n: Node, i: int, eqn: Any, values: list) -> list:
        ins, outs = [n.of(v) for v in eqn.invars], [n.of(v) for v in eqn.outvars]
        new = {k: f(emit.kept, ins, outs, eqn.params[k], eqn) for k, f in rules.items()}
        out = eqn.primitive.bind(*values, **{**eqn.params, **new})
        return list(out) if eqn.primitive.multiple_results else [out]

    return rule


def _shape(kept: Kept, ins: list[Dims], outs: list[Dims], old: Any, eqn: Any) -> tuple[int, ...]:
    return kept.shape(outs[0])


def _bound(end: bool) -> Resize:
    def bound(kept: Kept, ins: list[Dims], outs: list[Dims], old: Any, eqn: Any) -> tuple:
        strides = eqn.params["strides"] or [1] * len(old)
        return tuple(
            a if not kept.touches(t)
            else int(np.searchsorted(kept.positions(t), a)) if step == 1
            else kept.size(t) if end
            else a
            for t, a, step in zip(ins[0], old, strides)
        )  # fmt: skip

    return bound


def _parts(kept: Kept, ins: list[Dims], outs: list[Dims], old: Any, eqn: Any) -> tuple[int, ...]:
    return tuple(kept.size(dims[eqn.params["axis"]]) for dims in outs)


def _padding(kept: Kept, ins: list[Dims], outs: list[Dims], old: Any, eqn: Any) -> tuple:
    config = []
    for t, o, (low, high, inner) in zip(ins[0], outs[0], old):
        if kept.touches(o):
            places = kept.positions(o)
            low, high = (places < low).sum(), (places >= low + t.size).sum()
        config.append((int(low), int(high), inner))
    return tuple(config)


def _window(kept: Kept, ins: list[Dims], outs: list[Dims], old: Any, eqn: Any) -> tuple[int, ...]:
    return tuple(kept.size(t) if n == t.size else n for n, t in zip(old, ins[0]))


def _groups(kept: Kept, ins: list[Dims], outs: list[Dims], old: Any, eqn: Any) -> int:
    return kept.size(conv_view(eqn, ins)[0][1])


def _random_shape(kept: Kept, ins: list[Dims], outs: list[Dims], old: Any, eqn: Any) -> tuple:
    return kept.shape(outs[0][len(ins[0]) :])


def _iota(emit: Emit, n: Node, i: int, eqn: Any, values: list) -> list:
    dims, d = n.of(eqn.outvars[0]), eqn.params["dimension"]
    places = jnp.asarray(emit.kept.positions(dims[d]), eqn.params["dtype"])
    return [lax.broadcast_in_dim(places, emit.kept.shape(dims), (d,))]


def _arg(emit: Emit, n: Node, i: int, eqn: Any, values: list) -> list:
    """Indices of the original."""
    (out,), (axis,) = _compat.bind(eqn, values), eqn.params["axes"]
    return [_original(emit, n.of(eqn.invars[0])[axis], out)]


def _original(emit: Emit, t: Any, index: jax.Array) -> jax.Array:
    if not emit.kept.touches(t):
        return index
    return jnp.asarray(emit.kept.positions(t), index.dtype)[index]


def _top_k(emit: Emit, n: Node, i: int, eqn: Any, values: list) -> list:
    t = n.of(eqn.invars[0])[eqn.params.get("axis", -1)]
    if emit.kept.size(t) < eqn.params["k"]:
        raise SiteError(
            f"top_k at {_compat.source_line(eqn)} takes {eqn.params['k']} of an axis of which "
            f"{emit.kept.size(t)} of {t.size} are kept. Keep at least as many."
        )
    found, index = _compat.bind(eqn, values)
    return [found, _original(emit, t, index)]


def _indexed(emit: Emit, n: Node, i: int, eqn: Any, values: list) -> list:
    """Gather and scatter: an index along an axis that lost some is looked up."""
    dn, dims = eqn.params["dimension_numbers"], n.of(eqn.invars[0])
    scatters = eqn.primitive.name.startswith("scatter")
    where = dn.scatter_dims_to_operand_dims if scatters else dn.start_index_map
    index = values[1]
    for k, d in enumerate(where):
        if emit.kept.touches(dims[d]) and _one(eqn, d, scatters):
            number = jnp.asarray(emit.kept.numbers(dims[d]), index.dtype)
            column = lax.slice_in_dim(index, k, k + 1, axis=index.ndim - 1)
            index = lax.dynamic_update_slice_in_dim(index, number[column], k, index.ndim - 1)
    values = [values[0], index, *values[2:]]
    if scatters:
        return _compat.bind(eqn, values)
    sizes = [
        1 if n == 1 else emit.kept.size(t) if n == t.size else n
        for n, t in zip(eqn.params["slice_sizes"], dims)
    ]
    return [eqn.primitive.bind(*values, **{**eqn.params, "slice_sizes": tuple(sizes)})]


def _one(eqn: Any, d: int, scatters: bool) -> bool:
    dn = eqn.params["dimension_numbers"]
    return d in (dn.inserted_window_dims if scatters else dn.collapsed_slice_dims)


def emitted(
    graph: Graph, indices: Mapping[Leaf, np.ndarray], arrays: Sequence, means: bool = True
) -> Any:
    """What the function returns on restricted parameters.

    Args:
      graph: of the function with parameters of their original shapes.
      indices: by leaf the indices that stay.
      arrays: of the call, parameters restricted.
      means: see `Emit`.
    """
    outs = Emit(graph, indices, means).run(graph.node, arrays)
    return graph.traced.staged.rebuild(outs)


def restricted(graph: Graph, indices: Mapping[Leaf, np.ndarray], arrays: Sequence) -> list:
    """The parameters, by number, without the indices that are not kept."""
    kept = Kept(indices, layer_axes(graph))
    return [kept.restrict(x, dims) for x, dims in zip(arrays, graph.dims, strict=True)]


def _rules() -> dict[str, Callable]:
    from . import emit_calls  # the two modules call each other
    from .rules import SCATTER

    return {
        "broadcast_in_dim": _resized(shape=_shape),
        "reshape": _resized(new_sizes=_shape),
        "slice": _resized(start_indices=_bound(False), limit_indices=_bound(True)),
        "split": _resized(sizes=_parts),
        "pad": _resized(padding_config=_padding),
        "dynamic_slice": _resized(slice_sizes=_window),
        "conv_general_dilated": _resized(feature_group_count=_groups),
        "random_bits": _resized(shape=_random_shape),
        "iota": _iota,
        "argmax": _arg,
        "argmin": _arg,
        "top_k": _top_k,
        "gather": _indexed,
        **dict.fromkeys(SCATTER, _indexed),
        **emit_calls.RULES,
    }


RULES: dict[str, Callable] = _rules()
