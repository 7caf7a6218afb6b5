# SPDX-License-Identifier: Apache-2.0
"""Primitives that cut, merge and join axes, and those that call jaxprs: their rules on terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .. import _compat
from ..analyze import CALLS
from .terms import ONE, Dims, Prod, Term, cat, cut, factor, fresh, pin, pinned, prod, unify

if TYPE_CHECKING:
    from .graph import Node, Walk

# ------------------------------------------------------------------ cutting and joining


def _reshape(walk: Walk, n: Node, i: int, eqn: Any, ins: list[Dims]) -> list[Dims]:
    shape, out, todo, k = eqn.outvars[0].aval.shape, [], list(ins[0]), 0
    while k < len(shape):  # the smallest runs of dimensions with equal products
        took: list[Term] = []
        sizes = [shape[k]]
        k += 1
        while (m := math.prod(t.size for t in took)) != (s := math.prod(sizes)):
            if m <= s:  # decided for symbolic sizes too, as m < s is not
                took.append(todo.pop(0))
            else:
                sizes.append(shape[k])
                k += 1
        out += factor(prod(took), sizes)
    return [tuple(out)]


def _concatenate(walk: Walk, n: Node, i: int, eqn: Any, ins: list[Dims]) -> list[Dims]:
    d = eqn.params["dimension"]
    for x in ins[1:]:
        for k, (a, b) in enumerate(zip(ins[0], x)):
            if k != d:
                unify(a, b)
    return [(*ins[0][:d], cat([x[d] for x in ins]), *ins[0][d + 1 :])]


def _slice(walk: Walk, n: Node, i: int, eqn: Any, ins: list[Dims]) -> list[Dims]:
    p, out = eqn.params, []
    strides = p["strides"] or [1] * len(ins[0])
    for t, a, step, s in zip(ins[0], p["start_indices"], strides, eqn.outvars[0].aval.shape):
        if step == 1:
            sizes = [a, s, t.size - a - s]
            out.append(cut(t, [k for k in sizes if k])[1 if a else 0])
        elif t.size % step == 0 and a < step and s == t.size // step:  # x[a::step]
            axis, between = factor(t, [s, step])
            pin(between, "interleaving")
            out.append(axis)
        else:
            pin(t, "a strided slice")
            out.append(fresh(s, "a strided slice"))
    return [tuple(out)]


def _split(walk: Walk, n: Node, i: int, eqn: Any, ins: list[Dims]) -> list[Dims]:
    d, dims = eqn.params["axis"], ins[0]
    parts = cut(dims[d], [int(s) for s in eqn.params["sizes"]])
    return [(*dims[:d], t, *dims[d + 1 :]) for t in parts]


def _stack(walk: Walk, n: Node, i: int, eqn: Any, ins: list[Dims]) -> list[Dims]:
    from .graph import equate

    equate(ins[1:], ins[:1] * (len(ins) - 1))
    d = eqn.params["axis"] % (len(ins[0]) + 1)
    return [(*ins[0][:d], cat([ONE] * len(ins)), *ins[0][d:])]


def _unstack(walk: Walk, n: Node, i: int, eqn: Any, ins: list[Dims]) -> list[Dims]:
    d, dims = eqn.params["axis"] % len(ins[0]), ins[0]
    cut(dims[d], [1] * dims[d].size)
    return [(*dims[:d], *dims[d + 1 :])] * len(eqn.outvars)


def _pad(walk: Walk, n: Node, i: int, eqn: Any, ins: list[Dims]) -> list[Dims]:
    out: list[Term] = []
    sizes = zip(ins[0], eqn.params["padding_config"], eqn.outvars[0].aval.shape)
    for t, (low, high, inner), size in sizes:
        if min(low, high) >= 0 and not inner:
            out.append(cat([x for x in (fresh(low), t, fresh(high)) if x.size]))
        else:
            pin(t, "padding")
            out.append(fresh(size, "padding"))
    return [tuple(out)]


def conv_view(eqn: Any, ins: Sequence[Dims]) -> tuple[list[Term], list[Term], list, list, list]:
    """A convolution as einsum: (n, group, in, window), (group, out, in, window).

    Returns the terms of both operands and the labels of both and of the result.
    """
    dn, groups, (x, w) = eqn.params["dimension_numbers"], eqn.params["feature_group_count"], ins
    channels, outs = x[dn.lhs_spec[1]], w[dn.rhs_spec[0]]
    left = [x[dn.lhs_spec[0]], *factor(channels, [groups, channels.size // groups])]
    right = factor(outs, [groups, outs.size // groups])
    far = range(len(x) - 2)
    return (
        [*left, *(x[d] for d in dn.lhs_spec[2:])],
        [*right, *(w[d] for d in dn.rhs_spec[1:])],
        ["n", "g", "i", *(("l", d) for d in far)],
        ["g", "o", "i", *(("r", d) for d in far)],
        ["n", "g", "o", *(("y", d) for d in far)],
    )


def _conv(walk: Walk, n: Node, i: int, eqn: Any, ins: list[Dims]) -> list[Dims]:
    if eqn.params["batch_group_count"] != 1:
        return walk.unknown(eqn, ins, "batch_group_count")
    dn, shape, why = eqn.params["dimension_numbers"], eqn.outvars[0].aval.shape, "a window"
    left, right, *_ = conv_view(eqn, ins)
    unify(left[1], right[0])
    unify(left[2], right[2])
    for t in (*left[3:], *right[3:]):
        pin(t, why)
    far = pinned([shape[d] for d in dn.out_spec[2:]], why)
    out = dict(zip(dn.out_spec, [left[0], ins[1][dn.rhs_spec[0]], *far]))
    return [tuple(out[d] for d in range(len(shape)))]


# ------------------------------------------------------------------ calls and control flow


def _call(walk: Walk, n: Node, i: int, eqn: Any, ins: list[Dims]) -> list[Dims]:
    jaxpr = eqn.params[CALLS[eqn.primitive.name]]
    values = [n.known(v) for v in eqn.invars]
    return walk.enter(n, i, jaxpr, ins, values, indices=n.indices.of(eqn.invars))


def _scan(walk: Walk, n: Node, i: int, eqn: Any, ins: list[Dims]) -> list[Dims]:
    from .graph import equate

    p = eqn.params
    consts, carry, xs = _compat.split_scan(p, ins)
    layer = fresh(p["length"])
    for x in xs:
        unify(layer, x[0])
    values = [n.known(v) for v in eqn.invars[: len(consts)]]
    inner = [*consts, *carry, *(x[1:] for x in xs)]
    outs = walk.enter(n, i, p["jaxpr"], inner, values, layers=(layer,))
    equate(carry, outs[: len(carry)])
    return [*carry, *((layer, *o) for o in outs[len(carry) :])]


def _while(walk: Walk, n: Node, i: int, eqn: Any, ins: list[Dims]) -> list[Dims]:
    from .graph import equate

    p = eqn.params
    a = p["cond_nconsts"]
    b = a + p["body_nconsts"]
    walk.enter(n, i, p["cond_jaxpr"], [*ins[:a], *ins[b:]])
    equate(ins[b:], walk.enter(n, i, p["body_jaxpr"], ins[a:]))
    return ins[b:]


def _cond(walk: Walk, n: Node, i: int, eqn: Any, ins: list[Dims]) -> list[Dims]:
    from .graph import equate

    values = [n.known(v) for v in eqn.invars[1:]]
    outs = [walk.enter(n, i, b, ins[1:], values) for b in eqn.params["branches"]]
    for o in outs[1:]:
        equate(outs[0], o)
    return outs[0]


def _shard_map(walk: Walk, n: Node, i: int, eqn: Any, ins: list[Dims]) -> list[Dims]:
    """The shards of a dimension are its leading factor; no shard is like another."""
    p, sizes = eqn.params, dict(eqn.params["mesh"].shape)
    mesh = {name: fresh(size, "shards") for name, size in sizes.items()}
    local = []
    for dims, spec in zip(ins, p["in_specs"], strict=True):
        parts = list(dims)
        for d, names in _split_dims(spec):
            counts = [sizes[name] for name in names]
            *shards, parts[d] = factor(dims[d], [*counts, dims[d].size // math.prod(counts)])
            for name, t in zip(names, shards):
                unify(mesh[name], t)
        local.append(tuple(parts))
    outs = []
    for dims, spec in zip(walk.enter(n, i, p["jaxpr"], local, mesh=mesh), p["out_specs"]):
        parts = list(dims)
        for d, names in _split_dims(spec):
            parts[d] = Prod((*(mesh[name] for name in names), dims[d]))
        outs.append(tuple(parts))
    return outs


def _split_dims(spec: Any) -> list[tuple[int, tuple[str, ...]]]:
    """(dimension, mesh axes that split it) of a partition spec."""
    named = ((d, x if isinstance(x, tuple) else (x,)) for d, x in enumerate(spec))
    return [(d, names) for d, names in named if names not in ((None,), ())]


RULES: dict[str, Callable[..., list[Dims]]] = {
    **dict.fromkeys(CALLS, _call),
    "shard_map": _shard_map,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "reshape": _reshape,
    "concatenate": _concatenate,
    "slice": _slice,
    "split": _split,
    "stack": _stack,
    "unstack": _unstack,
    "pad": _pad,
    "conv_general_dilated": _conv,
}
