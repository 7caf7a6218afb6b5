# SPDX-License-Identifier: Apache-2.0
"""Centred kernel alignment: how alike two representations of a batch are."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from ._loss import Loss, batch_loss, unit
from ._similarity import gram


def cka() -> Loss:
    """1 - CKA, CKA = <K_s, K_t> / (|K_s| |K_t|) of the centred Gram matrices of float[n, ...].

    Widths may differ; rotations, one factor and a shift of all features change nothing. It is
    computed as |K_s/|K_s| - K_t/|K_t||^2 / 2, which is exact where the two are close.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]])
    >>> print(round(float(cka()(3 * x[:, ::-1] + 1, x)), 6))
    0.0

    References: Kornblith et al. 2019, Similarity of Neural Network Representations Revisited,
    equation 4.
    """

    def value(student, teacher, weights):
        a, b = (unit(_kernel(x, weights), (0, 1)) for x in (student, teacher))
        return jnp.sum((a - b) ** 2) / 2

    return batch_loss("cka()", value)


def _kernel(x: Array, weights: Array) -> Array:
    x, w = x.reshape(len(x), -1), weights[:, None]
    total = jnp.sum(w)
    mean = jnp.sum(w * x, axis=0, keepdims=True) / jnp.where(total > 0, total, 1)
    x = jnp.sqrt(w) * (x - mean)
    return gram(x, x)
