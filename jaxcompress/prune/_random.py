# SPDX-License-Identifier: Apache-2.0
"""Random pruning, the control of every criterion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._allocate import Allocation, key_of, random_scores
from ._distributions import Distribution
from ._link import Pruner, Rule, Weights, pruner
from ._magnitude import due_every
from ._schedules import Schedule, schedule_of
from ._structures import Structure, unstructured
from ._targets import Patterns, Target, Targets


def random(
    sparsity: float | Schedule,
    *,
    key: int | jax.Array = 0,
    distribution: str | Distribution = "uniform",
    structure: Structure = unstructured,
    pattern: Patterns = "*",
    exclude: Patterns = (),
    per_layer: Patterns = (),
    min_ndim: int = 2,
    every: int = 1,
) -> Pruner:
    """Keeps weights that a random key chooses; with a constant sparsity, a static random mask.

    Args:
      sparsity: a number in [0, 1), or a function from the step, counted from 0, to one.
      key: random key, or a seed. The same key gives the same masks.
      distribution, structure, pattern, exclude, per_layer, min_ndim, every: as in `magnitude`.

    Raises:
      RecipeError, SiteError: as `magnitude`.

    >>> import optax, jaxcompress as jc
    >>> tx = optax.chain(optax.sgd(0.0), random(0.75))
    >>> params = {"w": jnp.ones((4, 4))}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> jc.prune.sparsity(optax.apply_updates(params, updates))
    0.75
    """
    allocation = Allocation.of(distribution, structure)

    def choose(
        targets: Sequence[Target], level: Any, step: Any, weights: Weights
    ) -> list[jax.Array]:
        scores = random_scores(key_of(key), targets)
        scores = [jnp.where(m, s, -1) for s, m in zip(scores, weights.masks, strict=True)]
        return allocation.masks(targets, scores, level)

    rule = Rule("random", schedule_of(sparsity), choose, 0.0, due_every(every), allocation.check)
    return pruner(rule, Targets(pattern, exclude, per_layer, min_ndim))
