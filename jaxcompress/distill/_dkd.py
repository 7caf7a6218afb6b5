# SPDX-License-Identifier: Apache-2.0
"""Decoupled knowledge distillation: the true class against the rest, and the rest in itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from ._loss import RULED_OUT, Loss, described, log_softmax, positive, relative_entropy, row_loss


def dkd(
    alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, *, reduction: str = "mean"
) -> Loss:
    """T^2 (alpha KL(b_t || b_s) + beta KL(r_t || r_s)). Wants labels.

    b = (p_y, 1 - p_y) is the softmax reduced to the true class y against all others, and r the
    softmax over the others alone. With weights 1 and 1 - p_y of the teacher the two terms add up
    to `kl` (equation 7). The logit of y is left out exactly, not lowered by 1000 as in the authors'
    code.

    Args:
      alpha, beta: weights of the two terms.
      temperature, reduction: as in `kl`.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[3.0, 0.0, 0.0]])
    >>> loss = dkd(alpha=1.0, beta=8.0)
    >>> print(round(float(loss(student, teacher, labels=jnp.array([0]))), 4))
    0.4968

    References: Zhao et al. 2022, Decoupled Knowledge Distillation, equations 5 to 8.
    """
    T = temperature
    name = described("dkd", alpha=alpha, beta=beta, temperature=temperature)
    positive(name, temperature=T)

    def values(student, teacher, one_hot):
        target, rest = zip(*(terms(x / T, one_hot) for x in (student, teacher)))
        first = relative_entropy(target[1], target[0])
        return T**2 * (alpha * first + beta * relative_entropy(rest[1], rest[0]))

    return row_loss(name, values, reduction=reduction, wants_labels=True)


def terms(z: Array, one_hot: Array) -> tuple[Array, Array]:
    """(log b [..., 2], log r [..., classes]) of logits."""
    others = jnp.where(one_hot, RULED_OUT, z)
    own = jnp.sum(jnp.where(one_hot, z, 0), axis=-1)
    pair = jnp.stack([own, jax.nn.logsumexp(others, axis=-1)], axis=-1)
    return log_softmax(pair, 1.0), log_softmax(others, 1.0)
