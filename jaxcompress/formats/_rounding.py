# SPDX-License-Identifier: Apache-2.0
"""How a number between two integers is rounded. Formats scale their grid so that this suffices."""

from typing import Any

import jax
import numpy as np
from jax import lax

from .._errors import FormatError

ROUNDINGS = ("half_even", "half_away", "floor", "stochastic")


def to_integer(v: jax.Array, rounding: str, key: Any) -> jax.Array:
    """Returns v rounded to integers.

    Stochastic rounding goes up with probability v - floor(v), so that its expectation is v
    (Gupta et al. 2015, section 3.2); integers stay as they are. NaN stays NaN.

    Args:
        v: float32, any shape.
        rounding: one of `ROUNDINGS`.
        key: PRNG key for "stochastic", else unused.

    Raises:
        FormatError: if the rounding is unknown, or "stochastic" has no key.
    """
    if rounding == "half_even":
        return lax.round(v, lax.RoundingMethod.TO_NEAREST_EVEN)
    if rounding == "half_away":
        return lax.round(v, lax.RoundingMethod.AWAY_FROM_ZERO)
    low = lax.floor(v)
    if rounding == "floor":
        return low
    return lax.select(uniform(key, v, rounding) < v - low, low + np.float32(1), low)


def uniform(key: Any, v: jax.Array, rounding: str) -> jax.Array:
    """Returns float32 in [0, 1) of the shape of v, for stochastic rounding with this key."""
    check(rounding, key)
    return jax.random.uniform(key, v.shape)


def check(rounding: str, key: Any) -> None:
    """Raises FormatError unless the rounding exists and has the key that it needs."""
    if rounding not in ROUNDINGS:
        raise FormatError(f"There is no rounding {rounding!r}. Available: {', '.join(ROUNDINGS)}.")
    if rounding == "stochastic" and key is None:
        raise FormatError("rounding='stochastic' needs a PRNG key: give key=jax.random.key(...).")
