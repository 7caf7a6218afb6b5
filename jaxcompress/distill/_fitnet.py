# SPDX-License-Identifier: Apache-2.0
"""FitNets: the student's features, projected where widths differ, become the teacher's."""

from __future__ import annotations

import jax.numpy as jnp

from ._loss import Loss, row_loss


def fitnet(*, reduction: str = "mean") -> Loss:
    """mean over the width of (s - t)^2, for features float[..., width].

    `match` learns the projection (the paper's regressor) where widths differ. This loss on
    attention scores and hidden states of layers paired by `uniform_layers` is TinyBERT's.

    >>> import jax.numpy as jnp
    >>> print(float(fitnet()(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0]]))))
    2.0

    References: Romero et al. 2015, FitNets, equation 3; Jiao et al. 2020, TinyBERT, equations 7-9.
    """

    def values(student, teacher):
        return jnp.mean((student - teacher) ** 2, axis=-1)

    return row_loss("fitnet()", values, reduction=reduction, logits=False)
