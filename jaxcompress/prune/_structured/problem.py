# SPDX-License-Identifier: Apache-2.0
"""A function to be made smaller: its groups, parameters and data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._calibration.stream import Batches
from ..._core.channels import channel_graph
from ..._core.channels.groups import layer_axes, leaf_groups
from ..._core.channels.params import ParamTree, param_tree
from ..._core.channels.slices import slices
from ..._core.patterns import matches, nearest
from ..._errors import RecipeError, SiteError

if TYPE_CHECKING:
    from ..._core.channels import Group
    from ..._core.channels.graph import Graph
    from ..._core.channels.terms import Leaf

LAYERS = "the order of layers"
# What is removed only by name: layers, and what the function chooses among (classes, experts).
BY_NAME = frozenset({LAYERS, "argmax", "argmin", "top_k", "the order of rows"})


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What the scores, the choice and the repair are computed from.

    Attributes:
      fn: a function whose first argument are the parameters.
      params: these.
      inputs: of one call.
      batches: calibration data, or None.
      graph: of that call.
      tree: how the parameters are found in `params`.
      arrays: the parameters by number.
      groups: by axis.
      layers: by axis with other indices in every layer, the axis of the layers.
    """

    fn: Callable
    params: Any
    inputs: tuple
    batches: Batches | None
    graph: Graph
    tree: ParamTree
    arrays: Sequence[Any]
    groups: Mapping[Leaf, Group]
    layers: Mapping[Leaf, Leaf]

    def slices(self, leaf: Leaf, arrays: Sequence | None = None) -> Iterator[Any]:
        """(path, axis, values [size, n] or [layers, size, n]) of every member of a group."""
        values = self.arrays if arrays is None else arrays
        return slices(self.graph, leaf, self.layers.get(leaf), values)

    def data(self, why: str) -> Batches:
        """The calibration data.

        Raises:
          RecipeError: there is none.
        """
        if self.batches is None:
            raise RecipeError(f"{why} needs data: pass calibration=, an iterable of batches.")
        return self.batches

    def find(self, pattern: str) -> list[Leaf]:
        """The groups that a pattern matches and whose indices can be removed.

        Raises:
          SiteError: it matches none, or only pinned ones.
        """
        found = [x for x, g in self.groups.items() if named(pattern, g)]
        free = [x for x in found if self.groups[x].pinned is None]
        if found and not free:
            group = self.groups[found[0]]
            raise SiteError(
                f"keep: {pattern!r} matches only groups whose indices cannot be removed: "
                f"`{group.name}` is pinned by {group.pinned}"
                f"{f', and {len(found) - 1} more' if len(found) > 1 else ''}. "
                "jaxcompress.prune.groups(fn)(params, *inputs) says of each group why."
            )
        if not found:
            known = [str(m) for g in self.groups.values() for m in g.members]
            raise SiteError(
                f"keep: {pattern!r} matches no group. Nearest: {nearest(pattern, known)}. "
                "A group is named by a parameter and an axis, as "
                "jaxcompress.prune.groups(fn)(params, *inputs) lists them."
            )
        return free

    def removable(self) -> list[Leaf]:
        """All groups whose indices can be removed, without those that have to be named.

        Raises:
          SiteError: there are none.
        """
        free = [x for x, g in self.groups.items() if not g.pinned and g.ordered not in BY_NAME]
        if not free:
            why = {g.name: g.pinned for g in self.groups.values() if g.pinned}
            listed = ", ".join(f"`{n}` by {w}" for n, w in list(why.items())[:5])
            raise SiteError(
                f"nothing of this function can be removed: every group is pinned ({listed}). "
                "Inputs and outputs keep their sizes; pass the whole model, not one layer."
            )
        return free


def named(pattern: str, group: Group) -> bool:
    """Whether a pattern matches a member of a group; brackets stand for themselves."""
    if not pattern.startswith("re:"):
        pattern = pattern.replace("[", "[[]")
    return any(
        matches(pattern, name)
        for m in group.members
        for name in (str(m), str(m).replace("/value:", ":"))
    )


def problem(fn: Callable, params: Any, inputs: tuple, calibration: Any) -> Problem:
    """Traces a call and finds its groups."""
    args = (params, *inputs)
    graph = channel_graph(fn, 0, args, {})
    tree = param_tree(graph, fn, 0, args, {})
    arrays = [x if isinstance(x, jax.Array) else np.asarray(x) for x in tree.arrays(params)]
    for path, x in zip(graph.paths, arrays):
        if jnp.issubdtype(x.dtype, jnp.inexact) and not np.isfinite(np.asarray(x)).all():
            raise RecipeError(f"`{path}` has numbers that are NaN or infinite: nothing to compare.")
    batches = None if calibration is None else Batches(calibration)
    return Problem(
        fn, params, inputs, batches, graph, tree, arrays, leaf_groups(graph), layer_axes(graph)
    )
