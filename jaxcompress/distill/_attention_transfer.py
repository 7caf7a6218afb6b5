# SPDX-License-Identifier: Apache-2.0
"""Attention transfer: where in the image features are large, whatever their channels are."""

from __future__ import annotations

import jax.numpy as jnp

from .._errors import JaxCompressError
from ._loss import batch_loss, described, positive, reduced, unit


def attention_transfer(p: float = 2.0):
    """Mean over examples and positions of (a_s - a_t)^2, a = map / |map|, map = mean_c |x_c|^p.

    Operands are features float[n, ..., channels] with the same positions; channels may differ.
    As in the authors' code, squares are averaged (the paper has a norm).

    >>> import jax.numpy as jnp
    >>> x = jnp.arange(8.0).reshape(1, 2, 4)
    >>> print(float(attention_transfer()(x, jnp.concatenate([x, x], -1))))
    0.0

    References: Zagoruyko and Komodakis 2017, Paying More Attention to Attention, equation 2.
    """
    name = described("attention_transfer", p=p)
    positive(name, p=p)

    def value(student, teacher, weights):
        if student.ndim < 3 or student.shape[1:-1] != teacher.shape[1:-1]:
            raise JaxCompressError(
                f"{name}: student {list(student.shape)}, teacher {list(teacher.shape)}: needs "
                "features [n, positions ..., channels] with the same positions."
            )
        a, b = (unit(_map(x, p)) for x in (student, teacher))
        return reduced(jnp.mean((a - b) ** 2, axis=-1), weights)

    return batch_loss(name, value)


def _map(x, p):
    x = jnp.abs(x)
    x = x * x if p == 2 else jnp.where(x > 0, jnp.where(x > 0, x, 1) ** p, 0)
    return jnp.mean(x, axis=-1).reshape(len(x), -1)
