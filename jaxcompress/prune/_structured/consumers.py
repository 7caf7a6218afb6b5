# SPDX-License-Identifier: Apache-2.0
"""The sites that sum over a group: what they read is what is lost when an index leaves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from ..._calibration.rows import Rows, rows_of
from ..._calibration.stream import collect, same_inputs
from ..._core.channels.slices import places
from ..._core.channels.terms import Prod, find, leaves

if TYPE_CHECKING:
    import numpy as np

    from ..._core.channels.graph import Graph, Node
    from ..._core.channels.terms import Leaf, Term
    from ..._core.sites import Site
    from .problem import Problem


class Consumer(NamedTuple):
    """A site that contracts some groups.

    Attributes:
      site: the site.
      rows: its weight as [*lead, out, in].
      inputs: the term of `in`.
      lead: the terms of `lead`.
      layers: the axes of the scans over layers around it.
    """

    site: Site
    rows: Rows
    inputs: Term
    lead: tuple[Term, ...]
    layers: tuple[Term, ...]

    def places(self, leaf: Leaf) -> np.ndarray:
        """int[size, count]: the inputs that are of each index of a group."""
        return places(self.inputs, leaf)


def consumers(graph: Graph) -> Iterator[Consumer]:
    """All sites with one weight, each once."""
    seen: set[str] = set()

    def walk(n: Node) -> Iterator[Consumer]:
        for i, site in n.plan.sites.items():
            rows = rows_of(site, site.weights[0]) if site.weights else None
            if rows is None or site.name in seen:
                continue
            seen.add(site.name)
            dims = n.of(n.jaxpr.eqns[i].invars[rows.weight])
            lead = tuple(dims[d] for d in rows.order[: rows.counts[0]])
            inputs = Prod([dims[d] for d in rows.contracted])
            layers = tuple(t for t, layered in zip(n.layers, site.layered, strict=True) if layered)
            yield Consumer(site, rows, inputs, lead, layers)
        for sub in itertools.chain(*n.subs.values()):
            yield from walk(sub)

    yield from walk(graph.node)


def reading(problem: Problem, groups: list[Leaf]) -> dict[str, tuple[Consumer, list[Leaf]]]:
    """By name the sites that sum over any of these groups, and which."""
    found = {}
    for consumer in consumers(problem.graph):
        own = set(leaves(consumer.inputs))
        held = [x for x in groups if x in own]
        if held:
            found[consumer.site.name] = consumer, held
    return found


def statistics(problem: Problem, names: list[str], wanted: tuple[str, ...], why: str) -> Mapping:
    """Statistics of the inputs of sites on the calibration data, by name of the site."""
    same = same_inputs(problem.graph.traced.plan)
    asked = {same.get(name, name): wanted for name in names}
    found = collect(problem.fn, problem.params, problem.data(why), asked)
    return {name: found[same.get(name, name)] for name in names}


def of_layers(problem: Problem, consumer: Consumer, leaf: Leaf, values: np.ndarray) -> np.ndarray:
    """[size], or [layers, size] for a group of each layer, of values [*stack, *lead, size]."""
    layer = problem.layers.get(leaf)
    kept = [k for k, t in enumerate(consumer.layers) if layer is not None and find(t) is layer]
    return values.sum(tuple(k for k in range(values.ndim - 1) if k not in kept))
