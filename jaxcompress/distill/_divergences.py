# SPDX-License-Identifier: Apache-2.0
"""Divergences between the teacher's softmax p and the student's q, both at temperature T."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

from ._loss import (
    Loss,
    described,
    fraction,
    log_softmax,
    positive,
    relative_entropy,
    row_loss,
)


def kl(temperature: float = 1.0, *, reduction: str = "mean") -> Loss:
    """T^2 KL(p || q): knowledge distillation. Operands float[..., classes] are logits.

    The factor T^2 keeps the size of gradients when T changes. `kl()` on attention scores before
    their softmax is MiniLM's and TinyBERT's transfer of attention distributions.

    Args:
      temperature: T > 0; logits are divided by it.
      reduction: `"mean"` over rows by their weights, `"sum"`, or `"none"` for float[...].

    Raises:
      JaxCompressError: temperature <= 0 or an unknown reduction.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[4.0, 0.0]])
    >>> print(round(float(kl(temperature=4.0)(student, teacher)), 4))
    1.7751

    References: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 2.
    """
    T, name = temperature, described("kl", temperature=temperature)
    positive(name, temperature=T)

    def values(student: Array, teacher: Array):
        return T**2 * relative_entropy(log_softmax(teacher, T), log_softmax(student, T))

    return row_loss(name, values, reduction=reduction)


def reverse_kl(temperature: float = 1.0, *, reduction: str = "mean") -> Loss:
    """T^2 KL(q || p): the student keeps to modes of the teacher. Settings as in `kl`.

    >>> import jax.numpy as jnp
    >>> print(abs(round(float(reverse_kl()(jnp.array([[1.0, 3.0]]), jnp.array([[1.0, 3.0]]))), 6)))
    0.0

    References: Gu et al. 2024, MiniLLM, equation 1.
    """
    T, name = temperature, described("reverse_kl", temperature=temperature)
    positive(name, temperature=T)

    def values(student, teacher):
        return T**2 * relative_entropy(log_softmax(student, T), log_softmax(teacher, T))

    return row_loss(name, values, reduction=reduction)


def mixture(log_a: Array, log_b: Array, weight_b: float) -> Array:
    """log((1 - w) a + w b)."""
    return jnp.logaddexp(log_a + math.log(1 - weight_b), log_b + math.log(weight_b))


def jsd(beta: float = 0.5, temperature: float = 1.0, *, reduction: str = "mean") -> Loss:
    """T^2 (b KL(p || m) + (1 - b) KL(q || m)) with m = b p + (1 - b) q, b in [0, 1].

    That formula is 0 at both ends; as in the authors' code, b = 0 is KL(p || q) and b = 1 is
    KL(q || p), to which JSD / b and JSD / (1 - b) tend. Other settings as in `kl`.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[30.0, 0.0]]), jnp.array([[0.0, 30.0]])
    >>> print(round(float(jsd()(student, teacher)), 4))  # log 2: nothing in common
    0.6931

    References: Agarwal et al. 2024, On-Policy Distillation (GKD), section 2.
    """
    T, name = temperature, described("jsd", beta=beta, temperature=temperature)
    positive(name, temperature=T)
    fraction(name, beta=beta)
    if beta in (0, 1):
        return (reverse_kl if beta else kl)(T, reduction=reduction)

    def values(student, teacher):
        q, p = log_softmax(student, T), log_softmax(teacher, T)
        m = mixture(q, p, beta)
        return T**2 * (beta * relative_entropy(p, m) + (1 - beta) * relative_entropy(q, m))

    return row_loss(name, values, reduction=reduction)


def skew_kl(skew: float = 0.1, temperature: float = 1.0, *, reduction: str = "mean") -> Loss:
    """T^2 KL(p || a p + (1 - a) q): finite, and smoother than `kl`, for a in (0, 1).

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[900.0, 0.0]]), jnp.array([[0.0, 900.0]])
    >>> print(round(float(skew_kl(0.1)(student, teacher)), 4))  # log 10
    2.3026

    References: Ko et al. 2024, DistiLLM, equation 4.
    """
    T, name = temperature, described("skew_kl", skew=skew, temperature=temperature)
    positive(name, temperature=T, skew=skew)
    positive(name, **{"1 - skew": 1 - skew})

    def values(student, teacher):
        q, p = log_softmax(student, T), log_softmax(teacher, T)
        return T**2 * relative_entropy(p, mixture(q, p, skew))

    return row_loss(name, values, reduction=reduction)


def skew_reverse_kl(
    skew: float = 0.1, temperature: float = 1.0, *, reduction: str = "mean"
) -> Loss:
    """T^2 KL(q || (1 - a) p + a q): `skew_kl` the other way round.

    >>> import jax.numpy as jnp
    >>> same = jnp.array([[1.0, 3.0]])
    >>> print(abs(round(float(skew_reverse_kl()(same, same)), 6)))
    0.0

    References: Ko et al. 2024, DistiLLM, section 3.1.
    """
    T, name = temperature, described("skew_reverse_kl", skew=skew, temperature=temperature)
    positive(name, temperature=T, skew=skew)
    positive(name, **{"1 - skew": 1 - skew})

    def values(student, teacher):
        q, p = log_softmax(student, T), log_softmax(teacher, T)
        return T**2 * relative_entropy(q, mixture(p, q, skew))

    return row_loss(name, values, reduction=reduction)
