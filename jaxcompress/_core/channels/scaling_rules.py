# SPDX-License-Identifier: Apache-2.0
"""What each primitive says of the exponents of its operands and results.

Primitives are linear in exponents: a product adds them, a sum needs equal ones, ReLU passes them,
tanh forces 0, a contracted slot must cancel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from .equations import Equations, Exponents, Space, where
from .flow import conv_view
from .graph import Node
from .rules import rule
from .terms import ONE, Dims


def apply(eqs: Equations, n: Node, eqn: Any, Es: list[Exponents], space: Space) -> list[Exponents]:
    """Exponents of the results of an equation that calls nothing."""
    outs = _rule(eqs, n, eqn, Es, space)
    if outs is not None:
        return outs
    why = where(eqn)
    eqs.stop(Es, why)
    return [eqs.stopped(n.of(v), space, why) for v in eqn.outvars]


def _rule(
    eqs: Equations, n: Node, eqn: Any, Es: list[Exponents], space: Space
) -> list[Exponents] | None:
    """As `apply`; None if all operands must have exponent 0."""
    name = eqn.primitive.name
    ins, outs = [n.of(v) for v in eqn.invars], [n.of(v) for v in eqn.outvars]
    if name == "reshape":
        ok, E = eqs.regroup(Es[0], ins[0], outs[0], space)
        return [E] if ok else None
    if name in ("concatenate", "pad", "slice", "split"):
        return _parts(eqs, eqn, Es, ins, outs, space)
    if name in ("stack", "unstack"):  # concatenate and split pieces with an axis of size 1
        axis = eqn.params["axis"] % max(len(d) for d in (*ins, *outs))
        if name == "stack":
            Es, ins = [_wider(E, axis) for E in Es], [_with_one(d, axis) for d in ins]
            return _parts(eqs, eqn, Es, ins, outs, space)
        found = _parts(eqs, eqn, Es, ins, [_with_one(d, axis) for d in outs], space)
        return found and [_narrower(E, axis) for E in found]
    if name == "conv_general_dilated" and eqn.params["batch_group_count"] == 1:
        return _conv(eqs, eqn, Es, ins, outs, space)
    found = rule(eqn, n.known)
    if found is None or found.law is None:
        return None
    law, why = found.law, where(eqn)
    carry = found.carry if found.carry is not None else range(len(Es))
    eqs.stop([E for j, E in enumerate(Es) if j not in carry], why)
    operands = [(Es[j], ins[j], found.ins[j]) for j in carry]
    if law == "each":
        return [eqs.joint(space, [o], d, ls, why) for o, d, ls in zip(operands, outs, found.outs)]
    if law == "difference":
        operands[1] = (_times(Es[1], -1), *operands[1][1:])
    equal = law in ("equal", "forgotten")
    E = eqs.joint(space, operands, outs[0], found.outs[0], why, equal)
    if law in ("forgotten", "index"):
        return [{} for _ in outs]
    if not isinstance(law, str):
        E = _times(E, law)
    return [E, *({} for _ in outs[1:])]


def _conv(
    eqs: Equations, eqn: Any, Es: list[Exponents], ins: list[Dims], outs: list[Dims], space: Space
) -> list[Exponents] | None:
    """A convolution is an einsum over groups and channels."""
    dn, why = eqn.params["dimension_numbers"], where(eqn)
    left, right, *labels = conv_view(eqn, ins)

    def order(E: Exponents, dims: Dims, old: Sequence[int], new: Sequence[int]) -> Exponents:
        moved = tuple(dims[old.index(k)] for k in new)
        return eqs.joint(space, [(E, dims, old)], moved, new, why)

    viewed = []
    for E, dims, spec, view in zip(Es, ins, (dn.lhs_spec, dn.rhs_spec), (left, right)):
        E = order(E, dims, list(range(len(dims))), list(spec))
        ok, E = eqs.regroup(E, tuple(dims[k] for k in spec), tuple(view), space)
        if not ok:
            return None
        viewed.append(E)
    out = tuple(outs[0][d] for d in dn.out_spec)
    grouped = (left[0], left[1], right[1], *out[2:])
    operands = [(viewed[0], tuple(left), labels[0]), (viewed[1], tuple(right), labels[1])]
    E = eqs.joint(space, operands, grouped, labels[2], why)
    ok, E = eqs.regroup(E, grouped, out, space)
    return [order(E, out, list(dn.out_spec), list(range(len(out))))] if ok else None


def _parts(
    eqs: Equations, eqn: Any, Es: list[Exponents], ins: list[Dims], outs: list[Dims], space: Space
) -> list[Exponents] | None:
    """Concatenate, pad, slice, split: blocks of the parts are blocks of the whole."""
    name, p = eqn.primitive.name, eqn.params
    joins = name in ("concatenate", "pad", "stack")
    pieces, whole = (ins, outs[0]) if joins else (outs, ins[0])
    if name == "slice" and any(s != 1 for s in p["strides"] or ()):
        return None
    axis = p.get("dimension", p.get("axis", 0)) % len(whole)
    if name == "slice":
        starts = [list(p["start_indices"])]
    elif name == "pad":
        pieces = pieces[:1]
        starts = [[low for low, *_ in p["padding_config"]]]
        if Es[1]:
            return None
    else:
        run = itertools.accumulate((q[axis].size for q in pieces), initial=0)
        starts = [[r if k == axis else 0 for k in range(len(whole))] for r in run]
    index = [{b.offset: c for c, b in enumerate(eqs.graph.blocks(t))} for t in whole]
    up = [
        [
            [found.get(b.offset + start) for b in eqs.graph.blocks(t)]
            for t, start, found in zip(piece, begin, index)
        ]
        for piece, begin in zip(pieces, starts)
    ]
    if any(c is None for u in up for d in u for c in d):
        return None

    def at(u: list, cell: tuple[int, ...]) -> Any:
        return tuple(u[d][c] for d, c in enumerate(cell))

    if not joins:
        E = Es[0] or {}
        return [
            {s: E[at(u, s[0]), s[1]] for s in eqs.slots(o, space) if (at(u, s[0]), s[1]) in E}
            for o, u in zip(outs, up)
        ]
    return [
        {
            (at(u, cell), slot): form
            for E, u in zip(Es, up)
            for (cell, slot), form in (E or {}).items()
        }
    ]


def _times(E: Exponents, m: Any) -> Exponents:
    return E and {k: {s: x * m for s, x in f.items() if m} for k, f in E.items()}


def _with_one(dims: Dims, axis: int) -> Dims:
    return (*dims[:axis], ONE, *dims[axis:])


def _wider(E: Exponents, axis: int) -> Exponents:
    """Exponents of an array that got an axis of size 1."""
    return E and {
        ((*cell[:axis], 0, *cell[axis:]), tuple((d + (d >= axis), k) for d, k in slot)): f
        for (cell, slot), f in E.items()
    }


def _narrower(E: Exponents, axis: int) -> Exponents:
    """Exponents of an array that lost an axis of size 1."""
    return E and {
        ((*cell[:axis], *cell[axis + 1 :]), tuple((d - (d > axis), k) for d, k in slot)): f
        for (cell, slot), f in E.items()
    }
