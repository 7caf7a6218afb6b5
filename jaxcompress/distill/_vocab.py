# SPDX-License-Identifier: Apache-2.0
"""Divergences over a vocabulary, from hidden states and heads, without the logits of all tokens.

How they are computed is in `_vocab_chunks.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from .._core import _compat
from .._errors import JaxCompressError
from ._loss import described, fraction, positive
from ._top_k import TopK
from ._vocab_chunks import Setting, forward_kl, jsd, loss, reverse_kl

CHUNK = 256  # tokens: 33 MB of float32 logits for 32000 words


def vocab_kl(
    student_hidden: Array,
    student_head: Array,
    teacher_hidden: Array | TopK,
    teacher_head: Array | None = None,
    *,
    temperature: float = 1.0,
    mask: Any = None,
    chunk: int | None = None,
    labels: Array | None = None,
    alpha: float = 1.0,
    axis_name: str | None = None,
) -> Array:
    """Mean over tokens of T^2 KL(teacher || student), from hidden states and heads.

    Equal to `kl` of the full logits, in time about that of the matmuls and in the memory of one
    chunk of logits. Gradients go to `student_hidden` and `student_head`; the teacher's are zero.
    Second derivatives and forward mode are not defined.

    Args:
      student_hidden: float[tokens, d]; flatten batch and sequence.
      student_head: float[d, vocab]; logits are `student_hidden @ student_head`.
      teacher_hidden: float[tokens, e]; without a head: logits float[tokens, vocab], or a stored
        `TopK` [tokens, k], which means one bucket for all other words at T = 1.
      teacher_head: float[e, vocab], or None.
      temperature: T > 0, for both.
      mask: bool or weights >= 0, [tokens]; if all are 0, so is the loss.
      chunk: tokens at a time; it changes nothing but time and memory. 256 if left out.
      labels: int[tokens]: adds (1 - alpha) times the cross entropy (T = 1) to alpha times this.
      alpha: weight of the divergence where there are labels.
      axis_name: mesh axis over which both heads (and logits) hold parts of the vocabulary, inside
        `shard_map`. Hidden states, mask, labels and `TopK.indices` are whole on each device.

    Raises:
      JaxCompressError: different vocabularies, shapes that do not match, a setting out of range.

    >>> import jax.numpy as jnp
    >>> hidden, head = jnp.eye(3), jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> print(round(float(vocab_kl(hidden, head, hidden, 2 * head)), 4))
    0.0448

    References: Hinton et al. 2015, section 2; gradients in the forward pass: Hsu et al. 2024,
    Liger Kernel, section 3.2.
    """
    return _fused("vocab_kl", forward_kl, temperature, alpha, chunk, axis_name)(
        student_hidden, student_head, teacher_hidden, teacher_head, mask, labels
    )


def vocab_reverse_kl(
    student_hidden: Array,
    student_head: Array,
    teacher_hidden: Array,
    teacher_head: Array | None = None,
    *,
    temperature: float = 1.0,
    mask: Any = None,
    chunk: int | None = None,
    labels: Array | None = None,
    alpha: float = 1.0,
    axis_name: str | None = None,
) -> Array:
    """Mean over tokens of T^2 KL(student || teacher); all else as in `vocab_kl`.

    >>> import jax.numpy as jnp
    >>> hidden, head = jnp.eye(3), jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> print(abs(round(float(vocab_reverse_kl(hidden, head, hidden, head)), 6)))
    0.0
    """
    return _fused("vocab_reverse_kl", reverse_kl, temperature, alpha, chunk, axis_name)(
        student_hidden, student_head, teacher_hidden, teacher_head, mask, labels
    )


def vocab_jsd(
    student_hidden: Array,
    student_head: Array,
    teacher_hidden: Array,
    teacher_head: Array | None = None,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: Any = None,
    chunk: int | None = None,
    labels: Array | None = None,
    alpha: float = 1.0,
    axis_name: str | None = None,
) -> Array:
    """Mean over tokens of T^2 times the generalized JSD of `jsd`; all else as in `vocab_kl`.

    >>> import jax.numpy as jnp
    >>> hidden, head = jnp.eye(3), jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> print(abs(round(float(vocab_jsd(hidden, head, hidden, head)), 6)))
    0.0
    """
    fraction("vocab_jsd", beta=beta)
    ends = {0: forward_kl, 1: reverse_kl}
    divergence = ends.get(beta) or functools.partial(jsd, beta=beta)  # type: ignore[call-overload]
    return _fused("vocab_jsd", divergence, temperature, alpha, chunk, axis_name)(
        student_hidden, student_head, teacher_hidden, teacher_head, mask, labels
    )


def _fused(
    name: str,
    divergence: Callable,
    temperature: float,
    alpha: float,
    chunk: int | None,
    axis_name: str | None,
) -> Callable[..., Any]:
    """The loss of (hidden, head, teacher's hidden, teacher's head, mask, labels)."""
    name = described(name, temperature=temperature)
    positive(name, temperature=temperature, chunk=CHUNK if chunk is None else chunk)
    fraction(name, alpha=alpha)

    def run(hidden, head, teacher, teacher_head, mask, labels):
        if (labels is None) != (alpha == 1) and labels is None:
            raise JaxCompressError(f"{name}: alpha={alpha!r} leaves the rest to labels: give them.")
        if isinstance(teacher, TopK) and divergence is not forward_kl:
            raise JaxCompressError(f"{name}: a stored top k says too little; use vocab_kl.")
        _check(name, hidden, head, teacher, teacher_head, mask, labels, axis_name)
        n = hidden.shape[0]
        weights = jnp.ones(n) if mask is None else mask
        weights = lax.stop_gradient(jnp.asarray(weights)).astype(jnp.float32)
        total = jnp.sum(weights)
        weights = weights / jnp.where(total > 0, total, 1)
        size = max(1, min(chunk or CHUNK, n))
        setting = Setting(name, divergence, temperature, alpha, size, axis_name)
        return loss(setting, hidden, head, (teacher, teacher_head, weights, labels))

    return run


def _check(name, hidden, head, teacher, teacher_head, mask, labels, axis_name) -> None:
    tokens, vocab = hidden.shape[:1], head.shape[-1:]
    first = teacher.log_probs if isinstance(teacher, TopK) else teacher
    shapes = {"student_hidden": hidden, "student_head": head, "teacher_hidden": first}
    shapes |= {"teacher_head": teacher_head} if teacher_head is not None else {}
    listed = ", ".join(f"{k} {list(x.shape)}" for k, x in shapes.items())
    fits = all(x.ndim == 2 for x in shapes.values()) and hidden.shape[1] == head.shape[0]
    if fits and teacher_head is not None:
        fits = first.shape[1] == teacher_head.shape[0]
    if not fits or first.shape[:1] != tokens:
        raise JaxCompressError(
            f"{name}: {listed} do not match: hidden states are [tokens, d], heads [d, vocab]."
        )
    theirs = first.shape[1:] if teacher_head is None else teacher_head.shape[1:]
    if theirs != vocab and not isinstance(teacher, TopK):
        raise JaxCompressError(
            f"{name}: different vocabularies: {vocab[0]} words of the student and {theirs[0]} of "
            f"the teacher ({listed})."
        )
    for what, x in (("mask", mask), ("labels", labels)):
        if x is not None and jnp.shape(x) != tokens:
            raise JaxCompressError(f"{name}: {what} {list(jnp.shape(x))} for {tokens[0]} tokens.")
    if labels is not None and axis_name is None and not isinstance(labels, _compat.Tracer):
        wrong = (labels < 0) | (labels >= vocab[0])
        wrong &= True if mask is None else jnp.asarray(mask) > 0
        if not isinstance(wrong, _compat.Tracer) and wrong.any():
            raise JaxCompressError(
                f"{name}: label {int(labels[wrong][0])} is out of range: the vocabulary has "
                f"{vocab[0]} words. Give tokens without a label the mask 0."
            )
