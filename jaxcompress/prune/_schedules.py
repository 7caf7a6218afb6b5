# SPDX-License-Identifier: Apache-2.0
"""Schedules: functions from the number of a step, counted from 0, to a sparsity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._errors import RecipeError

Schedule = Callable[[Any], Any]


def checked(name: str, value: Any) -> float:
    """A sparsity given as a number.

    Raises:
      RecipeError: it is not in [0, 1).
    """
    if not isinstance(value, (int, float, np.number)) or not 0 <= value < 1:
        raise RecipeError(
            f"{name}={value!r}: a sparsity is the part of the weights that become zero, at least "
            "0 and less than 1. 90 % is 0.9."
        )
    return float(value)


def constant(sparsity: float) -> Schedule:
    """The same sparsity at every step.

    >>> constant(0.5)(17)
    0.5
    """
    value = checked("sparsity", sparsity)
    return lambda step: value


def one_shot(sparsity: float, step: int) -> Schedule:
    """Nothing before a step, all of it from that step on.

    >>> schedule = one_shot(0.75, 100)
    >>> float(schedule(99)), float(schedule(100))
    (0.0, 0.75)
    """
    value = checked("sparsity", sparsity)
    if step < 0:
        raise RecipeError(f"one_shot(step={step}): steps are counted from 0.")
    return lambda now: jnp.where(now >= step, jnp.float32(value), 0)


def cubic(initial: float, final: float, begin: int, end: int) -> Schedule:
    """Fast at first, slower as fewer weights are left.

    final + (initial - final) (1 - (step - begin) / (end - begin))³ between the two steps; 0
    before `begin`, `final` from `end` on.

    Args:
      initial: sparsity at `begin`, in [0, 1).
      final: sparsity at `end`, in [0, 1).
      begin, end: numbers of steps, begin < end.

    Raises:
      RecipeError: a sparsity outside [0, 1), or a schedule that ends before it begins.

    >>> schedule = cubic(0.0, 0.5, 0, 20)
    >>> float(schedule(10)), float(schedule(20))
    (0.4375, 0.5)

    References: Zhu and Gupta 2017, To prune, or not to prune, equation 1.
    """
    initial, final = checked("initial", initial), checked("final", final)
    if not 0 <= begin < end:
        raise RecipeError(
            f"cubic(begin={begin}, end={end}): the schedule ends before it begins. Give two "
            "numbers of steps, 0 <= begin < end."
        )

    def sparsity(step: Any) -> Any:
        left = 1 - jnp.clip((step - begin) / (end - begin), 0, 1).astype(jnp.float32)
        return jnp.where(step < begin, 0, final + (initial - final) * left**3)

    return sparsity


def schedule_of(sparsity: float | Schedule) -> Schedule:
    """A number is a constant schedule."""
    return sparsity if callable(sparsity) else constant(sparsity)
