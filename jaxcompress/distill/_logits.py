# SPDX-License-Identifier: Apache-2.0
"""Distances between rows of numbers: squared error of logits, and the angle between them."""

from __future__ import annotations

import jax.numpy as jnp

from ._loss import Loss, described, row_loss, unit


def mse_logits(*, centered: bool = True, reduction: str = "mean") -> Loss:
    """mean_c (s_c - t_c)^2 / 2 of logits float[..., classes]: the limit of `kl` for T to infinity.

    Args:
      centered: subtract from each row its mean, which no softmax sees, as in the limit. False is
        the loss of Kim et al.
      reduction: as in `kl`.

    >>> import jax.numpy as jnp
    >>> print(float(mse_logits()(jnp.array([[1.0, 3.0]]), jnp.array([[7.0, 5.0]]))))
    2.0

    References: Hinton et al. 2015, equation 4; Kim et al. 2021, Comparing Kullback-Leibler
    Divergence and Mean Squared Error Loss in Knowledge Distillation, equation 3.
    """

    def values(student, teacher):
        d = student - teacher
        if centered:
            d = d - jnp.mean(d, axis=-1, keepdims=True)
        return jnp.mean(d * d, axis=-1) / 2

    name = described("mse_logits", centered=centered)
    return row_loss(name, values, reduction=reduction, logits=False)


def cosine(*, reduction: str = "mean") -> Loss:
    """1 - cos(s, t) of rows float[..., width], logits or features.

    It is computed as |s/|s| - t/|t||^2 / 2, which is exact where the two are close. A zero vector
    has no direction: the loss is 1/2 against another vector and 0 against a zero vector.

    >>> import jax.numpy as jnp
    >>> print(float(cosine()(jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 3.0]]))))
    1.0

    References: Sanh et al. 2019, DistilBERT, section 3.
    """

    def values(student, teacher):
        return jnp.sum((unit(student) - unit(teacher)) ** 2, axis=-1) / 2

    return row_loss("cosine()", values, reduction=reduction, logits=False)
