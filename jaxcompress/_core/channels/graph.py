# SPDX-License-Identifier: Apache-2.0
"""The terms of every array of a function: one walk over its jaxpr and all that it calls."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from .. import _compat
from ..arguments import ArgNums, label_arguments
from ..region import Traced
from ..sites import Plan, Site
from ..staging import split
from ..transform import Listing, Transformed
from . import flow
from .indices import Indices
from .rules import MOVES, rule
from .terms import Block, Dims, Leaf, Term, blocks, find, fresh, leaves, pin, pinned, unify


@dataclasses.dataclass(eq=False)
class Node:
    """One call of one jaxpr.

    Attributes:
      jaxpr, consts: the jaxpr and its constants.
      plan: its sites.
      layers: axes of the scans that this body runs under, outermost first.
      mesh: axes of the mesh by name, inside shard_map.
      dims: terms of the dimensions of its variables.
      subs: by index of the equation, the nodes of the jaxprs that it calls.
      values: variables all of whose entries are one known number.
      indices: variables whose entries are indices of an axis, and which.
      touch: by leaf, the equations that read or make an array with it; filled for scalings.
    """

    jaxpr: Any
    consts: Sequence
    plan: Plan
    layers: tuple[Term, ...]
    mesh: Mapping[str, Term]
    dims: dict[Any, Dims] = dataclasses.field(default_factory=dict)
    subs: dict[int, list[Node]] = dataclasses.field(default_factory=dict)
    values: dict[Any, Any] = dataclasses.field(default_factory=dict)
    indices: Indices = dataclasses.field(default_factory=Indices)
    touch: dict[Leaf, set[int]] = dataclasses.field(default_factory=dict)

    def of(self, v: Any) -> Dims:
        """Terms of a variable or literal."""
        if isinstance(v, Literal):
            return pinned(np.shape(v.val), "a constant")
        return self.dims[v]

    def known(self, v: Any) -> Any:
        """The one value of all entries of a variable, or None."""
        if isinstance(v, Literal):
            return v.val if np.ndim(v.val) == 0 else None
        return self.values.get(v)


# What is computed of known numbers, to see zeros and infinities behind simple arithmetic.
_ARITHMETIC = {
    "neg": np.negative,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
}


class Walk:
    """Finds the terms of everything in a jaxpr."""

    def __init__(self):
        self.nodes: list[Node] = []

    def run(
        self,
        jaxpr: Any,
        consts: Sequence,
        plan: Plan,
        ins: Sequence[Dims],
        values: Sequence = (),
        layers: tuple[Term, ...] = (),
        mesh: Mapping[str, Term] | None = None,
        indices: Sequence = (),
    ) -> tuple[Node, list[Dims]]:
        """The node of a jaxpr whose inputs have these terms, and the terms of its results."""
        n = Node(jaxpr, consts, plan, layers, mesh or {})
        n.indices.start(jaxpr.invars, indices)
        self.nodes.append(n)
        n.dims.update(zip(jaxpr.invars, map(tuple, ins), strict=True))
        n.values.update({v: x for v, x in zip(jaxpr.invars, values) if x is not None})
        for v, c in itertools.zip_longest(jaxpr.constvars, consts):
            n.dims[v] = tuple(fresh(k) for k in v.aval.shape)
            if (x := _uniform(c)) is not None:
                n.values[v] = x
        for i, eqn in enumerate(jaxpr.eqns):
            dims = [n.of(v) for v in eqn.invars]
            outs = self.equation(n, i, eqn, dims)
            n.dims.update(zip(eqn.outvars, map(tuple, outs), strict=True))
            self.value(n, eqn)
            n.indices.follow(n, i, eqn)
        return n, [n.of(v) for v in jaxpr.outvars]

    def equation(self, n: Node, i: int, eqn: Any, ins: list[Dims]) -> Sequence[Dims]:
        """The terms of the results of an equation."""
        name = eqn.primitive.name
        sizes = [k for v in (*eqn.invars, *eqn.outvars) for k in getattr(v.aval, "shape", ())]
        own = flow.RULES.get(name)
        if own and 0 not in sizes:
            return own(self, n, i, eqn, ins)
        found = rule(eqn, n.known) if 0 not in sizes else None
        if found is None:
            why = f"primitive {name}" if 0 not in sizes else "an empty array"
            return self.unknown(eqn, ins, why)
        known = n.indices.known(eqn, found)
        term: dict[Any, Term] = dict(known)
        for dims, labels in zip(ins, found.ins):
            for t, x in zip(dims, labels):
                unify(term.setdefault(x, t), t)
        outs = [
            [term[x] if x in term else term.setdefault(x, fresh(k)) for x, k in zip(labels, shape)]
            for labels, shape in ((ls, v.aval.shape) for ls, v in zip(found.outs, eqn.outvars))
        ]
        for x, why in found.pins.items():
            if x in term and x not in known:
                pin(term[x], why)
        for x in found.mixed:
            for leaf in leaves(term[x]) if x in term else ():
                leaf.mixed = True
        return [tuple(dims) for dims in outs]

    def unknown(self, eqn: Any, ins: Sequence[Dims], why: str) -> list[Dims]:
        """Pins everything that an equation reads and makes."""
        for t in itertools.chain(*ins):
            pin(t, why)
        return [pinned(getattr(v.aval, "shape", ()), why) for v in eqn.outvars]

    def enter(
        self,
        n: Node,
        i: int,
        jaxpr: Any,
        ins: Sequence[Dims],
        values: Sequence = (),
        layers: tuple[Term, ...] = (),
        mesh: Mapping[str, Term] | None = None,
        indices: Sequence = (),
    ) -> list[Dims]:
        """Walks a jaxpr that equation i calls; the terms of its results."""
        inner, consts = _compat.open_jaxpr(jaxpr)
        plans, done = n.plan.calls.get(i, ()), n.subs.setdefault(i, [])
        plan = plans[len(done)] if len(done) < len(plans) else Plan()
        around = {**n.mesh, **(mesh or {})}
        node, outs = self.run(inner, consts, plan, ins, values, n.layers + layers, around, indices)
        done.append(node)
        return outs

    def value(self, n: Node, eqn: Any) -> None:
        """Numbers that are known while tracing."""
        name, out = eqn.primitive.name, eqn.outvars[0] if eqn.outvars else None
        if name not in _ARITHMETIC and name not in MOVES:
            return
        values = [n.known(v) for v in eqn.invars]
        if name in MOVES and values[0] is not None:
            n.values[out] = values[0]
        elif name in _ARITHMETIC and all(x is not None for x in values):
            with np.errstate(all="ignore"):
                n.values[out] = _ARITHMETIC[name](*values)


def _uniform(c: Any) -> Any:
    """The one value of all entries of a constant; None if there are others, or it is large."""
    if c is None or isinstance(c, _compat.Tracer) or not hasattr(c, "dtype"):
        return None
    if not 0 < np.size(c) <= 1 << 20 or not jnp.issubdtype(c.dtype, jnp.number):
        return None
    flat = np.asarray(c).ravel()
    return flat[0] if (flat == flat[0]).all() else None


def equate(xs: Sequence[Dims], ys: Sequence[Dims]) -> None:
    """Arrays that are the same, dimension by dimension."""
    for x, y in zip(xs, ys, strict=True):
        for a, b in zip(x, y, strict=True):
            unify(a, b)


@dataclasses.dataclass(eq=False)
class Graph:
    """A function with the terms of all its arrays.

    Attributes:
      name: of the function.
      node: the outermost call; `nodes`: all of them.
      paths, shapes, dims: key path, shape and terms of every parameter, by number.
      inputs: for every input of the jaxpr, the number of the parameter that it is, or None.
      sites: all sites, each once.
      memo: blocks of terms.
    """

    traced: Traced
    node: Node
    nodes: list[Node]
    paths: list[str]
    shapes: list[tuple[int, ...]]
    dims: list[Dims]
    inputs: list[int | None]
    sites: tuple[Site, ...]
    memo: dict[int, tuple[Term, list[Block]]] = dataclasses.field(default_factory=dict)

    def blocks(self, t: Term) -> list[Block]:
        """The blocks of a term, remembered: nothing is bound any more."""
        t = find(t)
        if id(t) not in self.memo:  # the term is kept alive so that its id stays its own
            self.memo[id(t)] = t, blocks(t)
        return self.memo[id(t)][1]

    @functools.cached_property
    def held(self) -> dict[Any, frozenset[Leaf]]:
        """Leaves of every input of the jaxpr."""
        _index(self.node)
        dims = self.node.dims
        return {v: frozenset(x for t in dims[v] for x in leaves(t)) for v in self.node.jaxpr.invars}

    def relevant(self, n: Node, space: Sequence[Leaf]) -> list[int]:
        """Equations of a node that see all leaves of a space, in order."""
        found = [n.touch.get(leaf, set()) for leaf in space]
        return sorted(set.intersection(*found)) if found else []


class Everything(Listing):
    """Chooses every site and changes none."""

    def choose(self, sites: Sequence[Site]) -> Mapping[str, Any]:
        return dict.fromkeys((site.name for site in sites), None)


def channel_graph(fn: Callable, argnums: ArgNums, args: tuple, kwargs: dict) -> Graph:
    """Traces a call and finds the terms of every array in it.

    Args:
      fn: a forward pass or loss.
      argnums: position or name of the argument that holds the parameters, or several.
      args, kwargs: of the call; `jax.ShapeDtypeStruct`s will do.
    """
    inner = Transformed(fn, Everything(), argnums)
    traced = inner.trace(*args, **kwargs)
    call, arrays = split((args, kwargs), inner.floats)
    labels, named = label_arguments(args, kwargs, inner.params_of(args, kwargs), inner.floats)
    shapes = [tuple(getattr(x, "shape", ())) for _, x in named]
    dims = [tuple(fresh(k) for k in shape) for shape in shapes]
    numbers = iter(range(len(named)))
    inputs = [next(numbers) if label.params else None for label in labels]
    ins = [
        dims[k] if k is not None else pinned(getattr(x, "shape", ()), "an input")
        for k, x in zip(inputs, arrays, strict=True)
    ]
    walk, staged = Walk(), traced.staged
    node, outs = walk.run(staged.jaxpr, staged.consts, traced.plan, ins)
    for t in itertools.chain(*outs):
        pin(t, "an output")
    paths = [path for path, _ in named]
    graph = Graph(traced, node, walk.nodes, paths, shapes, dims, inputs, traced.sites)
    return graph


def _index(n: Node) -> None:
    """Fills `touch` of a node and of all below it."""
    touch: dict[Leaf, set[int]] = collections.defaultdict(set)
    held: dict[int, set[Leaf]] = {}

    def of(t: Term) -> set[Leaf]:
        t = find(t)
        if id(t) not in held:
            held[id(t)] = set(leaves(t))
        return held[id(t)]

    for i, eqn in enumerate(n.jaxpr.eqns):
        for v in (*eqn.invars, *eqn.outvars):
            if not isinstance(v, Literal):
                for t in n.dims[v]:
                    for leaf in of(t):
                        touch[leaf].add(i)
        for sub in n.subs.get(i, ()):
            _index(sub)
            for leaf in sub.touch:
                touch[leaf].add(i)
    n.touch = dict(touch)
