# SPDX-License-Identifier: Apache-2.0
"""The small function: it traces the original on the original's shapes and emits a smaller one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ..._core.channels import channel_graph
from ..._core.channels.emit import emitted, restricted
from ..._core.channels.groups import leaf_groups
from ..._core.staging import Packed, split
from ..._errors import SiteError
from .problem import Problem

if TYPE_CHECKING:
    from ..._core.channels.terms import Leaf


@dataclasses.dataclass(frozen=True, eq=False)
class Small:
    """A function on parameters that lost indices. It traces the original anew for every call of
    new shapes, so the batch size, dtypes and flags stay free.

    Attributes:
      original: the function.
      shapes: of its parameters, by number.
      kept: by name of a group the indices that stay.
      means: whether the means of norms are those of the channels that stay.
    """

    original: Callable
    shapes: tuple[tuple[int, ...], ...]
    kept: Mapping[str, np.ndarray]
    means: bool

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        call, arrays = split(params)
        found = [tuple(x.shape) for x in arrays]
        if len(found) != len(self.shapes):
            raise SiteError(
                f"the small function takes {len(self.shapes)} parameters, found {len(found)}."
            )
        full = [jax.ShapeDtypeStruct(s, x.dtype) for s, x in zip(self.shapes, arrays)]
        graph = channel_graph(self.original, 0, (call.merge(full), *args), kwargs)
        names = {group.name: x for x, group in leaf_groups(graph).items()}
        indices = {}
        for name, kept in self.kept.items():
            leaf = names.get(name)
            if leaf is None or leaf.pin:
                why = "is no group" if leaf is None else f"is pinned by {leaf.pin}"
                raise SiteError(
                    f"the function was made smaller along `{name}`, which {why} when it is called "
                    "with these arguments. Shrink it with such arguments."
                )
            indices[leaf] = kept
        values = split(((params, *args), kwargs))[1]
        if len(values) != len(graph.inputs):  # the function needs the values of Python's floats
            values = split(((params, *args), kwargs), floats=False)[1]
        return emitted(graph, indices, values, self.means)


def small_function(problem: Problem, kept: Mapping[Leaf, np.ndarray], means: bool) -> Callable:
    """`fn(params, *args, **kwargs)` on restricted parameters, jitted."""
    names = {problem.groups[x].name: indices for x, indices in kept.items()}
    small = Small(problem.fn, tuple(problem.graph.shapes), names, means)

    @jax.jit
    def shrunk(call: Packed) -> Packed:
        args, kwargs = call.unpack()
        return Packed.pack(small(*args, **kwargs))

    def fn(params: Any, *args: Any, **kwargs: Any) -> Any:
        return shrunk(Packed.pack(((params, *args), kwargs))).unpack()

    return fn


def small_params(problem: Problem, kept: Mapping[Leaf, np.ndarray]) -> Any:
    """The parameters without the removed indices."""
    call, _ = problem.tree.split(problem.params)
    small = map(jax.device_put, restricted(problem.graph, kept, problem.arrays))
    return problem.tree.merge(call, list(small))
