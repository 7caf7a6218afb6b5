# SPDX-License-Identifier: Apache-2.0
"""Coupled groups: indices of parameters that are removed or permuted together, or not at all."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np

from .graph import Graph
from .terms import Leaf, find, leaves


@dataclasses.dataclass(frozen=True)
class GroupMember:
    """Where a group lies in a parameter.

    Index i of the group is, along `axis`, at offset + i * stride, and at the same places of every
    index of the other groups that it is merged with there.

    Attributes:
      path: key path of the parameter.
      axis: of the parameter.
      offset, stride: as above.
      others: (size, stride) of the groups that it is merged with.
      whole: whether the group is all of that axis.
    """

    path: str
    axis: int
    offset: int
    stride: int
    others: tuple[tuple[int, int], ...]
    whole: bool

    def positions(self, size: int) -> np.ndarray:
        """int[size, count]: the positions along `axis` of every index of a group of this size."""
        places = self.offset + self.stride * np.arange(size)
        for n, stride in self.others:
            places = np.add.outer(places, stride * np.arange(n))
        return places.reshape(size, -1)

    def __str__(self) -> str:
        place = "" if self.whole else f"[{self.offset}::{self.stride}]"
        return f"{self.path}:{self.axis}{place}"


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Indices that belong together, in all parameters that have them.

    Attributes:
      name: of the first member.
      size: number of indices.
      members: where they are.
      layers: length of the scan in each of whose layers other indices may be chosen; None if they
        are shared.
      pinned: why no index can be removed; None if any can.
      mixed: something reduces over the group without weights (the mean of a norm).
      ordered: what makes index i differ from index j beside the parameters: layers that follow one
        another, a constant or an iota that has the axis. None if the function stays the same
        when the indices of all members are permuted.
    """

    name: str
    size: int
    members: tuple[GroupMember, ...]
    layers: int | None
    pinned: str | None
    mixed: bool
    ordered: str | None


def coupled_groups(graph: Graph) -> tuple[Group, ...]:
    """All groups of the parameters of a function, in the order of the parameters."""
    return tuple(leaf_groups(graph).values())


def leaf_groups(graph: Graph) -> dict[Leaf, Group]:
    """These groups by the axis that each of them is."""
    found: dict[Leaf, list[GroupMember]] = {}
    for path, dims in zip(graph.paths, graph.dims):
        for axis, t in enumerate(dims):
            for block in graph.blocks(t):
                sizes = [(x.size, stride) for x, stride in zip(block.leaves, block.strides)]
                for k, x in enumerate(block.leaves):
                    others, whole = (*sizes[:k], *sizes[k + 1 :]), x.size == t.size
                    place = block.offset, block.strides[k]
                    found.setdefault(x, []).append(GroupMember(path, axis, *place, others, whole))
    layers, ordered = layer_axes(graph), _ordered(graph)
    return {
        x: Group(
            str(members[0]),
            x.size,
            tuple(members),
            layers[x].size if x in layers else None,
            x.pin,
            x.mixed,
            ordered.get(x),
        )
        for x, members in found.items()
    }


def _scans(graph: Graph) -> set[Leaf]:
    return {x for n in graph.nodes for t in n.layers for x in leaves(t)}


def layer_axes(graph: Graph) -> dict[Leaf, Leaf]:
    """By leaf the axis of layers in each of which it may keep other indices.

    Every array with the leaf must live in that scan or be stacked along it.
    """
    axes = _scans(graph)
    if not axes:
        return {}
    common: dict[Leaf, frozenset[Leaf]] = {}
    held: dict[tuple, frozenset[Leaf]] = {}
    for n in graph.nodes:
        under = frozenset(x for x in map(find, n.layers) if isinstance(x, Leaf))
        shared = {*n.jaxpr.constvars}
        shared |= {v for e in n.jaxpr.eqns if e.primitive.name == "iota" for v in e.outvars}
        for v, dims in n.dims.items():
            key = tuple(map(id, dims))
            if key not in held:
                held[key] = frozenset(x for t in dims for x in leaves(t))
            here = held[key]
            around = (here & axes) | (frozenset() if v in shared else under)
            for x in here:
                mine = around - {x}
                common[x] = common[x] & mine if x in common else mine
    return {
        x: min(shared, key=lambda a: a.size)
        for x, shared in common.items()
        if shared and x not in axes
    }


def _ordered(graph: Graph) -> dict[Leaf, str]:
    """What makes the indices of a leaf differ beside the parameters."""
    why: dict[Leaf, str] = collections.defaultdict(str)
    for n in graph.nodes:
        made: list[tuple[str, Any]] = [("a constant", v) for v in n.jaxpr.constvars]
        for eqn in n.jaxpr.eqns:
            name, out = eqn.primitive.name, eqn.outvars[0] if eqn.outvars else None
            if name == "iota":
                axis = n.dims[out][eqn.params["dimension"]]
                for x in leaves(axis):
                    why[x] = why[x] or "iota"
            elif name.startswith("random_"):
                made.append((name, out))
            elif name in ("argmax", "argmin", "top_k"):
                axis = (eqn.params.get("axes") or (eqn.params.get("axis", -1),))[0]
                for x in leaves(n.of(eqn.invars[0])[axis]):
                    why[x] = name
            elif name.startswith("ragged_dot"):
                for x in (x for t in n.of(eqn.invars[2]) for x in leaves(t)):
                    why[x] = "the order of rows"
        for text, v in made:
            if n.known(v) is None:
                for t in n.dims[v]:
                    for x in leaves(t):
                        why[x] = why[x] or text
    for x in _scans(graph):
        why[x] = "the order of layers"
    return dict(why)
