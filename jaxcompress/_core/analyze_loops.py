# SPDX-License-Identifier: Apache-2.0
"""Labels through scan, while and cond: those of a carry are ones that a further round leaves."""

from __future__ import annotations

from typing import Any

from . import _compat
from .analysis import State
from .provenance import Label, merge


def scan(state: State, i: int, eqn: Any, ins: list[Label]) -> list[Label]:
    depth, length = state.depth + 1, eqn.params["length"]
    consts, carry, xs = _compat.split_scan(eqn.params, ins)
    xs = [_slice_of_stack(x, depth) for x in xs]

    def body(carry: list[Label]):
        return state.enter(eqn.params["jaxpr"], [*consts, *carry, *xs], deeper=1)

    carry, result = _fixed_point(body, carry)
    state.record(i, [result], scan=depth, length=length)
    state.found.extra[i] = state.depth
    k = len(carry)
    done = [_drop_scan(x, depth) for x in carry]
    ys = [
        out._replace(manual=(frozenset(), *out.manual)) if out.manual is not None else out
        for out in (_drop_scan(x, depth) for x in result[2][k:])
    ]
    return done + ys


def _slice_of_stack(x: Label, depth: int) -> Label:
    manual = x.manual[1:] if x.manual is not None else None
    return x._replace(scans=x.scans | {depth} if x.weight else x.scans, manual=manual)


def _drop_scan(x: Label, depth: int) -> Label:
    return x._replace(scans=x.scans - {depth}, reads=None if x.params else ())


def while_loop(state: State, i: int, eqn: Any, ins: list[Label]) -> list[Label]:
    p = eqn.params
    n, m = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts, carry = ins[:n], ins[n : n + m], ins[n + m :]

    def body(carry: list[Label]):
        return state.enter(p["body_jaxpr"], [*body_consts, *carry])

    carry, result = _fixed_point(body, carry)
    test = state.enter(p["cond_jaxpr"], [*cond_consts, *carry])
    state.record(i, [test, result])
    return carry


def _fixed_point(body: Any, carry: list[Label]) -> tuple[list[Label], tuple]:
    """Labels of a loop's carry that one more round does not change."""
    while True:
        result = body(carry)
        new = [
            old if out == old else merge([old, out])._replace(manual=_wider(old, out))
            for old, out in zip(carry, result[2], strict=False)
        ]
        if new == carry:
            return carry, result
        carry = new


def _wider(a: Label, b: Label) -> tuple[frozenset[str], ...] | None:
    if a.manual is None or b.manual is None:
        return a.manual if b.manual is None else b.manual
    return tuple(x | y for x, y in zip(a.manual, b.manual, strict=True))


def cond(state: State, i: int, eqn: Any, ins: list[Label]) -> list[Label]:
    results = [state.enter(branch, ins[1:]) for branch in eqn.params["branches"]]
    state.record(i, results)
    outs = []
    for labels in zip(*(result[2] for result in results), strict=True):
        # Parameters picked by a predicate on data are still parameters: an expert, a layer.
        out = labels[0] if len(set(labels)) == 1 else merge(labels)
        if ins[0].data and out.weight:
            out = out._replace(chosen=out.chosen or 2)
        for label in labels:
            out = out._replace(manual=_wider(out, label))
        outs.append(out)
    return outs
