# SPDX-License-Identifier: Apache-2.0
"""MiniLM: relations between the tokens of a sequence, for transformers of any width."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from .._errors import JaxCompressError
from ._loss import RULED_OUT, Loss, described, positive, relative_entropy


def minilm(relation_heads: int = 1) -> Loss:
    """Mean over heads and tokens of KL(R_t || R_s), R = softmax(A A^T / sqrt(d)) between tokens.

    Operands are queries, keys or values of one layer, float[..., tokens, width], all heads side
    by side; they are cut anew into `relation_heads` heads of width d, so that widths and numbers
    of heads may differ. Values with the student's number of heads are the first MiniLM's value
    relation. A mask bool[..., tokens] leaves tokens out, as rows and as columns.

    >>> import jax.numpy as jnp
    >>> x = jnp.arange(12.0).reshape(1, 3, 4) / 10
    >>> print(float(minilm(2)(x, x)))
    0.0

    References: Wang et al. 2020, MiniLM, equations 4 to 6; Wang et al. 2021, MiniLMv2, section 3.
    """
    name = described("minilm", relation_heads=relation_heads)
    positive(name, relation_heads=relation_heads)

    def compute(student, teacher, labels, weights):
        if student.ndim < 2 or student.shape[:-1] != teacher.shape[:-1]:
            raise JaxCompressError(
                f"{name}: student {list(student.shape)}, teacher {list(teacher.shape)}: needs "
                "[..., tokens, width] with the same tokens."
            )
        q, p = (_relations(name, x, weights, relation_heads) for x in (student, teacher))
        rows = jnp.mean(relative_entropy(p, q), axis=-2)  # over heads
        total = jnp.sum(weights)
        return jnp.sum(weights * rows) / jnp.where(total > 0, total, 1)

    return Loss(name, compute, same_width=False)


def _relations(name: str, x: Array, weights: Array, heads: int) -> Array:
    """log R [..., heads, tokens, tokens]."""
    if x.shape[-1] % heads:
        raise JaxCompressError(f"{name}: the width {x.shape[-1]} is no multiple of the heads.")
    x = x.reshape(*x.shape[:-1], heads, -1)
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("...ihd,...jhd->...hij", x, x, precision=exact) / x.shape[-1] ** 0.5
    scores = jnp.where(weights[..., None, None, :] > 0, scores, RULED_OUT)
    return jax.nn.log_softmax(scores, axis=-1)


def uniform_layers(student: int, teacher: int) -> tuple[int, ...]:
    """TinyBERT's map: for each of the student's layers the index of its teacher layer.

    Layer m (from 1) learns from layer round(m N / M); both ends fit.

    >>> uniform_layers(4, 12)
    (2, 5, 8, 11)

    Raises:
      JaxCompressError: the student has no layers, or more than the teacher.

    References: Jiao et al. 2020, TinyBERT, section 4.1.
    """
    if not 1 <= student <= teacher:
        raise JaxCompressError(f"uniform_layers: {student} layers cannot learn from {teacher}.")
    return tuple(round((m + 1) * teacher / student) - 1 for m in range(student))
