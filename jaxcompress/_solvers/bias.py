# SPDX-License-Identifier: Apache-2.0
"""Bias correction (Nagel et al. 2019): the mean error of the outputs goes into the bias."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .._errors import FormatError
from . import checks


def bias_correction(w: Any, w_q: Any, mean: Any) -> jax.Array:
    """Returns what is added to the bias so that the outputs keep their mean: (W - Wq) E[x].

    Args:
        w: weights, float[*lead, out, in].
        w_q: what became of them, of the same shape.
        mean: float[*lead, in], mean of the inputs over calibration tokens.

    Returns:
        float32[*lead, out].

    Raises:
        FormatError: if shapes do not fit, or an array is not finite.

    Example:
        >>> bias_correction([[1.0, 2.5]], [[1.0, 2.0]], [1.0, 4.0])
        Array([2.], dtype=float32)

    References: Nagel et al. 2019, section 4.2, equation 15.
    """
    w, w_q = checks.weights(w), checks.weights(w_q)
    if w.shape != w_q.shape:
        raise FormatError(f"Weights have the shapes {list(w.shape)} before, {list(w_q.shape)} now.")
    mean = checks.inputs(mean, w, 1, "mean")
    return jnp.einsum("...oi,...i->...o", w - w_q, mean)
