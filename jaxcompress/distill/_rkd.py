# SPDX-License-Identifier: Apache-2.0
"""Relational knowledge distillation: distances and angles between the examples of a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from ._loss import Loss, batch_loss, described


def rkd(distance: float = 25.0, angle: float = 50.0) -> Loss:
    """distance * huber(d_s, d_t) + angle * huber(c_s, c_t), for features float[n, ...].

    d_ij = |x_i - x_j| over its mean for pairs that differ; c_ijk the cosine of the angle at x_j
    between x_i and x_k. Means are over all ordered pairs and triples, those of one example with
    itself included, where both are 0 (as in the authors' code). Widths may differ. Memory: n^3.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    >>> print(round(float(rkd()(3 * x + 1, x)), 6))  # scale and place do not matter
    0.0

    References: Park et al. 2019, Relational Knowledge Distillation, equations 5 to 10.
    """

    def value(student, teacher, weights):
        pairs = weights[:, None] * weights[None]
        s, t = (x.reshape(len(x), -1) for x in (student, teacher))
        ds, dt = s[:, None] - s[None], t[:, None] - t[None]
        found = jnp.zeros((), s.dtype)
        if distance:
            found += distance * _mean(_huber(_distances(ds, pairs) - _distances(dt, pairs)), pairs)
        if angle:
            triples = pairs[..., None] * weights[None, None]
            found += angle * _mean(_huber(_angles(ds) - _angles(dt)), triples)
        return found

    return batch_loss(described("rkd", distance=distance, angle=angle), value)


def _norm(d: Array) -> Array:
    squared = jnp.sum(d * d, axis=-1)
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)


def _distances(d: Array, pairs: Array) -> Array:
    d = _norm(d)
    mean = _mean(d, pairs * (d > 0))
    return d / jnp.where(mean > 0, mean, 1)


def _angles(d: Array) -> Array:
    length = _norm(d)[..., None]
    e = d / jnp.where(length > 0, length, 1)  # e[i, j]: from j to i
    return jnp.einsum("ijd,kjd->ijk", e, e, precision=jax.lax.Precision.HIGHEST)


def _huber(d: Array) -> Array:
    a = jnp.abs(d)
    return jnp.where(a < 1, d * d / 2, a - 0.5)


def _mean(values: Array, weights: Array) -> Array:
    total = jnp.sum(weights)
    return jnp.sum(weights * values) / jnp.where(total > 0, total, 1)
