# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant (Xiao et al. 2022): the range of inputs is moved into the weights that read them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._errors import FormatError, RecipeError
from . import checks

_SMALLEST = np.float32(1e-5)


def smooth(input_max: Any, weight_max: Any, alpha: float = 0.5) -> jax.Array:
    """Returns the scale s of inputs: x / s and W s have the product of x and W.

        s_j = max|x_j|^α / max|w_j|^(1 - α)

    Args:
        input_max: float[..., in], largest absolute value of each input over calibration tokens.
        weight_max: float[..., in], largest absolute value of the weights that read it.
        alpha: 0 to 1: how much of the range of the inputs is moved.

    Returns:
        float32[..., in], at least 1e-5; 1 for inputs or weights that are all zero.

    Raises:
        FormatError: if the shapes differ, or values are negative or not finite.
        RecipeError: if alpha is out of range.

    Example:
        >>> smooth([16.0, 1.0], [1.0, 1.0])
        Array([4., 1.], dtype=float32)

    References: Xiao et al. 2022, equation 4. The code published with it gives inputs that were
    never seen the scale 1e-5.
    """
    if not 0 <= alpha <= 1:
        raise RecipeError(f"alpha={alpha!r}: expected a number from 0 to 1.")
    x, w = maxima(("input_max", input_max), ("weight_max", weight_max))
    s = jnp.maximum(x**alpha / jnp.maximum(w, _SMALLEST) ** (1 - alpha), _SMALLEST)
    return jnp.where((x > 0) & (w > 0), s, 1)


def maxima(*named: tuple[str, Any]) -> list[jax.Array]:
    """Returns the arrays in float32.

    Raises:
        FormatError: if their shapes differ, or values are negative or not finite.
    """
    arrays = [jnp.asarray(a, jnp.float32) for _, a in named]
    for (name, _), a in zip(named, arrays, strict=True):
        if a.shape != arrays[0].shape:
            raise FormatError(
                f"{name} has the shape {list(a.shape)} and {named[0][0]} {list(arrays[0].shape)}: "
                "expected one value for each channel in both."
            )
        checks.finite(a, name)
        if not isinstance(a, Tracer) and bool((a < 0).any()):
            raise FormatError(f"{name} has negative values: expected absolute ones.")
    return arrays
