# SPDX-License-Identifier: Apache-2.0
"""Weights of the inputs that stay which reproduce the outputs of all inputs, by least squares."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .._errors import FormatError
from . import checks
from .lead import over_lead


def refit(w: Any, gram: Any, kept: Any, *, damping: float = 1e-4) -> jax.Array:
    """Returns argmin over W' of sum ||W x - W' x||² + λ ||W' - W||², W' zero where not `kept`.

        W' = W (G[:, K] + λ I[:, K]) (G[K, K] + λ I)⁻¹

    Args:
        w: float[*lead, out, in].
        gram: G, float[*lead, in, in], sum of x xᵀ over calibration tokens.
        kept: K, bool[*lead, in], inputs that stay.
        damping: λ as a fraction of the mean of the diagonal of G.

    Returns:
        float32[*lead, out, in].

    Raises:
        FormatError: if shapes do not fit, or an array is not finite.

    Example:
        >>> w, gram = [[1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]  # the two inputs are equal
        >>> refit(w, gram, [True, False], damping=0.0)
        Array([[2., 0.]], dtype=float32)

    References: He et al. 2017, Channel Pruning, section 3.1, step (ii); with λ as in Frantar et
    al. 2022 (GPTQ), section 3.3.
    """
    w = checks.weights(w)
    gram = checks.inputs(gram, w, 2, "gram")
    kept = jnp.asarray(kept)
    if kept.dtype != bool or kept.shape != (*w.shape[:-2], w.shape[-1]):
        raise FormatError(f"kept is bool [*lead, in], got {kept.dtype}{list(kept.shape)}.")
    if not damping >= 0:
        raise FormatError(f"damping={damping!r}: expected a fraction of the mean, at least 0.")
    return _refit(w, gram, kept, damping)


@jax.jit
def _refit(w: jax.Array, gram: jax.Array, kept: jax.Array, damping: Any) -> jax.Array:
    return over_lead(lambda w, g, k: _one(w, g, k, damping), w.ndim - 2)(w, gram, kept)


def _one(w: jax.Array, g: jax.Array, kept: jax.Array, damping: Any) -> jax.Array:
    diagonal = jnp.diagonal(g)
    mean = jnp.mean(diagonal)
    g = g + jnp.diag(damping * mean + jnp.where(diagonal == 0, 1.0, 0.0))  # dead inputs stay
    k = kept.astype(jnp.float32)
    inner = g * k[:, None] * k[None] + jnp.diag(1 - k)
    with jax.default_matmul_precision("highest"):
        right = (w @ g) * k[None]
        return jax.scipy.linalg.solve(inner, right.T, assume_a="pos").T * k[None]
