# SPDX-License-Identifier: Apache-2.0
"""Cross-layer equalization (Nagel et al. 2019): channels get the same range on both sides."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .smooth import maxima


def equalize(before: Any, after: Any) -> jax.Array:
    """Returns the scale s of the channels between two layers: W1 / s, b1 / s and W2 s.

        s_i = max|W1_i| / sqrt(max|W1_i| max|W2_i|)

    after which both have the range sqrt(max|W1_i| max|W2_i|).

    Args:
        before: float[..., channels], largest absolute value of the weights that make the channel.
        after: float[..., channels], of the weights that read it.

    Returns:
        float32[..., channels]; 1 where one of them is zero.

    Raises:
        FormatError: if the shapes differ, or values are negative or not finite.

    Example:
        >>> equalize([16.0, 1.0], [1.0, 1.0])
        Array([4., 1.], dtype=float32)

    References: Nagel et al. 2019, equation 11.
    """
    r1, r2 = maxima(("before", before), ("after", after))
    return _ratio(r1, jnp.sqrt(r1) * jnp.sqrt(r2))


def equalize_three(before: Any, between: Any, after: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the scales around a depthwise layer: W1 / s, W2 s / t and W3 t.

        s = r1 / (r1 r2 r3)^(1/3)        t = (r1 r2 r3)^(1/3) / r3

    Args:
        before, between, after: float[..., channels], largest absolute values of the weights of
            each channel in the three layers.

    Returns:
        s and t, float32[..., channels]; 1 where one of the three is zero.

    Raises:
        FormatError: if the shapes differ, or values are negative or not finite.

    Example:
        >>> equalize_three([8.0], [1.0], [1.0])
        (Array([4.], dtype=float32), Array([2.], dtype=float32))

    References: Nagel et al. 2019, section 4.1, as in AIMET.
    """
    r1, r2, r3 = maxima(("before", before), ("between", between), ("after", after))
    mean = jnp.cbrt(r1) * jnp.cbrt(r2) * jnp.cbrt(r3)
    alive = mean > 0
    return jnp.where(alive, _ratio(r1, mean), 1), jnp.where(alive, _ratio(mean, r3), 1)


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where((a > 0) & (b > 0), a / jnp.where(b > 0, b, 1), 1)
