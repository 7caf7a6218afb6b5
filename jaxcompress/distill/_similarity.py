# SPDX-License-Identifier: Apache-2.0
"""Similarity-preserving distillation: the matrix of inner products of a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from ._loss import Loss, batch_loss, unit


def similarity() -> Loss:
    """|G_s - G_t|^2 / n^2, G the inner products of float[n, ...], each row over its norm.

    Widths may differ.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    >>> print(float(similarity()(x, x[:, ::-1])))  # a rotation keeps all inner products
    0.0

    References: Tung and Mori 2019, Similarity-Preserving Knowledge Distillation, equation 4.
    """

    def value(student, teacher, weights):
        a, b = (unit(jnp.sqrt(weights)[None] * gram(x, x)) for x in (student, teacher))
        rows = jnp.sum((a - b) ** 2, axis=-1)
        total = jnp.sum(weights)
        return jnp.sum(weights * rows) / jnp.where(total > 0, total, 1) ** 2

    return batch_loss("similarity()", value)


def gram(x: Array, y: Array) -> Array:
    """Inner products of the examples of two batches."""
    x, y = (v.reshape(len(v), -1) for v in (x, y))
    return jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
