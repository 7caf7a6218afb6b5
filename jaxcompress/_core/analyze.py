# SPDX-License-Identifier: Apache-2.0
"""One static pass over a jaxpr: labels every variable and finds the sites.

Parameters are numbers here, and what was found is remembered for each jaxpr and pattern of labels:
a block that is called 48 times is looked at once. `_core/naming.py` names the sites afterwards.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import Literal

from . import _compat, dimensions
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

MARK = "jaxcompress_"  # prefix of the names of regions and functions that a transform emitted
FAKE = MARK + "fake_"  # jaxcompress_fake_quantize: the value is owned by the kind after the prefix
INTEGER = MARK + "integer"  # a site in integers, and in floats for those who change it
OPAQUE = MARK + "opaque"  # a region that is left alone and hidden
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


class Draft(NamedTuple):
    """A site before it has a name; parameters are numbers."""

    labels: tuple[Label, ...]
    roles: tuple[str, ...]
    opaque: bool
    eqn: Any


class Call(NamedTuple):
    """An equation that calls jaxprs: (analysis, parameters of the caller by number) each."""

    bodies: tuple[tuple[Analysis, list[int]], ...]
    scan: int | None = None  # depth, if this is a scan
    length: int = 0


@dataclasses.dataclass
class Analysis:
    """What was found in one jaxpr for one pattern of labels."""

    drafts: dict[int, Draft] = dataclasses.field(default_factory=dict)
    calls: dict[int, Call] = dataclasses.field(default_factory=dict)
    extra: dict[int, Any] = dataclasses.field(default_factory=dict)
    marks: dict[str, Label] = dataclasses.field(default_factory=dict)
    owned: set[str] = dataclasses.field(default_factory=set)
    outputs: list[Label] = dataclasses.field(default_factory=list)
    layers: frozenset[int] = frozenset()  # depths of scans over which some weight is a slice
    experts: frozenset[int] = frozenset()  # parameters of which data chose a matmul's weight

    @property
    def empty(self) -> bool:
        return not (self.drafts or self.calls or self.marks or self.owned)


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
        state = _State(self, found, depth, manual)

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


class _State(NamedTuple):
    """What the rules need of the analysis under way."""

    analyzer: Analyzer
    found: Analysis
    depth: int
    manual: frozenset[str]

    def enter(self, jaxpr: Any, labels: Sequence[Label], deeper: int = 0):
        return self.analyzer.call(jaxpr, labels, self.depth + deeper, self.manual)

    def record(self, i: int, results: Sequence[tuple], scan: int | None = None, length: int = 0):
        bodies = tuple((analysis, numbers) for analysis, numbers, _ in results)
        for analysis, numbers in bodies:
            for name, label in analysis.marks.items():
                self.mark(name, renumber(label, numbers))
            self.found.owned |= analysis.owned
            layers = analysis.layers - ({scan} if scan is not None else set())
            self.found.layers |= layers
            self.found.experts |= frozenset(numbers[n] for n in analysis.experts)
        if any(a.drafts or a.calls for a, _ in bodies):
            self.found.calls[i] = Call(bodies, scan, length)

    def mark(self, name: str, label: Label):
        old = self.found.marks.get(name)
        if old is not None and old != label:
            params = old.params | label.params
            label = Label(data=old.data and label.data, params=params)
        self.found.marks[name] = label


# ---------------------------------------------------------------------- one rule a primitive


def _ordinary(state: _State, i: int, eqn: Any, ins: list[Label]) -> list[Label]:
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


def _site(state: _State, i: int, eqn: Any, ins: list[Label]) -> list[str]:
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


def _opaque(state: _State, i: int, eqn: Any, ins: list[Label]) -> None:
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


def _name(state: _State, i: int, eqn: Any, ins: list[Label]) -> list[Label]:
    if eqn.params["name"].startswith(MARK):
        state.mark(eqn.params["name"], ins[0])
    return _ordinary(state, i, eqn, ins)


def _jit(state: _State, i: int, eqn: Any, ins: list[Label]) -> list[Label]:
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


def _integer(state: _State, i: int, plain: Any, ins: list[Label]) -> list[Label]:
    """A site that is computed in integers: what it says it computes is its product of floats."""
    jaxpr, used = plain
    result = state.enter(jaxpr, [label for label, u in zip(ins, used, strict=True) if u])
    state.found.extra[i] = plain
    state.record(i, [result])
    return result[2] * 2


def _call(state: _State, i: int, eqn: Any, ins: list[Label]) -> list[Label]:
    result = state.enter(eqn.params[CALLS[eqn.primitive.name]], ins)
    state.record(i, [result])
    return result[2]


def _custom_vjp(state: _State, i: int, eqn: Any, ins: list[Label]) -> list[Label]:
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


def _shard_map(state: _State, i: int, eqn: Any, ins: list[Label]) -> list[Label]:
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


def _scan(state: _State, i: int, eqn: Any, ins: list[Label]) -> list[Label]:
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


def _while(state: _State, i: int, eqn: Any, ins: list[Label]) -> list[Label]:
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


def _cond(state: _State, i: int, eqn: Any, ins: list[Label]) -> list[Label]:
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


_RULES = {
    **dict.fromkeys(CALLS, _call),
    "jit": _jit,
    "pjit": _jit,
    "custom_vjp_call": _custom_vjp,
    "shard_map": _shard_map,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "name": _name,
}
