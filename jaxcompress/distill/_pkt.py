# SPDX-License-Identifier: Apache-2.0
"""Probabilistic knowledge transfer: who is whose neighbour in a batch."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from ._loss import Loss, batch_loss, unit
from ._similarity import gram


def pkt() -> Loss:
    """mean_ij P_t log(P_t / P_s), P_ij = k_ij / sum_j k_ij, k = (1 + cos(x_i, x_j)) / 2.

    For features float[n, ...]; widths may differ. Kernels are at least 1e-6, so that opposite
    examples leave the loss finite.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    >>> print(float(pkt()(5 * x, x)))
    0.0

    References: Passalis and Tefas 2018, Learning Deep Representations with Probabilistic Knowledge
    Transfer, equations 4 to 7 (mean over all pairs as in the authors' code).
    """

    def value(student, teacher, weights):
        q, p = (_neighbours(x, weights) for x in (student, teacher))
        rows = jnp.sum(jnp.where(weights[None] > 0, p * jnp.log(p / q), 0), axis=-1)
        total = jnp.sum(weights)
        return jnp.sum(weights * rows) / jnp.where(total > 0, total, 1) ** 2

    return batch_loss("pkt()", value)


def _neighbours(x: Array, weights: Array) -> Array:
    x = unit(x.reshape(len(x), -1))
    k = jnp.maximum((1 + gram(x, x)) / 2, 1e-6)
    total = jnp.sum(weights[None] * k, axis=-1, keepdims=True)
    k = jnp.where(weights > 0, weights, 1)[None] * k  # a mask takes no part; logs of it must exist
    return k / jnp.where(total > 0, total, 1)
