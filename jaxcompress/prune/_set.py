# SPDX-License-Identifier: Apache-2.0
"""Sparse evolutionary training: weights grow at random."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ._allocate import key_of, random_scores
from ._distributions import Distribution
from ._link import Pruner
from ._regrow import regrow
from ._schedules import Schedule
from ._targets import Patterns, Targets


def set(
    sparsity: float | Schedule,
    *,
    key: int | jax.Array = 0,
    distribution: str | Distribution = "erk",
    every: int = 100,
    end: int | None = None,
    drop: float = 0.3,
    pattern: Patterns = "*",
    exclude: Patterns = (),
    per_layer: Patterns = (),
    min_ndim: int = 2,
) -> Pruner:
    """As `rigl`, but what grows is chosen at random, so that no dense gradients are needed.

    Args:
      sparsity, distribution, every, end, drop: as in `rigl`.
      key: random key or seed of the first mask and of all that grows.
      pattern, exclude, per_layer, min_ndim: as in `magnitude`.

    Raises:
      RecipeError, SiteError: as `magnitude`.

    >>> import optax, jaxcompress as jc
    >>> tx = optax.chain(optax.adam(1e-3), jc.prune.set(0.75))
    >>> jc.prune.sparsity(jc.prune.masks(tx.init({"w": jnp.ones((8, 8))})))
    0.75

    References: Mocanu et al. 2018; with the cosine of Evci et al. 2020 if there is an `end`.
    """
    targets = Targets(pattern, exclude, per_layer, min_ndim)

    def score(targets, step, weights):
        return random_scores(jax.random.fold_in(key_of(key), step + jnp.uint32(1 << 31)), targets)

    return regrow("set", score, sparsity, targets, distribution, key, every, end, drop)
