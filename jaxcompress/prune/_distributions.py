# SPDX-License-Identifier: Apache-2.0
"""How the sparsity of a model is shared out among its arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from .._errors import RecipeError

Shapes = Sequence[tuple[int, ...]]
Distribution = Callable[[Shapes, Any], Sequence[Any]]


def uniform(shapes: Shapes, sparsity: Any) -> list[Any]:
    """The same sparsity everywhere.

    >>> uniform([(8, 4), (4, 2)], 0.5)
    [0.5, 0.5]
    """
    return [sparsity] * len(shapes)


def erk(shapes: Shapes, sparsity: Any, *, kernel: bool = True, power: float = 1.0) -> list[Any]:
    """Erdős-Rényi: arrays with few weights for their inputs and outputs are pruned less.

    The density of an array is epsilon (sum(shape) / prod(shape))^power with one epsilon for all,
    such that the whole has the sparsity asked for. Where that exceeds 1 the array stays dense and
    the others make up for it.

    Args:
      shapes: of the arrays.
      sparsity: of all their weights together, a number or float32[].
      kernel: count all axes (ERK); else the last two, inputs and outputs (ER).
      power: exponent of the formula.

    Returns:
      The sparsity of each, numbers or float32[] as `sparsity` is.

    >>> [round(s, 2) for s in erk([(2, 4), (3, 6), (2, 4, 6)], 0.5)]
    [0.0, 0.31, 0.65]

    References: Evci et al. 2020, Rigging the Lottery, section 3 (1); Mocanu et al. 2018. As in
    their code, the array with the highest density is made dense first.
    """
    axes = [shape if kernel else shape[-2:] for shape in shapes]
    raw = np.array([(sum(shape) / math.prod(shape)) ** power for shape in axes])
    size = np.array([float(math.prod(shape)) for shape in shapes])
    static = isinstance(sparsity, (int, float))
    xp: Any = np if static else jnp
    if not static:
        raw, size = raw.astype(np.float32), size.astype(np.float32)

    def densities(dense: Any) -> Any:
        free = xp.sum(xp.where(dense, 0, raw * size))
        wanted = (1 - sparsity) * size.sum() - xp.sum(xp.where(dense, size, 0))
        return xp.where(dense, 1, raw * (wanted / xp.where(free > 0, free, 1)))

    def step(dense: Any) -> Any:
        over = ~dense & (densities(dense) > 1)
        return dense | (over & (raw == xp.max(xp.where(over, raw, 0))))

    dense = xp.zeros(len(shapes), bool)
    if static:
        for _ in shapes:
            dense = step(dense)
    else:
        dense = lax.fori_loop(0, len(shapes), lambda _, dense: step(dense), dense)
    found = xp.clip(1 - densities(dense), 0, 1)
    return [float(s) for s in found] if static else [found[i] for i in range(len(shapes))]


DISTRIBUTIONS: dict[str, Distribution | None] = {"uniform": uniform, "erk": erk, "global": None}


def distribution_of(distribution: str | Distribution) -> Distribution | None:
    """The function of that name; None for `"global"`, one threshold for all arrays.

    Raises:
      RecipeError: there is none.
    """
    if callable(distribution):
        return distribution
    if distribution not in DISTRIBUTIONS:
        raise RecipeError(
            f"distribution={distribution!r} is none of {', '.join(map(repr, DISTRIBUTIONS))}, "
            "and no function from (shapes, sparsity) to a list of sparsities."
        )
    return DISTRIBUTIONS[distribution]
