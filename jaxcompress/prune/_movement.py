# SPDX-License-Identifier: Apache-2.0
"""Movement pruning: weights that training moves away from zero are kept."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from .._errors import RecipeError
from ._distributions import Distribution
from ._schedules import Schedule
from ._soft import Gate, SoftPruned
from ._ste import selection
from ._structures import unstructured
from ._targets import Patterns, Targets


def movement(
    fn: Callable,
    sparsity: float | Schedule | None = None,
    *,
    threshold: float | None = None,
    distribution: str | Distribution = "global",
    pattern: Patterns = "*",
    exclude: Patterns = (),
    min_ndim: int = 2,
) -> SoftPruned:
    """`fn` of the weights with the largest scores, where scores sum -(dL/dw) w over training.

    A score gets the gradient dL/dw' * w, w' being what was read, through the mask; a weight that is
    read as zero gets none. Hard: the largest scores are kept, as many as `sparsity` leaves. Soft:
    those with sigmoid(score) > `threshold`, and `penalty(held)`, the mean of sigmoid(score), is to
    be added to the loss with a factor that sets the sparsity.

    Args:
      fn: any function whose first argument are the parameters.
      sparsity: hard: a number in [0, 1) or a function from the step, such as `cubic`. All scores
        start at 0, equal, so begin at 0.
      threshold: soft: tau in (0, 1); scores start so that sigmoid(score) is halfway from it to 1.
      distribution, pattern, exclude, min_ndim: as in `magnitude`; by default one threshold.

    Raises:
      RecipeError: none or both of sparsity and threshold, or out of range; when called, a pattern
        that matches nothing.

    >>> loss = movement(lambda w, x: jnp.sum(x @ w), threshold=0.5)
    >>> held = loss.init(jnp.array([[2.0], [3.0]]))
    >>> jax.grad(loss)(held, jnp.array([[5.0, 7.0]])).scores[""].ravel().tolist()
    [10.0, 21.0]

    References: Sanh et al. 2020, Movement Pruning, section 4; soft: its equation 4.
    """
    if (sparsity is None) == (threshold is None):
        raise RecipeError(
            "movement: give either sparsity= (hard: so many weights go) or threshold= (soft: those "
            "whose score is below it go)."
        )
    if threshold is not None and not 0 < threshold < 1:
        raise RecipeError(f"movement(threshold={threshold!r}): it must lie between 0 and 1.")
    masks, check, level = selection(
        "movement", 0.0 if sparsity is None else sparsity, distribution, unstructured, -2
    )
    first = 0.0
    if threshold is not None:
        cut, middle = _logit(threshold), _logit((1 + threshold) / 2)
        first = middle

        def masks(targets, scores, level):
            return [s > cut for s in scores]

    gate = Gate(
        "movement",
        level,
        start=lambda target, w: jnp.full(w.shape, first, jnp.float32),
        masks=lambda targets, weights, scores, level: masks(targets, scores, level),
        forward=lambda w, s, mask, key, target: _moved(w, s, mask),
        harden=lambda w, s, mask, target: jnp.where(mask, w, jnp.zeros((), w.dtype)),
        penalty=None if threshold is None else _mean_sigmoid,
    )
    targets = Targets(pattern, exclude, (), min_ndim)
    return SoftPruned(fn, gate, targets, check, not callable(sparsity))


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


def _mean_sigmoid(scores: list[jax.Array]) -> jax.Array:
    size = sum(s.size for s in scores)
    return sum((jnp.sum(jax.nn.sigmoid(s)) for s in scores), start=jnp.zeros(())) / size


@jax.custom_jvp
def _moved(w: jax.Array, score: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, w, jnp.zeros((), w.dtype))


@_moved.defjvp
def _(primals: tuple, tangents: tuple) -> tuple:
    (w, score, mask), (dw, ds, _) = primals, tangents
    change = jnp.where(mask, dw, jnp.zeros((), dw.dtype)) + (w * ds).astype(dw.dtype)
    return _moved(w, score, mask), change
