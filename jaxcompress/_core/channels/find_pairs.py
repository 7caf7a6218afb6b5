# SPDX-License-Identifier: Apache-2.0
"""Finding scale pairs: what absorbs a scale of the input channels of a site, from the jaxpr."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ..arguments import ArgNums
from ..sites import Site
from .forms import Form
from .graph import Graph, Node, channel_graph
from .pairs import Member, ScalePair, ScalePairs, Use
from .params import ParamTree, param_tree
from .scaling import OWN, Scaling, Space
from .terms import Dims, Leaf, find, leaves


def scale_pairs(fn: Callable, argnums: ArgNums = 0) -> Callable[..., ScalePairs]:
    """Finds, for every site with a weight, what can absorb a scale of its input channels.

    Read off the jaxpr: a norm's weight and bias, the output channels of a linear layer or a
    convolution through ReLU-like functions, reshapes and transposes, V for the output projection of
    attention, the linear branch of a gated unit. Consumers of one producer (q, k and v behind a
    norm) are scaled together; channels that must share a scale do (queries of one key head).

    Args:
      fn: a forward pass or loss.
      argnums: position or name of the argument that holds the parameters, or several.

    Returns:
      A function of the arguments of `fn` (`jax.ShapeDtypeStruct`s will do) that returns
      `ScalePairs`. Nothing is computed.

    >>> import jax, jax.numpy as jnp
    >>> params = {"up": jnp.ones((4, 8)), "bias": jnp.ones((1, 8)), "down": jnp.ones((8, 4))}
    >>> fn = lambda p, x: jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]
    >>> found = scale_pairs(fn)(params, jnp.ones((2, 4)))
    >>> [(pair.name, pair.shape) for pair in found.pairs], dict(found.blocked)
    ([('up | down', (8,))], {'up': 'no scale passes an input of the function'})
    >>> new = found.apply(params, {found.pairs[0]: jnp.full(8, 2.0)})
    >>> float(new["up"][0, 0]), float(new["bias"][0, 0]), float(new["down"][0, 0])
    (0.5, 0.5, 2.0)
    """

    def find_pairs(*args: Any, **kwargs: Any) -> ScalePairs:
        graph = channel_graph(fn, argnums, args, kwargs)
        tree = param_tree(graph, fn, argnums, args, kwargs)
        return _Finder(graph, tree).all()

    return find_pairs


class _Finder:
    def __init__(self, graph: Graph, tree: ParamTree):
        self.graph, self.tree = graph, tree
        self.scalings: dict[frozenset, Scaling] = {}
        self.holders: dict[Leaf, set[int]] = collections.defaultdict(set)
        self.held: list[set[Leaf]] = []
        self.axes = {x for n in graph.nodes for x in map(find, n.layers)}
        for number, dims in enumerate(graph.dims):
            self.held.append({x for t in dims for x in leaves(t)})
            for x in self.held[-1]:
                self.holders[x].add(number)

    def scaling(self, space: Space) -> Scaling:
        key = frozenset(space)
        if key not in self.scalings:
            self.scalings[key] = Scaling(self.graph, space)
        return self.scalings[key]

    def all(self) -> ScalePairs:
        found: dict[Any, ScalePair] = {}
        blocked: dict[str, str] = {}
        sites: dict[str, None] = {}
        names: collections.Counter = collections.Counter()
        self.places: dict[str, tuple[Node, int, Site]] = {}
        for n in self.graph.nodes:
            for i, site in n.plan.sites.items():
                if _reads_input(site):
                    self.places.setdefault(site.name, (n, i, site))
        order = [s.name for s in self.graph.sites if s.name in self.places]
        for name in order:
            sites[name] = None
            for cell in self.cells(*self.places[name]):
                v, scaling, why = self.solution(*self.places[name], cell)
                if v is None:
                    blocked.setdefault(name, why)
                    continue
                key = frozenset(scaling.space), frozenset(v.items())
                if key not in found:
                    pair = self.pair(v, scaling, names)
                    if pair is None:
                        blocked.setdefault(name, "other sites need other powers of its scale")
                        continue
                    found[key] = pair
        return ScalePairs(tuple(found.values()), tuple(sites), blocked, self.tree)

    def cells(self, n: Node, i: int, site: Site) -> Iterable[tuple[int, ...]]:
        """The blocks of the input's channels."""
        dims = n.of(n.jaxpr.eqns[i].invars[_input(site)])
        counts = [range(len(self.graph.blocks(dims[d]))) for d in _channel_axes(site)]
        return itertools.product(*counts)

    def solution(
        self, n: Node, i: int, site: Site, cell: tuple[int, ...]
    ) -> tuple[Form | None, Any, str]:
        """The smallest solution that divides a block of channels by s, or why there is none."""
        dims = n.of(n.jaxpr.eqns[i].invars[_input(site)])
        axes = _channel_axes(site)
        mine = [x for d, c in zip(axes, cell) for x in self.graph.blocks(dims[d])[c].leaves]
        layers = [x for x in map(find, n.layers) if isinstance(x, Leaf)]
        why = "no parameter produces these channels"
        pins = [x.pin or "" for d in axes for x in leaves(dims[d])]
        if "an input" in pins:
            why = "no scale passes an input of the function"
        elif unknown := [p for p in pins if p.startswith("primitive ")]:
            why = f"no scale passes {unknown[0]}"
        if len(set(mine)) < len(mine):
            return None, None, "its input has one axis twice"
        for space in self.spaces(layers, list(mine)):
            scaling = self.scaling(space)
            forms = self.forms(n, i, site, cell, scaling)
            targets = [scaling.solved.reduce(f) for f in forms]
            if not targets or not targets[0] or any(t != targets[0] for t in targets):
                reason = _reason(scaling, forms)
                why = f"no scale passes {reason}" if reason else why
                continue
            best = None
            for order, v in enumerate(scaling.basis):
                x = sum(c * v.get(s, 0) for s, c in forms[0].items())
                rank = sum(s[0] != OWN for s in v), -order
                if x and (best is None or rank < best[0]):
                    best = rank, {s: -c / x for s, c in v.items()}
            if best:
                return best[1], scaling, ""
        return None, None, why

    def spaces(self, layers: list[Leaf], mine: list[Leaf]) -> list[Space]:
        """Axes along which s may vary: those that parameters have, the most first."""
        wanted = [*layers, *mine]
        numbers = set().union(*(self.holders[x] for x in mine)) if mine else set()
        sets = {frozenset(x for x in wanted if x in self.held[k]) for k in numbers}
        sets |= {a & b for a in sets for b in sets}
        sets = {s for s in sets if any(x in s for x in mine)}
        ordered = sorted(
            sets,
            key=lambda s: (-math.prod(x.size for x in s), tuple(x in s for x in wanted)),
        )
        return [tuple(x for x in wanted if x in s) for s in ordered]

    def forms(
        self, n: Node, i: int, site: Site, cell: tuple[int, ...], scaling: Scaling
    ) -> list[Form]:
        """Exponents of the input for a block of its channels."""
        axes = _channel_axes(site)
        reads = scaling.reads.get((n, i))
        E = (reads[_input(site)] if reads else None) or {}
        dims = n.of(n.jaxpr.eqns[i].invars[_input(site)])
        layers = {find(t) for t in n.layers}
        inner = tuple(x for x in scaling.space if x not in layers)
        return [
            E.get((c, slot), {})
            for c, slot in (scaling.slots(dims, inner) if inner else ())
            if tuple(c[d] for d in axes) == cell and all(d in axes for d, _ in slot)
        ]

    # -------------------------------------------------------------- results

    def pair(self, v: Form, scaling: Scaling, names: collections.Counter) -> ScalePair | None:
        space = scaling.space
        axes = self.axes
        layers = tuple(x.size for x in space if x in axes)
        channels = [x for x in space if x not in axes]
        shape = (*layers, math.prod(x.size for x in channels))
        uses = []
        reached = {place for s in v for place in scaling.readers.get(s, ())}
        for n, i in (place for place in scaling.reads if place in reached):
            site = n.plan.sites[i]
            if self.places.get(site.name, (None,))[:2] != (n, i):
                continue
            use = self.use(v, scaling, channels, shape, n, i, site)
            if use is None:
                return None
            if (use.index >= 0).any():
                uses.append(use)
        groups: dict[Any, list] = collections.defaultdict(list)
        for (number, cell, slot), e in ((s, e) for s, e in v.items() if s[0] != OWN):
            groups[number, e, tuple(d for d, _ in slot)].append((cell, slot))
        members = [
            self.member(number, float(e), found, space) for (number, e, _), found in groups.items()
        ]
        members.sort(key=lambda m: m.number)
        producers = tuple(m for m in members if m.exponent < 0)
        consumers = tuple(m for m in members if m.exponent > 0)
        rank = {m: math.prod(self.graph.shapes[m.number]) for m in members}
        sides = [max(ms, key=rank.__getitem__).path for ms in (producers, consumers) if ms]
        name = " | ".join(sides)
        names[name] += 1
        name = f"{name}#{names[name] - 1}" if names[name] > 1 else name
        return ScalePair(name, shape, producers, consumers, tuple(uses), self.tree)

    def member(self, number: int, e: float, found: list, space: Space) -> Member:
        dims = self.graph.dims[number]
        several = {d for d, t in enumerate(dims) if len(self.graph.blocks(t)) > 1}
        carry = {d for _, slot in found for d, _ in slot}
        axes = sorted(several | carry)
        index = np.full([dims[d].size for d in axes], -1, np.int32)
        for cell, slot in found:
            self.fill(index, dims, axes, cell, slot, space)
        for d in sorted(several - carry, reverse=True):
            k = axes.index(d)
            if (index == index.take([0], k)).all():
                index = np.asarray(index.take(0, k))
                axes.remove(d)
        return Member(self.graph.paths[number], tuple(axes), e, index, number)

    def fill(self, index, dims: Dims, axes, cell, slot, space: Sequence[Leaf]) -> None:
        """Writes the flat indices into s of one slot into `index`, over these axes of an array."""
        steps, step = {}, 1
        for x, at in zip(space[::-1], slot[::-1]):
            steps[at] = step
            step *= x.size
        places, total = [], np.zeros((), np.int32)
        for d in axes:
            block = self.graph.blocks(dims[d])[cell[d]]
            place = np.full((), block.offset)
            part = np.zeros((), np.int32)
            for k, (x, stride) in enumerate(zip(block.leaves, block.strides)):
                along = np.arange(x.size, dtype=np.int32)
                place = np.add.outer(place, along * stride)
                part = np.add.outer(part, along * steps.get((d, k), 0))
            places.append(place.ravel())
            total = np.add.outer(total, part.ravel())
        index[np.ix_(*places)] = total

    def use(
        self, v: Form, scaling: Scaling, channels: list, shape: tuple, n: Node, i: int, site: Site
    ) -> Use | None:
        """How a site's input changes; None if it is by another power than x / s."""
        operand, axes = _input(site), _channel_axes(site)
        reads = scaling.reads.get((n, i))
        dims = n.of(n.jaxpr.eqns[i].invars[operand])
        index = np.full([dims[d].size for d in axes], -1, np.int32)
        for (cell, slot), form in ((reads[operand] if reads else None) or {}).items():
            x = sum(c * v.get(s, 0) for s, c in form.items())
            if not x or not all(d in axes for d, _ in slot):
                continue
            if x != -1:
                return None
            self.fill(index, dims, axes, cell, slot, channels)
        batch = site.params["dimension_numbers"][1][operand] if site.op == "dot_general" else ()
        lead = index.shape[: len(batch)]
        layered = [t for t, there in zip(n.layers, site.layered) if there]
        stack = tuple(find(t) in scaling.space for t in layered)
        return Use(site.name, operand, index.reshape(*lead, -1), stack, shape)


def _reads_input(site: Site) -> bool:
    """Whether this is a product of one weight and an input."""
    if site.opaque or site.op == "gather" or len(site.operands) != 2 or len(site.weights) != 1:
        return False
    return not (site.op == "conv_general_dilated" and site.weights[0] == 0)


def _input(site: Site) -> int:
    return 1 - site.weights[0]


def _channel_axes(site: Site) -> tuple[int, ...]:
    """Dimensions of the input that hold its channels: of the batch first, then contracted."""
    k, p = _input(site), site.params
    if site.op == "conv_general_dilated":
        return (p["dimension_numbers"].lhs_spec[1],)
    if site.op == "dot_general":
        return (*p["dimension_numbers"][1][k], *site.contracting(k))
    return site.contracting(k)


def _reason(scaling: Scaling, forms: Sequence[Form]) -> str:
    """What keeps exponents at 0: the nearest constraint that stands for itself."""
    holding: dict[Any, list] = collections.defaultdict(list)
    for zero in scaling.zeros:
        for s in zero.form:
            holding[s].append(zero)
    todo = list(dict.fromkeys(s for f in forms for s in f))
    seen = set(todo)
    while todo:
        ahead = []
        for s in todo:
            for zero in holding[s]:
                if zero.hard:
                    return zero.why
                ahead += [k for k in zero.form if k not in seen]
                seen |= zero.form.keys()
        todo = ahead
    return ""
