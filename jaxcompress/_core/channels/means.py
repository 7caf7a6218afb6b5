# SPDX-License-Identifier: Apache-2.0
"""Divisions by the number of summed channels whose quotient goes back to the same channels.

    norms       x - sum(x) / C, x / sqrt(sum(x^2) / C)    C is a count: it shrinks with them
    pooling     (sum(x) / C) @ w                          C is a constant: the rest is summed alike

Where channels are removed, the mean of a norm is that of the channels that stay. A mean that no
longer meets the channels it was taken over keeps its divisor: a removed channel counts as zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Literal

from ..analyze import CALLS
from .graph import Graph, Node
from .rules import MOVES, POINTWISE
from .terms import Leaf, Term, leaves

_THROUGH = MOVES | POINTWISE | {"reduce_max", "reduce_min"}


class Mean(NamedTuple):
    """A division by a count.

    Attributes:
      terms: that were summed over.
      operand: position of the count among the operands.
      count: how many numbers were summed.
      less: what the divisor is less than the count (0, or 1 for an unbiased variance).
    """

    terms: tuple[Term, ...]
    operand: int
    count: int
    less: int


class _Fact(NamedTuple):
    """What is known of a variable: the sum that it is, and the means that it was computed from."""

    summed: tuple[Term, ...] = ()
    means: frozenset = frozenset()


_NOTHING = _Fact()


def norm_means(graph: Graph) -> dict[tuple[int, int], Mean]:
    """The means that go back to their channels, by (id of the node, index of the equation)."""
    found: dict[tuple[int, int], Mean] = {}
    back: set[tuple[int, int]] = set()
    _walk(graph.node, [_NOTHING] * len(graph.node.jaxpr.invars), found, back)
    return {key: mean for key, mean in found.items() if key in back}


def _walk(n: Node, ins: Sequence[_Fact], found: dict, back: set) -> list[_Fact]:
    facts: dict[Any, _Fact] = dict(zip(n.jaxpr.invars, ins))

    def read(v: Any) -> _Fact:
        return _NOTHING if isinstance(v, Literal) else facts.get(v, _NOTHING)

    for i, eqn in enumerate(n.jaxpr.eqns):
        name, known = eqn.primitive.name, [read(v) for v in eqn.invars]
        if i in n.subs:
            if name in CALLS:
                outs = _walk(n.subs[i][0], known, found, back)
                facts.update(zip(eqn.outvars, outs))
            else:
                for sub in n.subs[i]:
                    _walk(sub, [_NOTHING] * len(sub.jaxpr.invars), found, back)
            continue
        out = _NOTHING
        if name == "reduce_sum":
            dims = n.of(eqn.invars[0])
            out = _Fact(tuple(dims[d] for d in eqn.params["axes"]), known[0].means)
        elif name in _THROUGH:
            means = frozenset().union(*(fact.means for fact in known))
            mean = _mean(n, eqn, known)
            if mean is not None:
                found[n_i := (id(n), i)] = mean
                means |= {n_i}
            out = _Fact(known[0].summed if name in MOVES else (), means)
            back |= {key for key in means if _meets(n, eqn, found[key])}
        facts.update({v: out for v in eqn.outvars if out is not _NOTHING})
    return [read(v) for v in n.jaxpr.outvars]


def _mean(n: Node, eqn: Any, known: Sequence[_Fact]) -> Mean | None:
    name = eqn.primitive.name
    for k, by in {"div": ((0, 1),), "mul": ((0, 1), (1, 0))}.get(name, ()):
        value = n.known(eqn.invars[by])
        if not known[k].summed or value is None or not np.isfinite(value) or not value:
            continue
        count = math.prod(t.size for t in known[k].summed)
        divisor = float(value) if name == "div" else 1 / float(value)
        for less in (0, 1):
            if abs(divisor - count + less) < 1e-3:
                return Mean(known[k].summed, by, count, less)
    return None


def _meets(n: Node, eqn: Any, mean: Mean) -> bool:
    summed: set[Leaf] = {x for t in mean.terms for x in leaves(t)}
    out = n.of(eqn.outvars[0])
    return any(x in summed and not x.pin for t in out for x in leaves(t))
