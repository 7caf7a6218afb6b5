# SPDX-License-Identifier: Apache-2.0
"""Errors of outputs without the inputs: ‖d x‖² summed over tokens is d G dᵀ, with G = sum x xᵀ."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def output_errors(d: jax.Array, gram: jax.Array) -> jax.Array:
    """Returns the squared errors of outputs over all tokens.

    Args:
        d: errors of weights, float32[in, out].
        gram: float32[in, in].

    Returns:
        float32[out].

    Example:
        >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> output_errors(jnp.array([[1.0], [-1.0]]), x.T @ x)  # (1 - 2)² + (3 - 4)²
        Array([2.], dtype=float32)
    """
    return jnp.sum(d * (gram @ d), axis=0)


def of_groups(gram: jax.Array, size: int) -> jax.Array:
    """Returns the Gram matrices of groups of consecutive inputs, float32[groups, size, size].

    The last group, if it is shorter, is filled up with inputs that are zero.
    """
    n = gram.shape[0]
    gram = jnp.pad(gram, ((0, -n % size), (0, -n % size)))
    cut = gram.reshape(-1, size, gram.shape[1] // size, size)
    return jnp.diagonal(cut, axis1=0, axis2=2).transpose(2, 0, 1)
