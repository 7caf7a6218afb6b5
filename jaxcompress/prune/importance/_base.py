# SPDX-License-Identifier: Apache-2.0
"""What an importance is, and those that are known by a name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..._errors import RecipeError

if TYPE_CHECKING:
    from ..._core.channels.terms import Leaf
    from .._structured.problem import Problem

Measure = Callable[["Leaf"], Any]  # float[size] or float[layers, size]


@dataclasses.dataclass(frozen=True, eq=False)
class Importance:
    """A way to score indices of groups.

    Attributes:
      name: of the method.
      prepare: `prepare(problem, leaves)` computes what all these groups need (gradients, norms of
        activations) and returns a function of a group.
    """

    name: str
    prepare: Callable[[Problem, list[Leaf]], Measure]


def get(importance: Any) -> Importance:
    """An importance by its name; a function `f(group, params) -> float[size]` as it is.

    Raises:
      RecipeError: there is none of that name.
    """
    from . import activation, fpgm, l1, l2, obs, wanda

    named = {f.__name__: f for f in (l1, l2, fpgm, activation, wanda, obs)}
    if isinstance(importance, Importance):
        return importance
    if isinstance(importance, str) and importance in named:
        return named[importance]()
    if callable(importance) and not isinstance(importance, str):
        return _of_user(importance)
    raise RecipeError(
        f"importance={importance!r}: expected one of {sorted(named)}, a function f(group, params), "
        "or what jaxcompress.prune.importance makes: taylor(loss), gamma(pattern), random(key)."
    )


def _of_user(fn: Callable) -> Importance:
    def prepare(problem: Problem, leaves: list[Leaf]) -> Measure:
        return lambda leaf: fn(problem.groups[leaf], problem.params)

    return Importance(getattr(fn, "__name__", "user"), prepare)


def measured(problem: Problem, importance: Importance, leaves: list[Leaf]) -> Measure:
    """The scores of groups, each divided by their mean so that groups can be compared.

    Raises:
      RecipeError: they have another shape, or are not finite.
    """
    measure = importance.prepare(problem, leaves)
    known: dict[Leaf, np.ndarray] = {}

    def scores(leaf: Leaf) -> np.ndarray:
        if leaf not in known:
            known[leaf] = _checked(problem, importance, leaf, measure(leaf))
        return known[leaf]

    return scores


def _checked(problem: Problem, importance: Importance, leaf: Leaf, found: Any) -> np.ndarray:
    group = problem.groups[leaf]
    scores = np.asarray(found, np.float64)
    shapes = [(leaf.size,)] + ([(group.layers, leaf.size)] if group.layers else [])
    if scores.shape not in shapes or not np.isfinite(scores).all():
        problems = "NaN or infinite" if scores.shape in shapes else f"of shape {scores.shape}"
        raise RecipeError(
            f"importance {importance.name}: the scores of the group of `{group.name}` are "
            f"{problems}; expected finite numbers of shape {' or '.join(map(str, shapes))}."
        )
    mean = np.abs(scores).mean()
    return scores / mean if mean > 0 else scores
