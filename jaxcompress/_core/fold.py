# SPDX-License-Identifier: Apache-2.0
"""Folding: runs of equations that repeat (unrolled layers) become calls of one inner jit.

Evaluation, differentiation and lowering then happen once per block instead of once per layer.
XLA inlines the calls, so that the compiled program is the same.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Literal

from .sites import Plan, Site

LEAST = 8  # equations; shorter blocks do not pay for their call


class Block(NamedTuple):
    """One copy of a repeated run of equations.

    Attributes:
      start, length: the equations of this copy.
      model: start of the first copy: copies with the same model are interchangeable.
      inputs: variables of this copy from outside.
      outputs: variables of this copy that are read outside.
      sites: names of the sites in this copy.
      signature: what the transform does in the block.
    """

    start: int
    length: int
    model: int
    inputs: tuple
    outputs: tuple
    sites: tuple[str, ...]
    signature: tuple


def schedule(plan: Plan, jaxpr: Any, settings: Any) -> list[int | Block]:
    """Equations to evaluate in order, with repeated runs that contain sites as blocks."""
    eqns = jaxpr.eqns
    plain: list[int | Block] = list(range(len(eqns)))
    if len(eqns) < 2 * LEAST or not (plan.sites or plan.calls):
        return plain
    numbers: dict[Any, int] = {}
    codes = np.array(
        [
            numbers.setdefault(_key(e, sites_of(plan, i), settings), len(numbers))
            for i, e in enumerate(eqns)
        ]
    )
    blocks: dict[int, Block] = {}
    for start, length, copies in _repeats(codes, 0, len(eqns)):
        for block in _same_dataflow(plan, jaxpr, settings, start, length, copies):
            blocks[block.start] = block
    out: list[int | Block] = []
    i = 0
    while i < len(eqns):
        out.append(blocks.get(i, i))
        i += blocks[i].length if i in blocks else 1
    return out


def sites_of(plan: Plan, i: int) -> list[Site]:
    """All sites of equation `i`, in program order."""
    own = [plan.sites[i]] if i in plan.sites else []
    return own + [s for inner in plan.calls.get(i, ()) for s in inner.everything]


def signature(sites: Sequence[Site], settings: Any) -> tuple:
    """What a transform may read of sites beyond their equations: equal means interchangeable."""
    return tuple(
        (settings[s.name], s.layered, tuple(o._replace(path="", shape=()) for o in s.operands))
        for s in sites
    )


def _key(eqn: Any, sites: Sequence[Site], settings: Any) -> Any:
    """Equations with equal keys do the same; a unique key where that cannot be told."""
    if eqn.effects or eqn.primitive.name.startswith("custom_"):
        return object()  # the rules of custom derivatives are functions of their own
    params = tuple((name, _hashable(value)) for name, value in sorted(eqn.params.items()))
    literals = tuple(
        (k, v.aval, np.asarray(v.val).tobytes())
        for k, v in enumerate(eqn.invars)
        if isinstance(v, Literal)
    )
    avals = tuple(v.aval for v in (*eqn.invars, *eqn.outvars))
    return eqn.primitive, params, literals, avals, id(eqn.ctx), signature(sites, settings)


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return tuple(map(_hashable, value))
    try:
        hash(value)
    except TypeError:
        return object()
    return value


def _repeats(codes: np.ndarray, low: int, high: int) -> list[tuple[int, int, int]]:
    """Runs that repeat back to back, as (start, length, copies): the biggest saving first, then
    left and right of it."""
    last: dict[int, int] = {}
    gaps: collections.Counter[int] = collections.Counter()
    for i in range(low, high):
        code = int(codes[i])
        if code in last:
            gaps[i - last[code]] += 1
        last[code] = i
    best: tuple[int, int, int] | None = None  # (equations saved, start, length)
    part = codes[low:high]
    for period, _ in gaps.most_common(12):
        if period < LEAST or 2 * period > high - low:
            continue
        same = np.concatenate([[0], part[:-period] == part[period:], [0]]).astype(int)
        starts, ends = np.where(np.diff(same) == 1)[0], np.where(np.diff(same) == -1)[0]
        for start, end in zip(starts, ends, strict=True):
            saved = (end - start) // period * period
            if saved and (best is None or saved > best[0]):
                best = (int(saved), low + int(start), period)
    if best is None:
        return []
    saved, start, period = best
    end = start + saved + period
    found = (start, period, saved // period + 1)
    return [*_repeats(codes, low, start), found, *_repeats(codes, end, high)]


def _same_dataflow(
    plan: Plan, jaxpr: Any, settings: Any, start: int, length: int, copies: int
) -> list[Block]:
    """The copies of a run whose equations also read each other's results in the same way."""
    eqns = jaxpr.eqns
    groups: dict[tuple, list[tuple[int, list]]] = collections.defaultdict(list)
    made: dict[Any, tuple[int, int, int]] = {}  # variable -> (copy, equation, result)
    for copy in range(start, start + copies * length, length):
        outside: dict[Any, int] = {}
        pattern = []
        for offset in range(length):
            eqn = eqns[copy + offset]
            for v in eqn.invars:
                if isinstance(v, Literal):
                    continue
                maker, *place = made.get(v, (None,))
                inside = maker == copy
                pattern.append(tuple(place) if inside else outside.setdefault(v, len(outside)))
            made.update({v: (copy, offset, k) for k, v in enumerate(eqn.outvars)})
        groups[tuple(pattern)].append((copy, list(outside)))
    group = max(groups.values(), key=len)
    if len(group) < 2 or not any(sites_of(plan, group[0][0] + o) for o in range(length)):
        return []
    members = {copy for copy, _ in group}
    used: set[tuple[int, int]] = set()
    for i, eqn in enumerate(eqns):
        reader = start + (i - start) // length * length
        for v in eqn.invars:
            if not isinstance(v, Literal) and v in made:
                copy, offset, k = made[v]
                if copy in members and copy != reader:
                    used.add((offset, k))
    for v in jaxpr.outvars:
        if not isinstance(v, Literal) and v in made and made[v][0] in members:
            used.add(made[v][1:])

    def outputs(copy: int) -> tuple:
        return tuple(eqns[copy + offset].outvars[k] for offset, k in sorted(used))

    def sites(copy: int) -> list[Site]:
        return [s for o in range(length) for s in sites_of(plan, copy + o)]

    def names(copy: int) -> tuple[str, ...]:
        return tuple(s.name for s in sites(copy))

    model = group[0][0]
    same = signature(sites(model), settings)
    return [
        Block(copy, length, model, tuple(inputs), outputs(copy), names(copy), same)
        for copy, inputs in group
    ]
