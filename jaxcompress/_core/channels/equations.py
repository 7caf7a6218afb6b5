# SPDX-License-Identifier: Apache-2.0
"""Equations between the exponents of arrays that are multiplied by powers of one scale.

For a scale s over a space of leaves (an axis; heads x width; layers x axis) every array carries an
exponent for each slot, a place where the space occurs in it: array' = array * s**e.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .. import _compat
from .forms import Form, add
from .graph import Graph
from .terms import Dims, Leaf

Slot = tuple[tuple[int, ...], tuple[tuple[int, int], ...]]
"""A block in each dimension, and for each leaf of the space (dimension, place in that block)."""
Exponents = dict[Slot, Form] | None  # a missing slot: 0; None: zeros or infinities, any exponent
Space = tuple[Leaf, ...]
OWN = "own"  # first entry of symbols that stand for no parameter: stops and carries


class Zero(NamedTuple):
    """A form that must be 0, and why; `hard` if not merely because two arrays are added."""

    form: Form
    why: str
    hard: bool


class Equations:
    """What must vanish so that a function stays the same.

    Attributes:
      zeros: the forms, with reasons.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.zeros: list[Zero] = []
        self._count = itertools.count()

    def own(self) -> Form:
        """A new symbol that stands for no parameter."""
        return {(OWN, next(self._count)): 1}

    def slots(self, dims: Dims, space: Space) -> Iterator[Slot]:
        """All places of a space in an array."""
        opts = [self.graph.blocks(t) for t in dims]
        if not all(any(x in b.leaves for o in opts for b in o) for x in space):
            return
        for cell in itertools.product(*(range(len(o)) for o in opts)):
            at = [(x, (d, k)) for d, c in enumerate(cell) for k, x in enumerate(opts[d][c].leaves)]
            places = [[place for x, place in at if x is leaf] for leaf in space]
            for slot in itertools.product(*places):
                yield cell, slot

    def stopped(self, dims: Dims, space: Space, why: str) -> Exponents:
        """Exponents that are 0 for a reason that is kept."""
        form = self.own()
        E: Exponents = dict.fromkeys(self.slots(dims, space), form)
        if E:
            self.zeros.append(Zero(form, why, True))
        return E

    def stop(self, operands: Sequence[Exponents], why: str) -> None:
        """All of these exponents must be 0."""
        self.zeros += [Zero(f, why, True) for E in operands for f in (E or {}).values() if f]

    def same(self, a: Exponents, b: Exponents, why: str) -> None:
        """Two arrays must have the same exponents."""
        if a is not None and b is not None:
            for k in {*a, *b}:
                self.vanish(add(a.get(k, {}), b.get(k, {}), -1), why, a.get(k) and b.get(k))

    def vanish(self, form: Form, why: str, both: Any) -> None:
        if form:
            self.zeros.append(Zero(form, why, not both))

    def joint(
        self,
        space: Space,
        operands: Sequence[tuple[Exponents, Dims, Sequence]],
        out: Dims,
        labels: Sequence,
        why: str,
        equal: bool = False,
    ) -> Exponents:
        """Sums exponents over operands, or equates them; what the result lacks must cancel."""
        if equal:
            operands = [o for o in operands if o[0] is not None]
        if not operands or any(o[0] is None for o in operands):
            return None
        if not any(o[0] for o in operands):
            return {}
        term = {
            x: t
            for dims, names in [*(o[1:] for o in operands), (out, labels)]
            for t, x in zip(dims, names)
        }
        order, result = list(term), {}
        for cell, slot in self.slots(tuple(term.values()), space):
            block, at = dict(zip(order, cell)), [(order[d], k) for d, k in slot]

            def key(names: Sequence, block=block, at=at) -> Slot | None:
                if any(x not in names for x, _ in at):
                    return None
                return tuple(block[x] for x in names), tuple((names.index(x), k) for x, k in at)

            keys = [key(list(names)) for _, _, names in operands]
            forms = [E.get(k, {}) if k else {} for (E, *_), k in zip(operands, keys)]  # type: ignore[union-attr]
            total: Form = forms[0] if equal else functools.reduce(add, forms, {})
            for f in forms[1:] if equal else ():
                self.vanish(add(forms[0], f, -1), why, forms[0] and f)
            if (k := key(list(labels))) is None:
                self.vanish(total, why, sum(map(bool, forms)) > 1)
            else:
                first = result.setdefault(k, total)
                self.vanish(add(total, first, -1), why, True)
        return result

    def regroup(self, E: Exponents, old: Dims, new: Dims, space: Space) -> tuple[bool, Exponents]:
        """Exponents under a reshape: the sequence of leaves stays, only cut differently."""
        if not E:
            return True, E
        a, b = self.flat(old, space), self.flat(new, space)
        if set(a) != set(b):
            return False, None
        return True, {b[k]: E[s] for k, s in a.items() if s in E}

    def flat(self, dims: Dims, space: Space) -> dict[Any, Slot]:
        """Slots by number of the cell, its leaves, and places in their row-major sequence."""
        opts = [self.graph.blocks(t) for t in dims]
        cells = itertools.product(*(range(len(o)) for o in opts))
        number = {cell: k for k, cell in enumerate(cells)}
        found = {}
        for cell, slot in self.slots(dims, space):
            words = [opts[d][c].leaves for d, c in enumerate(cell)]
            starts = list(itertools.accumulate(map(len, words), initial=0))
            key = (number[cell], sum(words, ()), tuple(starts[d] + k for d, k in slot))
            found[key] = cell, slot
        return found


def where(eqn: Any) -> str:
    """Name and source line of an equation."""
    line = re.sub(r" \(.*", "", _compat.source_line(eqn)).rsplit("/", 1)[-1]
    return f"`{eqn.primitive.name}`" + (f" ({line})" if line else "")
