# SPDX-License-Identifier: Apache-2.0
"""Divergences over a vocabulary, from hidden states and heads, without the logits of all tokens.

A scan over chunks of tokens computes a chunk's logits, its loss and the gradients of that loss
for the student's hidden states and head at once: logits are never kept, nor computed twice. The
backward pass only multiplies by the cotangent.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._core import _compat
from .._errors import JaxCompressError
from ._loss import described, fraction, positive
from ._top_k import TopK, log_rest

CHUNK = 256  # tokens: 33 MB of float32 logits for 32000 words
BLOCK = 8  # tokens: 1 MB


class _Setting(NamedTuple):
    """What is static: the divergence, with its settings, and the size of a chunk."""

    name: str
    divergence: Callable
    temperature: float
    alpha: float
    chunk: int
    axis_name: str | None


class _Sums(NamedTuple):
    """Sum and maximum over the vocabulary, of which a device may hold a part."""

    axis_name: str | None

    def sum(self, x: Array) -> Array:
        x = jnp.sum(x, axis=-1, keepdims=True)
        return lax.psum(x, self.axis_name) if self.axis_name else x

    def log_softmax(self, z: Array) -> Array:
        top = jnp.max(z, axis=-1, keepdims=True)
        top = lax.pmax(top, self.axis_name) if self.axis_name else top
        return z - top - jnp.log(self.sum(jnp.exp(z - top)))


def _kl(q: Array, p: Array, sums: _Sums) -> tuple[Array, Array]:
    """KL(p || q) and its derivative by the logits of q, of log probabilities."""
    mass = jnp.exp(p)
    return sums.sum(mass * jnp.where(mass > 0, p - q, 0)), jnp.exp(q) - mass


def _reverse_kl(q: Array, p: Array, sums: _Sums) -> tuple[Array, Array]:
    mass, apart = jnp.exp(q), q - p
    value = sums.sum(mass * jnp.where(mass > 0, apart, 0))
    return value, mass * jnp.where(mass > 0, apart - value, 0)


def _jsd(q: Array, p: Array, sums: _Sums, beta: float) -> tuple[Array, Array]:
    m = jnp.logaddexp(q + jnp.log(1 - beta), p + jnp.log(beta))
    first, _ = _kl(m, p, sums)
    second, slope = _reverse_kl(q, m, sums)  # d/dq of KL(q || m) at a fixed m is all there is
    return beta * first + (1 - beta) * second, (1 - beta) * slope


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
    return _fused("vocab_kl", _kl, temperature, alpha, chunk, axis_name)(
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
    return _fused("vocab_reverse_kl", _reverse_kl, temperature, alpha, chunk, axis_name)(
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
    ends = {0: _kl, 1: _reverse_kl}
    divergence = ends.get(beta) or functools.partial(_jsd, beta=beta)  # type: ignore[call-overload]
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
        if isinstance(teacher, TopK) and divergence is not _kl:
            raise JaxCompressError(f"{name}: a stored top k says too little; use vocab_kl.")
        _check(name, hidden, head, teacher, teacher_head, mask, labels, axis_name)
        n = hidden.shape[0]
        weights = jnp.ones(n) if mask is None else mask
        weights = lax.stop_gradient(jnp.asarray(weights)).astype(jnp.float32)
        total = jnp.sum(weights)
        weights = weights / jnp.where(total > 0, total, 1)
        size = max(1, min(chunk or CHUNK, n))
        setting = _Setting(name, divergence, temperature, alpha, size, axis_name)
        return _loss(setting, hidden, head, (teacher, teacher_head, weights, labels))

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(setting: _Setting, hidden: Array, head: Array, rest: Any) -> Array:
    return _scan(setting, hidden, head, rest, gradients=False)[0]


def _forward(setting: _Setting, hidden: Array, head: Array, rest: Any):
    value, *gradients = _scan(setting, hidden, head, rest, gradients=True)
    return value, (hidden, head, gradients)


def _backward(setting: _Setting, residuals: Any, g: Array):
    hidden, head, gradients = residuals
    out = [_alike((g * d).astype(x.dtype), x) for d, x in zip(gradients, (hidden, head))]
    return (*out, None)


_loss.defvjp(_forward, _backward)


def _alike(gradient: Array, x: Array) -> Array:
    """Summed over the mesh axes along which x is one value."""
    axes = _compat.varying_axes(gradient) - _compat.varying_axes(x)
    return lax.psum(gradient, tuple(sorted(axes))) if axes else gradient


def _scan(setting: _Setting, hidden: Array, head: Array, rest: Any, gradients: bool):
    """(loss, its gradients by hidden states and head if asked for)."""
    teacher, teacher_head, weights, labels = rest
    n, size = hidden.shape[0], setting.chunk
    count = -(-n // size)

    def chunks(x):
        x = jnp.pad(x, [(0, count * size - n)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(count, size, *x.shape[1:])

    xs = jax.tree.map(chunks, (hidden, teacher, weights, labels))
    axes = frozenset().union(*map(_compat.varying_axes, jax.tree.leaves((hidden, head, rest))))
    zeros = [jnp.zeros(()), jnp.zeros(head.shape)] if gradients else [jnp.zeros(())]
    start = [lax.pcast(z, tuple(sorted(axes)), to="varying") if axes else z for z in zeros]

    def step(carry, x):
        h, t, w, y = x
        t = t if teacher_head is None else _logits(t, teacher_head)
        rows, dz = _in_blocks(setting, _logits(h, head), t, w, y, gradients)
        value = carry[0] + jnp.sum(rows)
        if not gradients:
            return [value], None
        h = jnp.where(w[:, None] > 0, h, 0)
        dz = dz.astype(jnp.promote_types(h.dtype, head.dtype))
        dh = jnp.matmul(dz, head.T, preferred_element_type=jnp.float32)
        dw = jnp.matmul(h.T, dz, preferred_element_type=jnp.float32)
        return [value, carry[1] + dw], dh

    (value, *d_head), d_hidden = lax.scan(step, start, xs)
    value = _one(value, setting.axis_name)
    if d_hidden is None:
        return (value,)
    d_hidden = d_hidden.reshape(count * size, -1)[:n]
    return value, d_hidden, *d_head


def _one(value: Array, axis_name: str | None) -> Array:
    """The loss, equal on all devices along the vocabulary, as one value."""
    if axis_name is None or axis_name not in _compat.varying_axes(value):
        return value
    return lax.pmean(value, axis_name)


def _in_blocks(setting: _Setting, z, teacher, weights, labels, gradients: bool):
    """`_rows` of a chunk; on CPUs a few rows at a time, which then stay in the cache.

    Without `gradients` the second result is of no use.
    """

    def at_once(z, rest):
        return _rows(setting, z, *rest)

    def by_blocks(z, rest):
        def block(z, i):
            def part(x):
                return lax.dynamic_slice_in_dim(x, i * size, size)

            rows, dz = _rows(setting, part(z), *jax.tree.map(part, rest))
            if gradients:  # in the place of the logits
                z = lax.dynamic_update_slice_in_dim(z, dz, i * size, 0)
            return z, rows

        dz, rows = lax.scan(block, z, jnp.arange(len(z) // size))
        return rows.reshape(-1), dz

    size, rest = math.gcd(len(z), BLOCK), (teacher, weights, labels)
    if setting.axis_name:  # devices would have to agree once a block
        return at_once(z, rest)
    return lax.platform_dependent(z, rest, cpu=by_blocks, default=at_once)


def _rows(setting: _Setting, z: Array, teacher: Any, weights: Array, labels: Array | None):
    """(weighted loss of each token, its derivative by the student's logits z)."""
    T, sums = setting.temperature, _Sums(setting.axis_name)
    q = sums.log_softmax(z / T)
    if isinstance(teacher, TopK):
        t = _completed(teacher, sums.log_softmax(z), sums)
    else:
        t = teacher.astype(jnp.float32)
    value, slope = setting.divergence(q, sums.log_softmax(t / T), sums)
    value, slope = T**2 * value, T * slope
    if labels is not None:
        hot = labels[:, None] - _offset(z, setting.axis_name) == jnp.arange(z.shape[1])[None]
        own = q if T == 1 else sums.log_softmax(z)
        found, a = sums.sum(jnp.where(hot, own, 0)), setting.alpha
        found = jnp.where(sums.sum(hot) > 0, found, jnp.nan)  # a label that is no word
        value, slope = a * value - (1 - a) * found, a * slope + (1 - a) * (jnp.exp(own) - hot)
    w = weights[:, None]
    value, slope = (jnp.where(w > 0, w * x, 0) for x in (value, slope))
    return value[:, 0], slope


def _logits(hidden: Array, head: Array) -> Array:
    return jnp.matmul(hidden, head, preferred_element_type=jnp.float32)


def _offset(z: Array, axis_name: str | None) -> Array | int:
    """The first word of this device's part of the vocabulary."""
    return lax.axis_index(axis_name) * z.shape[1] if axis_name else 0


def _completed(stored: TopK, q: Array, sums: _Sums) -> Array:
    """`TopK.logits`, for a part of the vocabulary."""
    place = stored.indices - _offset(q, sums.axis_name)
    place = jnp.where((place >= 0) & (place < q.shape[1]), place, q.shape[1])  # out: dropped
    rows = jnp.arange(q.shape[0])[:, None]
    hit = jnp.zeros(q.shape, bool).at[rows, place].set(True, mode="drop")
    student_rest = jnp.log(sums.sum(jnp.where(hit, 0, jnp.exp(q))))
    log_probs = stored.log_probs.astype(q.dtype)
    spread = jnp.where(hit, 0, log_rest(log_probs) + q - student_rest)
    return spread.at[rows, place].set(log_probs, mode="drop")
