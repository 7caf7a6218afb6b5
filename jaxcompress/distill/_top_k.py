# SPDX-License-Identifier: Apache-2.0
"""KL over the teacher's k likeliest classes and one bucket for all others; stored top k."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._errors import JaxCompressError
from ._loss import RULED_OUT, Loss, described, log_softmax, positive, relative_entropy, row_loss


class TopK(NamedTuple):
    """The k likeliest classes of a teacher, at temperature 1: what a recording keeps of logits.

    Attributes:
      log_probs: float[..., k], log probabilities among all classes.
      indices: int[..., k], the classes.
    """

    log_probs: Array
    indices: Array

    def logits(self, student: Array) -> Array:
        """Log probabilities of all classes; the rest of the mass is spread as the student does.

        KL from it to the student, and its gradient, are exactly those of the k classes and one
        bucket: within the bucket teacher and student agree.
        """
        q = lax.stop_gradient(log_softmax(student, 1.0))
        hit = scattered(self.indices, q.shape)
        rest, student_rest = log_rest(self.log_probs), logsumexp(jnp.where(hit, RULED_OUT, q))
        spread = jnp.where(hit, RULED_OUT, rest + q - student_rest)
        return jnp.put_along_axis(
            spread, self.indices, self.log_probs.astype(q.dtype), axis=-1, inplace=False
        )


def top_k(logits: Array, k: int) -> TopK:
    """The k likeliest classes of each row.

    >>> import jax.numpy as jnp
    >>> top_k(jnp.log(jnp.array([[0.1, 0.6, 0.3]])), 2).indices.tolist()
    [[1, 2]]

    Raises:
      JaxCompressError: k is not between 1 and the number of classes.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise JaxCompressError(f"top_k: k={k}; there are {logits.shape[-1]} classes.")
    return TopK(*lax.top_k(log_softmax(logits.astype(jnp.float32), 1.0), k))


def top_k_kl(k: int = 64, temperature: float = 1.0, *, reduction: str = "mean") -> Loss:
    """T^2 KL between (p_1 ... p_k, rest) and (q_1 ... q_k, rest), of the teacher's top k classes.

    At most `kl`, to which it tends as k grows. The bucket keeps the student's mass on the other
    classes in check; k probabilities divided by their sum would say nothing about it. Settings as
    in `kl`.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[2.0, 1.0, 0.0]])
    >>> print(round(float(top_k_kl(1)(student, teacher)), 4))
    0.4743
    """
    T, name = temperature, described("top_k_kl", k=k, temperature=temperature)
    positive(name, temperature=T)
    if k < 1:
        raise JaxCompressError(f"{name}: k must be at least 1.")

    def values(student, teacher):
        q, p = log_softmax(student, T), log_softmax(teacher, T)
        if k < q.shape[-1]:
            _, indices = lax.top_k(p, k)
            p, q = (_bucketed(x, indices) for x in (p, q))
        return T**2 * relative_entropy(p, q)

    return row_loss(name, values, reduction=reduction)


def _bucketed(log_probs: Array, indices: Array) -> Array:
    """[..., classes] -> [..., k + 1]. The bucket is added up: 1 - the rest would cancel."""
    others = jnp.where(scattered(indices, log_probs.shape), RULED_OUT, log_probs)
    kept = jnp.take_along_axis(log_probs, indices, axis=-1)
    return jnp.concatenate([kept, logsumexp(others)], axis=-1)


def scattered(indices: Array, shape: tuple[int, ...]) -> Array:
    """bool of this shape: whether a class is among the indices [..., k]."""
    return jnp.put_along_axis(jnp.zeros(shape, bool), indices, True, axis=-1, inplace=False)


def logsumexp(x: Array) -> Array:
    return jax.nn.logsumexp(x, axis=-1, keepdims=True)


def log_rest(log_probs: Array) -> Array:
    """log(1 - sum of probabilities), [..., k] -> [..., 1]; `RULED_OUT` where nothing is left."""
    rest = 1 - jnp.sum(jnp.exp(log_probs), axis=-1, keepdims=True)
    some = rest > jnp.finfo(log_probs.dtype).eps
    return jnp.where(some, jnp.log(jnp.where(some, rest, 1)), RULED_OUT)
