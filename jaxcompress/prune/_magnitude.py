# SPDX-License-Identifier: Apache-2.0
"""Magnitude pruning, at once or gradually."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._errors import RecipeError
from ._allocate import Allocation
from ._distributions import Distribution
from ._link import Pruner, Rule, Weights, pruner
from ._schedules import Schedule, schedule_of
from ._structures import Structure, unstructured
from ._targets import Patterns, Target, Targets


def magnitude(
    sparsity: float | Schedule,
    *,
    distribution: str | Distribution = "uniform",
    structure: Structure = unstructured,
    pattern: Patterns = "*",
    exclude: Patterns = (),
    per_layer: Patterns = (),
    min_ndim: int = 2,
    every: int = 1,
) -> Pruner:
    """Keeps the weights of largest absolute value; the last link of a chain of optax.

    At steps whose number `every` divides, the weights as they will be after the update are
    compared, and the smallest ones become zero, exactly as many as the schedule says (rounded
    half to even); equal ones go from the end of the array. What is zero stays zero.

    Args:
      sparsity: a number in [0, 1), or a function from the step, counted from 0, to one.
      distribution: how sparsity is shared out among the arrays: `"uniform"`, `"erk"`,
        `"global"` (one threshold over all), or a function from (shapes, sparsity) to a list.
      structure: what is pruned together: `unstructured`, `blocks(r, c)`, `channels(axis)`;
        units are compared by their mean absolute value.
      pattern: which arrays, by key path: a glob, a `re:` regular expression, or several.
      exclude: which of them not.
      per_layer: which are stacks of layers `[L, ...]` with a count for each layer.
      min_ndim: arrays with fewer axes (of one layer) are left alone: biases and norms.
      every: steps between two choices.

    Returns:
      An optax transformation with the state `PruneState`; `jc.prune.masks` reads it.

    Raises:
      RecipeError: a sparsity outside [0, 1), and (in `init`) a pattern that matches nothing.
      SiteError: (in `init`) units that do not divide an array.

    >>> import optax
    >>> tx = optax.chain(optax.sgd(0.0), magnitude(0.5))
    >>> params = {"w": jnp.array([[1.0, -4.0], [3.0, 2.0]]), "b": jnp.ones(2)}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].tolist()
    [[0.0, -4.0], [3.0, 0.0]]

    References: Han et al. 2015; Zhu and Gupta 2017 for `sparsity=cubic(...)`.
    """
    allocation = Allocation.of(distribution, structure)

    def choose(
        targets: Sequence[Target], level: Any, step: Any, weights: Weights
    ) -> list[jax.Array]:
        return allocation.masks(targets, surviving(weights), level)

    rule = Rule("magnitude", schedule_of(sparsity), choose, 0.0, due_every(every), allocation.check)
    return pruner(rule, Targets(pattern, exclude, per_layer, min_ndim))


def surviving(weights: Weights) -> list[jax.Array]:
    """Absolute values; -1, less than any of them, for what is pruned already."""
    return [
        jnp.where(mask, jnp.abs(x), jnp.array(-1, x.dtype))
        for x, mask in zip(weights.values, weights.masks, strict=True)
    ]


def due_every(every: int) -> Any:
    """Whether a step is one at which masks are chosen.

    Raises:
      RecipeError: `every` is not a positive integer.
    """
    if not isinstance(every, int) or every < 1:
        raise RecipeError(f"every={every!r}: expected a number of steps, at least 1.")
    return lambda step: step % every == 0
