# SPDX-License-Identifier: Apache-2.0
"""One budget for all groups: the least important indices leave until it is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..._core.channels.kept import Kept
from ..._core.channels.slices import flops, stored_bytes
from ..._errors import RecipeError
from .._budget import Budget
from .choice import Scores, best, rounded
from .problem import Problem

if TYPE_CHECKING:
    from ..._core.channels.terms import Leaf


def within(
    problem: Problem, limit: Budget, scores: Scores, round_to: int, build: Callable
) -> dict[Leaf, np.ndarray]:
    """By group the indices that stay so that the limit is met, with as many as possible.

    Args:
      build: `build(kept) -> (fn, params)`, for latencies.

    Raises:
      RecipeError: it cannot be met; says how near one comes.
    """
    patterns = (limit.pattern,) if isinstance(limit.pattern, str) else limit.pattern
    members = problem.removable() if patterns == ("*",) else None
    if members is None:
        members = list(dict.fromkeys(x for p in patterns for x in problem.find(p)))
    values = {x: scores(x) for x in members}
    # The n-th index that a group loses costs the n-th lowest score, averaged over its layers.
    ranked = {x: np.sort(v, -1).reshape(-1, x.size).mean(0) for x, v in values.items()}
    floor = {x: rounded(int(np.ceil(limit.least * x.size)), x.size, round_to) for x in members}
    order = sorted(
        (float(s), k, n)
        for k, x in enumerate(members)
        for n, s in enumerate(ranked[x][: x.size - floor[x]])
    )

    def kept(removed: int) -> dict[Leaf, np.ndarray]:
        lost = np.bincount([k for _, k, _ in order[:removed]], minlength=len(members))
        counts = {
            x: max(floor[x], rounded(x.size - int(n), x.size, round_to))
            for x, n in zip(members, lost)
        }
        return {x: best(values[x], n) for x, n in counts.items() if n < x.size}

    cost, target, unit = _cost(problem, limit, build)
    smallest = cost(kept(len(order)))
    if smallest > target:
        raise RecipeError(
            f"budget: {target:,.6g} {unit} cannot be met; the least that these groups reach is "
            f"{smallest:,.6g} (the original has {cost({}):,.6g}). Raise the limit, lower least=, "
            "or let more groups lose indices."
        )
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if cost(kept(middle)) <= target:
            high = middle
        else:
            low = middle + 1
    return kept(high)


def _cost(
    problem: Problem, limit: Budget, build: Callable
) -> tuple[Callable[[Mapping[Leaf, np.ndarray]], float], float, str]:
    def of(measure: Callable[[Kept], int]) -> Callable:
        return lambda kept: measure(Kept(kept, problem.layers))

    def target(x: int | float, cost: Callable) -> float:
        return x * cost({}) if isinstance(x, float) else x

    if limit.latency is not None:
        measure, most = limit.latency
        return lambda kept: float(measure(*build(kept))), float(most), "of latency"
    if limit.flops is not None:
        cost = of(lambda kept: flops(problem.graph, kept))
        return cost, target(limit.flops, cost), "flops"
    assert limit.bytes is not None
    cost = of(lambda kept: stored_bytes(problem.graph, kept, problem.arrays))
    return cost, target(limit.bytes, cost), "bytes"
