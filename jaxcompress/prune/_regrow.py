# SPDX-License-Identifier: Apache-2.0
"""Sparse from the first step to the last: drop the smallest weights, let others grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._errors import RecipeError
from ._allocate import Allocation, key_of, random_scores
from ._distributions import Distribution
from ._link import Pruner, Rule, Weights, pruner
from ._magnitude import due_every, surviving
from ._schedules import Schedule, checked, schedule_of
from ._targets import Target, Targets


def regrow(
    name: str,
    score: Callable[[Sequence[Target], Any, Weights], Sequence[jax.Array]],
    sparsity: float | Schedule,
    targets: Targets,
    distribution: str | Distribution,
    key: int | jax.Array,
    every: int,
    end: int | None,
    drop: float,
    gradients: str = "",
) -> Pruner:
    """A pruner that keeps the number of weights and exchanges some of them.

    Of the n weights that there are, n - floor(f n) with the largest absolute values are kept, and
    floor(f n) of the others grow, those with the largest `score(targets, step, weights)`; what
    was dropped just now may grow again and keeps its value.
    """
    allocation = Allocation.of(distribution)
    if allocation.distribution is None:
        raise RecipeError(
            f'{name}: distribution="global" compares weights, and these start at random. '
            'Use "erk" or "uniform".'
        )
    schedule, drop = schedule_of(sparsity), checked("drop", drop)
    if end is not None and end < 1:
        raise RecipeError(f"{name}(end={end}): masks stop to change before they begin.")
    often = due_every(every)

    def first(targets: Sequence[Target]) -> list[jax.Array]:
        return allocation.masks(targets, random_scores(key_of(key), targets), schedule(0))

    def due(step: Any) -> Any:
        return often(step) if end is None else often(step) & (step < end)

    def choose(targets: Sequence[Target], _: Any, step: Any, weights: Weights) -> list[jax.Array]:
        part = jnp.float32(drop)
        if end is not None:
            part = part / 2 * (1 + jnp.cos(jnp.pi * step / end).astype(jnp.float32))
        counts = allocation.kept(targets, schedule(step))
        scores, out = score(targets, step, weights), []
        for t, x, s, n in zip(targets, surviving(weights), scores, counts, strict=True):
            new = jnp.floor(part * n).astype(jnp.int32)
            kept = allocation.top(t, x, n - new)
            out.append(kept | allocation.top(t, jnp.where(kept, -1, s.astype(jnp.float32)), new))
        return out

    rule = Rule(name, lambda step: step, choose, 0.0, due, allocation.check, first, True, gradients)
    return pruner(rule, targets)
