# SPDX-License-Identifier: Apache-2.0
"""How many indices of which groups stay, and which: counts, fractions or the indices themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..._errors import RecipeError
from .problem import Problem

if TYPE_CHECKING:
    from ..._core.channels import Group
    from ..._core.channels.terms import Leaf

Scores = Callable[["Leaf"], np.ndarray]  # float[size] or float[layers, size]


def wanted(problem: Problem, keep: Any) -> dict[Leaf, Any]:
    """By group what is to be kept of it: a fraction, a count, or indices.

    The first pattern that matches a group decides, as in a recipe.
    """
    if not isinstance(keep, Mapping):
        return dict.fromkeys(problem.removable(), keep)
    if not keep:
        raise RecipeError("keep={} removes nothing: give a pattern, such as {'*/up:1': 0.5}.")
    found: dict[Leaf, Any] = {}
    for pattern, how in keep.items():
        for leaf in problem.find(pattern):
            found.setdefault(leaf, how)
    return found


def chosen(
    problem: Problem, wanted: Mapping[Leaf, Any], scores: Scores, round_to: int
) -> dict[Leaf, np.ndarray]:
    """By group the indices that stay, sorted: int[count] or int[layers, count]."""
    out = {}
    for leaf, how in wanted.items():
        kept = check(how, problem.groups[leaf], round_to)
        if not isinstance(kept, int):
            out[leaf] = kept
        elif kept < leaf.size:
            out[leaf] = best(scores(leaf), kept)
    return {x: kept for x, kept in out.items() if kept.shape[-1] < x.size}


def needs_scores(how: Any) -> bool:
    """Whether the indices that stay have to be chosen."""
    return not np.ndim(how)


def check(how: Any, group: Group, round_to: int) -> int | np.ndarray:
    """How many indices of a group stay, or which.

    Raises:
      RecipeError: it is neither a fraction, nor a count, nor indices of the group.
    """
    return counted(how, group, round_to) if needs_scores(how) else _indices(how, group)


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """The indices of the highest scores, in their order; of equal scores the first stay."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    return np.sort(order[..., :count], -1)


def counted(how: Any, group: Group, round_to: int) -> int:
    """How many indices of a group stay.

    Raises:
      RecipeError: it is no fraction in (0, 1] and no count up to the size.
    """
    number = isinstance(how, (int, float, np.integer, np.floating)) and not isinstance(how, bool)
    if number and isinstance(how, (int, np.integer)) and 1 <= how <= group.size:
        count = int(how)
    elif number and isinstance(how, (float, np.floating)) and 0 < how <= 1:
        count = max(1, round(group.size * float(how)))
    else:
        raise RecipeError(
            f"keep={how!r} for the group of `{group.name}`, which has {group.size} indices: give a "
            f"fraction in (0, 1], a count from 1 to {group.size}, or the indices that stay."
        )
    return rounded(count, group.size, round_to)


def rounded(count: int, size: int, round_to: int) -> int:
    """The nearest multiple, at least one and at most the size."""
    return min(size, max(round_to, round(count / round_to) * round_to))


def check_round_to(round_to: Any) -> int:
    """Raises RecipeError unless it is a whole number from 1."""
    if not isinstance(round_to, int) or isinstance(round_to, bool) or round_to < 1:
        raise RecipeError(f"round_to={round_to!r}: expected a whole number from 1, such as 8.")
    return round_to


def _indices(how: Any, group: Group) -> np.ndarray:
    kept = np.asarray(how)
    shapes = [()] + ([(group.layers,)] if group.layers else [])
    if kept.size and np.issubdtype(kept.dtype, np.integer) and kept.shape[:-1] in shapes:
        kept = np.sort(kept, -1)
        inside = kept.min() >= 0 and kept.max() < group.size
        if inside and (np.diff(kept, axis=-1) > 0).all():
            return kept
    per_layer = f", or one such row for each of its {group.layers} layers" if group.layers else ""
    shared = "" if group.layers or kept.ndim < 2 else (
        " Its layers share their indices: an array that all of them read has this axis."
    )  # fmt: skip
    raise RecipeError(
        f"keep: indices {list(kept.shape)} do not fit the group of `{group.name}`: expected "
        f"distinct whole numbers from 0 to {group.size - 1}{per_layer}.{shared}"
    )
