# SPDX-License-Identifier: Apache-2.0
"""Scale pairs: what can divide a site's input channels by s while its weight is multiplied by s."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._errors import SiteError
from .. import _compat
from ..arguments import ArgNums
from ..patterns import nearest
from ..sites import Site
from ..tabular import Tabular
from .forms import Form
from .graph import Graph, Node, channel_graph
from .params import ParamTree, param_tree
from .scaling import OWN, Scaling, Space
from .terms import Dims, Leaf, find, leaves


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """A parameter that changes with a scale.

    Attributes:
      path: its key path.
      axes: the axes along which the factors vary.
      exponent: the parameter is multiplied by s**exponent: -1 for most producers, 1 for consumers.
      index: int32 with the sizes of `axes`: flat index into s, -1 where nothing changes.
      number: of the parameter, in the order of the leaves.
    """

    path: str
    axes: tuple[int, ...]
    exponent: float
    index: np.ndarray = dataclasses.field(repr=False)
    number: int = dataclasses.field(repr=False)

    def scaled(self, w: jax.Array, s: jax.Array) -> jax.Array:
        """The parameter times s**exponent, computed in float32 at least."""
        factor = jnp.take(jnp.ravel(s), np.maximum(self.index, 0)) ** self.exponent
        factor = jnp.where(self.index < 0, 1, factor)
        shape = [n if a in self.axes else 1 for a, n in enumerate(w.shape)]
        wide = jnp.promote_types(w.dtype, jnp.float32)
        return (w.astype(wide) * factor.reshape(shape).astype(wide)).astype(w.dtype)

    def absmax(self, w: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """float32[shape]: the largest absolute value for each scale."""
        rest = tuple(a for a in range(w.ndim) if a not in self.axes)
        largest = jnp.max(jnp.abs(w.astype(jnp.float32)), axis=rest)
        return _reduced(largest, self.index, shape, "max")


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """A site whose input becomes x / s.

    Attributes:
      site: its name.
      operand: position of that input among its operands.
      index: int32[*batch, channels]: for every input channel the channel of s, -1 if s does not
        reach it. Channels are the contracted dimensions of a matmul in its order, and the input
        channels of a convolution.
      stack: for every size in `Site.stack`, whether s has that axis of layers.
      shape: of s.
    """

    site: str
    operand: int
    index: np.ndarray = dataclasses.field(repr=False)
    stack: tuple[bool, ...]
    shape: tuple[int, ...]

    def pool(self, x: jax.Array, reduce: str = "max") -> jax.Array:
        """Statistics of the channels, float[*site.stack, *batch, channels], for each scale.

        Args:
          x: the statistics.
          reduce: `"max"`, `"min"`, `"sum"` or `"mean"` over channels (and layers) with one scale.

        Returns:
          float[shape of s].
        """
        lead = jnp.shape(x)[: len(self.stack)]
        return _reduced(jnp.asarray(x), self._flat(lead), self.shape, reduce)

    def spread(self, s: jax.Array) -> jax.Array:
        """s for every input channel, float[*stack, *batch, channels]; 1 where it does not reach.

        Axes of the stack that s does not have are 1 long.
        """
        sizes = iter(self.shape[:-1])
        index = self._flat([next(sizes) if layer else 1 for layer in self.stack])
        return jnp.where(index < 0, 1, jnp.take(jnp.ravel(s), np.maximum(index, 0)))

    def _flat(self, lead: Sequence[int]) -> np.ndarray:
        """Flat indices into s, int32[*lead, *batch, channels]."""
        layer = np.zeros((1,) * len(lead), np.int32)
        for j, (n, there) in enumerate(zip(lead, self.stack, strict=True)):
            if there:
                sizes = [n if k == j else 1 for k in range(len(lead))]
                layer = layer * n + np.arange(n, dtype=np.int32).reshape(sizes)
        layer = layer.reshape(*layer.shape, *(1,) * self.index.ndim)
        index = np.where(self.index < 0, -1, layer * self.shape[-1] + self.index)
        return np.broadcast_to(index, (*lead, *self.index.shape))


def _reduced(x: jax.Array, index: np.ndarray, shape: tuple[int, ...], reduce: str) -> jax.Array:
    """Values with the same index reduced to one; those with index -1 are left out."""
    kinds = {
        "max": jax.ops.segment_max,
        "min": jax.ops.segment_min,
        "sum": jax.ops.segment_sum,
        "mean": jax.ops.segment_sum,
    }
    if reduce not in kinds:
        raise SiteError(f"reduce={reduce!r}: expected one of {sorted(kinds)}.")
    there = np.flatnonzero(index.ravel() >= 0)
    where, count = index.ravel()[there], math.prod(shape)
    out = kinds[reduce](jnp.ravel(x)[there], where, count)
    if reduce == "mean":
        out = out / np.maximum(np.bincount(where, minlength=count), 1)
    return out.reshape(shape)


@dataclasses.dataclass(frozen=True, eq=False)
class ScalePair:
    """Producers divided by s and consumers multiplied by s: the function stays the same.

    Attributes:
      name: of the first producer and the first consumer.
      shape: of s, (*layers, channels).
      producers, consumers: the parameters with negative and with positive exponents.
      uses: the sites whose input is divided by s.
    """

    name: str
    shape: tuple[int, ...]
    producers: tuple[Member, ...]
    consumers: tuple[Member, ...]
    uses: tuple[Use, ...]
    tree: ParamTree = dataclasses.field(repr=False)

    @property
    def layers(self) -> tuple[int, ...]:
        """Sizes of the scans over layers in which s differs from layer to layer."""
        return self.shape[:-1]

    @property
    def channels(self) -> int:
        """Number of scales in a layer."""
        return self.shape[-1]

    def apply(self, params: Any, s: Any) -> Any:
        """New parameters for positive scales s, float[shape]."""
        return _apply(self.tree, params, {self: s})

    def absmax(self, params: Any) -> dict[Member, jax.Array]:
        """For every member the largest absolute value for each scale, float32[shape]."""
        flat = self.tree.arrays(params)
        members = (*self.producers, *self.consumers)
        return {m: m.absmax(jnp.asarray(flat[m.number]), self.shape) for m in members}


@dataclasses.dataclass(frozen=True, eq=False)
class ScalePairs(Tabular):
    """The scale pairs of a function; prints as a table.

    Attributes:
      pairs: all of them, in program order; independent of each other.
      sites: names of the sites with a weight and an input, in program order.
      blocked: {site: why (a part of) its input channels cannot be scaled}.
    """

    pairs: tuple[ScalePair, ...]
    sites: tuple[str, ...]
    blocked: Mapping[str, str]
    tree: ParamTree = dataclasses.field(repr=False)

    def of(self, site: str) -> tuple[ScalePair, ...]:
        """The pairs that scale input channels of a site.

        Raises:
          SiteError: there is no such site.
        """
        if site not in self.sites:
            raise SiteError(
                f"scale pairs: `{site}` is no site with a weight and an input. Nearest: "
                f"{nearest(site, self.sites)}."
            )
        return tuple(p for p in self.pairs if any(use.site == site for use in p.uses))

    def apply(self, params: Any, scales: Mapping[ScalePair, Any]) -> Any:
        """New parameters for positive scales float[pair.shape]; the function stays the same.

        Raises:
          SiteError: other parameters, a QTensor, scales of another shape or not positive.
        """
        return _apply(self.tree, params, scales)

    @property
    def title(self) -> str:
        return f"{len(self.pairs)} scale pairs at {len(self.sites)} sites"

    @property
    def columns(self) -> Sequence[tuple[str, bool]]:
        return (("site", False), ("divided by s", False), ("multiplied by s", False), ("s", False))

    @property
    def cells(self) -> Sequence[Sequence[str]]:
        rows = []
        for site in self.sites:
            for pair in self.of(site):
                sides = [", ".join(map(_shown, ms)) for ms in (pair.producers, pair.consumers)]
                rows.append((site, *sides, "x".join(map(str, pair.shape))))
            if site in self.blocked:
                rows.append((site, self.blocked[site], "", ""))
        return rows


def _shown(m: Member) -> str:
    power = f" ^{m.exponent:g}" if abs(m.exponent) != 1 else ""
    return f"{m.path}:{','.join(map(str, m.axes))}{power}"


def _apply(tree: ParamTree, params: Any, scales: Mapping[ScalePair, Any]) -> Any:
    call, flat = tree.split(params)
    flat = [jnp.asarray(x) for x in flat]
    for pair, s in scales.items():
        s = jnp.asarray(s)
        if s.shape != pair.shape:
            raise SiteError(
                f"the scales of `{pair.name}` have shape {list(s.shape)}; expected "
                f"{list(pair.shape)}."
            )
        if not isinstance(s, _compat.Tracer) and not bool(jnp.all((s > 0) & jnp.isfinite(s))):
            raise SiteError(
                f"the scales of `{pair.name}` must be positive and finite; the smallest is "
                f"{float(jnp.min(s))}. Clip them, such as jnp.maximum(s, 1e-5)."
            )
        for m in (*pair.producers, *pair.consumers):
            flat[m.number] = m.scaled(flat[m.number], s)
    return tree.merge(call, flat)


# ------------------------------------------------------------------ finding them


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
