# SPDX-License-Identifier: Apache-2.0
"""What folding a norm into the site before it does there, and what it gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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
