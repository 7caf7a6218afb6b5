# SPDX-License-Identifier: Apache-2.0
"""What folding a norm into the site before it does there, and what it gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _compat
from ..sites import Site
from ..tabular import Tabular
from .graph import Node


class Step(NamedTuple):
    """An equation of a chain, and which operand comes from the site."""

    index: int
    operand: int


@dataclasses.dataclass(frozen=True, eq=False)
class Fold:
    """What is done at one site.

    Attributes:
      node, index: the site's equation.
      weight: number of the parameter that is its weight.
      steps: the chain behind it.
      shift: the step that adds the parameter which takes the shift, and that parameter's number;
        None if the chain only multiplies.
      norm: numbers of all parameters of the chain.
    """

    site: Site
    node: Node
    index: int
    weight: int
    steps: tuple[Step, ...]
    shift: tuple[Step, int] | None
    norm: frozenset[int]

    @property
    def start(self) -> Any:
        return self.node.jaxpr.eqns[self.index].outvars[0]

    @property
    def end(self) -> Any:
        return self.node.jaxpr.eqns[self.steps[-1].index].outvars[0]


@dataclasses.dataclass(frozen=True, eq=False)
class FoldedNorm(Tabular):
    """A function without the normalizations that could be folded; prints as a table.

    Attributes:
      fn: a function with the signature of the original one.
      params: what stands at argnums, same tree and shapes.
      folded: {site: key paths of the parameters of its norm}.
      kept: {site: why nothing was folded into it}.
    """

    fn: Callable
    params: Any
    folded: Mapping[str, tuple[str, ...]]
    kept: Mapping[str, str]

    @property
    def title(self) -> str:
        return f"{len(self.folded)} norms folded, {len(self.kept)} sites left as they were"

    @property
    def columns(self) -> Sequence[tuple[str, bool]]:
        return (("site", False), ("folded into it, or why not", False))

    @property
    def cells(self) -> Sequence[Sequence[str]]:
        rows = [(site, ", ".join(paths)) for site, paths in self.folded.items()]
        return [*rows, *self.kept.items()]


def output_channels(site: Site) -> tuple[int, ...]:
    """Dimensions of the result that come from the weight alone."""
    k, p = site.weights[0], site.params
    if site.op == "conv_general_dilated":
        return (p["dimension_numbers"].out_spec[1],)
    (contract, batch) = p["dimension_numbers"]
    free = len(site.operands[k].shape) - len(contract[k]) - len(batch[k])
    rank = len(site.out_avals[0].shape)
    own = range(rank - free, rank) if k else range(len(batch[0]), len(batch[0]) + free)
    return (*range(len(batch[0])), *own)


def on_weight(site: Site, scale: np.ndarray) -> np.ndarray:
    """Factors of the output channels in the shape of the weight operand."""
    k, p = site.weights[0], site.params
    shape = site.operands[k].shape
    if site.op == "conv_general_dilated":
        dims = [p["dimension_numbers"].rhs_spec[0]]
    else:
        contract, batch = p["dimension_numbers"]
        free = [d for d in range(len(shape)) if d not in (*contract[k], *batch[k])]
        dims = [*batch[k], *free]
    moved = np.transpose(scale, np.argsort(np.asarray(dims, int)))
    return np.broadcast_to(
        moved.reshape([n if d in dims else 1 for d, n in enumerate(shape)]), shape
    )


def written(w: jax.Array, read: Any, values: np.ndarray, multiply: bool) -> jax.Array | None:
    """A parameter that reads as `values`, or as itself times `values`; None if none does."""
    index = jnp.arange(w.size).reshape(w.shape)
    for eqn in read[1]:
        if eqn.primitive.name != "convert_element_type":
            (index,) = _compat.bind(eqn, [index])
    flat = np.ones(w.size, np.asarray(values).dtype)
    flat[np.asarray(index).ravel()] = np.ravel(values)
    if not np.array_equal(flat[np.asarray(index)], values):
        return None
    wide = jnp.promote_types(w.dtype, jnp.float32)
    x = jnp.asarray(flat).reshape(w.shape).astype(wide)
    return (w.astype(wide) * x if multiply else x).astype(w.dtype)
