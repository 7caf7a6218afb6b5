# SPDX-License-Identifier: Apache-2.0
"""Errors of outputs without the inputs: ‖d x‖² summed over tokens is d G dᵀ, with G = sum x xᵀ."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_PARTS = 8


def folded(gram: jax.Array) -> jax.Array:
    """Returns an upper triangular matrix F with d F dᵀ = d G dᵀ, float32[in, in]."""
    return jnp.triu(gram) + jnp.triu(gram, 1)


def output_errors(d: jax.Array, f: jax.Array) -> jax.Array:
    """Returns the squared errors of outputs over all tokens, in little more than half the work.

    Args:
        d: errors of weights, float32[in, out].
        f: `folded` Gram matrix, float32[in, in].

    Returns:
        float32[out].

    Example:
        >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> output_errors(jnp.array([[1.0], [-1.0]]), folded(x.T @ x))  # (1 - 2)² + (3 - 4)²
        Array([2.], dtype=float32)
    """
    n = d.shape[0]
    step, total = -(-n // _PARTS), jnp.zeros(d.shape[1])
    for i in range(0, n, step):
        here = slice(i, min(i + step, n))
        total = total + jnp.sum(d[here] * (f[here, i:] @ d[i:]), axis=0)
    return total


def of_groups(gram: jax.Array, size: int) -> jax.Array:
    """Returns the Gram matrices of groups of consecutive inputs, float32[groups, size, size].

    The last group, if it is shorter, is filled up with inputs that are zero.
    """
    n = gram.shape[0]
    gram = jnp.pad(gram, ((0, -n % size), (0, -n % size)))
    cut = gram.reshape(-1, size, gram.shape[1] // size, size)
    return jnp.diagonal(cut, axis1=0, axis2=2).transpose(2, 0, 1)
