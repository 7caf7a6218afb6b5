# SPDX-License-Identifier: Apache-2.0
"""RigL: weights grow where the dense gradient is large."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .._errors import RecipeError
from ._distributions import Distribution
from ._link import Pruner
from ._regrow import regrow
from ._schedules import Schedule
from ._targets import Patterns, Targets


def rigl(
    sparsity: float | Schedule,
    *,
    key: int | jax.Array = 0,
    distribution: str | Distribution = "erk",
    every: int = 100,
    end: int | None = None,
    drop: float = 0.3,
    growth: str = "gradients",
    pattern: Patterns = "*",
    exclude: Patterns = (),
    per_layer: Patterns = (),
    min_ndim: int = 2,
) -> Pruner:
    """Starts with a random mask and moves it to where gradients are large.

    Every `every` steps the smallest f n of the n weights of an array are dropped and as many grow
    from zero, those with the largest absolute gradients: f = drop / 2 (1 + cos(pi step / end)),
    or `drop` without an end. Their number never changes.

    The gradients must be dense: `tx.update(gradients, state, params, grads=gradients)`, or
    `jc.prune.chain(optimizer, rigl(...))`, which hands them over and also sets the moments of
    what grows to zero, as the paper does; `optax.chain` cannot.

    Args:
      sparsity: a number in [0, 1), or a function from the step to one.
      key: random key or seed of the first mask.
      distribution: `"erk"` or `"uniform"`, or a function as in `magnitude`.
      every: steps between two changes; none at step 0.
      end: the step from which the masks stay, such as three quarters of the training.
      drop: f at the beginning, in [0, 1).
      growth: `"gradients"`, or `"updates"`: what the optimizer makes of them stands in.
      pattern, exclude, per_layer, min_ndim: as in `magnitude`.

    Raises:
      RecipeError, SiteError: as `magnitude`.
      JaxCompressError: (in `update`) no gradients, or gradients that are zero at all pruned
        weights (seen outside of jit).

    >>> import optax, jaxcompress as jc
    >>> tx = jc.prune.chain(optax.adam(1e-3), rigl(0.75, every=10, end=100))
    >>> jc.prune.sparsity(jc.prune.masks(tx.init({"w": jnp.ones((8, 8))})))
    0.75

    References: Evci et al. 2020, Rigging the Lottery, algorithm 1. There a change of the masks
    takes the place of a step of the optimizer; here weights take that step too. Equal scores are
    told apart by position, not by noise.
    """
    if growth not in ("gradients", "updates"):
        raise RecipeError(f'growth={growth!r}: expected "gradients" or "updates".')
    targets = Targets(pattern, exclude, per_layer, min_ndim)

    def score(targets, step, weights):
        return [jnp.abs(g) for g in weights.gradients]

    return regrow("rigl", score, sparsity, targets, distribution, key, every, end, drop, growth)
