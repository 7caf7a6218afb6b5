# SPDX-License-Identifier: Apache-2.0
"""One static pass over a jaxpr: labels every variable and finds the sites.

Parameters are numbers here, and what was found is remembered for each jaxpr and pattern of labels:
a block that is called 48 times is looked at once. `_core/naming.py` names the sites afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax.extend.core import Literal

from . import _compat, analyze_loops, dimensions
from .analysis import FAKE, INTEGER, MARK, OPAQUE, Analysis, Draft, State
from .provenance import (
    CONSTANT,
    DATA,
    LAYOUT,
    ONE_BY_ONE,
    UPDATES,
    Label,
    canonical,
    merge,
    read,
    renumber,
    transfer,
)
from .sites import LOOKUPS, OPERATIONS, row_axes

ORDERS = 3  # how often a custom_vjp whose forward rule calls itself can be differentiated

# Primitives that call one jaxpr, and the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "shard_map": "jaxpr",
}


class Analyzer:
    """Analyses jaxprs for a transform with the given mark.

    Args:
      mark: name of the regions that this very transform emitted; they are not entered again.
    """

    def __init__(self, mark: str | None = None):
        self.mark = mark
        self.under_way: list[Any] = []  # functions whose forward rules are being analysed
        self.memo: dict[tuple, tuple[Analysis, Any]] = {}

    def call(
        self, jaxpr: Any, labels: Sequence[Label], depth: int, manual: frozenset[str]
    ) -> tuple[Analysis, list[int], list[Label]]:
        """Analysis of a jaxpr under these labels, remembered: (analysis, numbers, outputs)."""
        inner, _ = _compat.open_jaxpr(jaxpr)
        labels, numbers = canonical(labels)
        key = (id(inner), labels, depth, manual)
        if key not in self.memo:  # the jaxpr is kept alive so that its id stays its own
            self.memo[key] = (self.analyze(inner, labels, depth, manual), inner)
        found = self.memo[key][0]
        return found, numbers, [renumber(out, numbers) for out in found.outputs]

    def analyze(
        self,
        jaxpr: Any,
        labels: Sequence[Label],
        depth: int = 0,
        manual: frozenset[str] = frozenset(),
        constants: Sequence[Label] = (),
    ) -> Analysis:
        found = Analysis()
        env: dict[Any, Label] = dict(zip(jaxpr.invars, labels, strict=True))
        env.update(zip(jaxpr.constvars, constants or [CONSTANT] * len(jaxpr.constvars)))
        state = State(self, found, depth, manual)

        def read(v: Any) -> Label:
            return CONSTANT if isinstance(v, Literal) else env.get(v, CONSTANT)

        for i, eqn in enumerate(jaxpr.eqns):
            ins = [read(v) for v in eqn.invars]
            rule = _RULES.get(eqn.primitive.name, _ordinary)
            outs = rule(state, i, eqn, ins)
            if manual and (rule is _ordinary or rule is _name):
                where = dimensions.splits(eqn, [x.manual for x in ins], manual)
                outs = [out._replace(manual=w) for out, w in zip(outs, where, strict=True)]
            env.update(zip(eqn.outvars, outs))
        found.outputs = [read(v) for v in jaxpr.outvars]
        return found


# ---------------------------------------------------------------------- one rule a primitive


def _ordinary(state: State, i: int, eqn: Any, ins: list[Label]) -> list[Label]:
    name, rank = eqn.primitive.name, 0
    if name in LOOKUPS:
        rank = row_rank(eqn)
    if name in ONE_BY_ONE and len(eqn.outvars) == len(ins):
        return [transfer(name, [label]) for label in ins]
    out = transfer(name, ins, rank)
    if name in LAYOUT and ins:
        out = read(out._replace(manual=ins[0].manual), eqn)._replace(manual=None)
    if name in UPDATES and out.data and len({v.aval.shape for v in eqn.invars[-2:]}) == 1:
        out = merge(ins)
    if name in OPERATIONS:
        roles = _site(state, i, eqn, ins)
        if "activation" in roles and out.chosen:
            out = DATA
    elif _hides_matmul(eqn):
        _opaque(state, i, eqn, ins)
    return [out] * len(eqn.outvars)


def row_rank(eqn: Any) -> int:
    """Rank of what a lookup reads, without dimensions of size 1."""
    shape = eqn.invars[0].aval.shape
    return sum(shape[d] not in (0, 1) for d in row_axes(eqn))


def _site(state: State, i: int, eqn: Any, ins: list[Label]) -> list[str]:
    """Records a site and returns the roles of its operands."""
    labels = ins[: OPERATIONS[eqn.primitive.name]]
    lookup = eqn.primitive.name in LOOKUPS
    # Rows of a table that data chose are activations; matrices that it chose are weights.
    weights = [label.weight and (lookup or label.chosen != 1) for label in labels]
    roles = ["weight" if weight else "activation" for weight in weights]
    if lookup:
        # An embedding is read by data, row by row; static indices only pick a part of a weight.
        by_data = any(label.data or label.chosen for label in ins[1:])
        if not labels[0].weight or labels[0].chosen or not by_data or not row_axes(eqn):
            return []
    elif roles == ["weight", "weight"] and labels[0].chosen != labels[1].chosen:
        pieces = [label.chosen or math.inf for label in labels]
        roles = ["activation" if n == min(pieces) else "weight" for n in pieces]
    for label, role in zip(labels, roles, strict=True):
        if role == "weight":
            state.found.layers |= label.scans
            state.found.experts |= label.params if label.chosen else frozenset()
    state.found.drafts[i] = Draft(tuple(labels), tuple(roles), False, eqn)
    return roles


def _opaque(state: State, i: int, eqn: Any, ins: list[Label]) -> None:
    roles = tuple("weight" if label.weight else "activation" for label in ins)
    state.found.drafts[i] = Draft(tuple(ins), roles, True, eqn)


def _hides_matmul(eqn: Any) -> bool:
    todo = list(_compat.inner_jaxprs(eqn.params))
    while todo:
        for inner in _compat.open_jaxpr(todo.pop())[0].eqns:
            if inner.primitive.name in OPERATIONS.keys() - LOOKUPS:
                return True
            todo += _compat.inner_jaxprs(inner.params)
    return False


def _name(state: State, i: int, eqn: Any, ins: list[Label]) -> list[Label]:
    if eqn.params["name"].startswith(MARK):
        state.mark(eqn.params["name"], ins[0])
    return _ordinary(state, i, eqn, ins)


def _jit(state: State, i: int, eqn: Any, ins: list[Label]) -> list[Label]:
    name = eqn.params.get("name", "")
    if name.startswith(FAKE):
        out = ins[0]._replace(owners=ins[0].owners | {name[len(FAKE) :]})
        return [out] * len(eqn.outvars)
    if name == INTEGER and (plain := _compat.second_result(eqn)) is not None:
        return _integer(state, i, plain, ins)
    if name == state.analyzer.mark or name == OPAQUE:
        state.found.owned.add(name)
        return [DATA] * len(eqn.outvars)
    return _call(state, i, eqn, ins)


def _integer(state: State, i: int, plain: Any, ins: list[Label]) -> list[Label]:
    """A site that is computed in integers: what it says it computes is its product of floats."""
    jaxpr, used = plain
    result = state.enter(jaxpr, [label for label, u in zip(ins, used, strict=True) if u])
    state.found.extra[i] = plain
    state.record(i, [result])
    return result[2] * 2


def _call(state: State, i: int, eqn: Any, ins: list[Label]) -> list[Label]:
    result = state.enter(eqn.params[CALLS[eqn.primitive.name]], ins)
    state.record(i, [result])
    return result[2]


def _custom_vjp(state: State, i: int, eqn: Any, ins: list[Label]) -> list[Label]:
    primal = state.enter(eqn.params["call_jaxpr"], ins)
    function, under_way = _compat.backward_function(eqn.params), state.analyzer.under_way
    if under_way.count(function) == ORDERS:  # its forward rule calls the function itself
        if not primal[0].empty:
            state.record(i, [primal])
            state.found.extra[i] = None
        return primal[2]
    under_way.append(function)
    rule = _compat.call_forward_rule(eqn.params, len(ins))
    known = dict(zip(eqn.invars, ins, strict=True)) if rule.leading else {}
    leading = [known.get(_compat.traced_variable(c), CONSTANT) for c in rule.leading]
    forward = state.enter(rule.jaxpr, [*leading, *ins[eqn.params["num_consts"] :]])
    under_way.pop()
    if primal[0].empty and forward[0].empty:
        return primal[2]
    # The user's forward rule computes the same sites again, under the same names.
    state.found.extra[i] = rule
    state.record(i, [primal, forward])
    return primal[2]


def _shard_map(state: State, i: int, eqn: Any, ins: list[Label]) -> list[Label]:
    p = eqn.params
    axes = state.manual | frozenset(p["newly_manual_axes"])
    labels = []
    for label, spec, v in zip(ins, p["in_specs"], eqn.invars, strict=True):
        outer = label.manual or (frozenset(),) * v.aval.ndim
        split = [frozenset(n for n in _axis_names(s)) for s in spec]
        split += [frozenset()] * (v.aval.ndim - len(split))
        both = tuple(a | b for a, b in zip(outer, split, strict=True))
        labels.append(label._replace(manual=both))
    result = state.analyzer.call(p["jaxpr"], labels, state.depth, axes)
    state.record(i, [result])
    new = frozenset(p["newly_manual_axes"])
    keep = [
        out._replace(manual=tuple(s - new for s in out.manual or ()) if state.manual else None)
        for out in result[2]
    ]
    return keep


def _axis_names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


_RULES = {
    **dict.fromkeys(CALLS, _call),
    "jit": _jit,
    "pjit": _jit,
    "custom_vjp_call": _custom_vjp,
    "shard_map": _shard_map,
    "scan": analyze_loops.scan,
    "while": analyze_loops.while_loop,
    "cond": analyze_loops.cond,
    "name": _name,
}
