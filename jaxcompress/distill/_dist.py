# SPDX-License-Identifier: Apache-2.0
"""DIST: probabilities correlate within each example, and within each class over the batch."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from ._loss import RULED_OUT, Loss, described, log_softmax, positive, spread, unit


def dist(beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> Loss:
    """T^2 (beta (1 - mean rho of rows) + gamma (1 - mean rho of columns)), rho Pearson's.

    Operands are logits float[..., classes]; all rows that are not masked are one batch. The
    correlation of a constant with a constant counts as 1, with anything else as 1/2.

    Args:
      beta: weight of the correlations between classes, within an example.
      gamma: weight of the correlations between examples, within a class.
      temperature: T > 0; logits are divided by it.

    >>> import jax.numpy as jnp
    >>> teacher = jnp.array([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
    >>> print(round(float(dist()(teacher + 1, teacher)), 6))
    0.0

    References: Huang et al. 2022, Knowledge Distillation from a Stronger Teacher, equations 8-10.
    """
    T, name = temperature, described("dist", beta=beta, gamma=gamma, temperature=temperature)
    positive(name, temperature=T)

    def compute(student, teacher, labels, weights):
        w = weights.reshape(-1)
        q, p = (
            jnp.exp(log_softmax(jnp.maximum(x, RULED_OUT), T)).reshape(len(w), -1)
            for x in (student, teacher)
        )
        total = jnp.where(jnp.sum(w) > 0, jnp.sum(w), 1)
        rows = jnp.sum(w * _apart(q, p, jnp.ones_like(q), 1)) / total
        columns = jnp.mean(_apart(q, p, jnp.broadcast_to(spread(w, 2), q.shape), 0))
        return T**2 * (beta * rows + gamma * columns)

    return Loss(name, compute)


def _apart(a: Array, b: Array, w: Array, axis: int) -> Array:
    """1 - Pearson's correlation along an axis, with weights, as half a squared distance."""
    total = jnp.sum(w, axis=axis, keepdims=True)

    def direction(x):
        mean = jnp.sum(w * x, axis=axis, keepdims=True) / jnp.where(total > 0, total, 1)
        d = jnp.where(jnp.abs(x - mean) > 4 * jnp.finfo(x.dtype).eps * mean, x - mean, 0)
        return unit(jnp.sqrt(w) * d, axis)

    return jnp.sum((direction(a) - direction(b)) ** 2, axis=axis) / 2
