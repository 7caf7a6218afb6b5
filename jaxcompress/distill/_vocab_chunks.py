# SPDX-License-Identifier: Apache-2.0
"""A divergence over a vocabulary and its gradients, a chunk of tokens at a time.

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
from ._top_k import TopK, log_rest

BLOCK = 8  # tokens: 1 MB of float32 logits for 32000 words


class Setting(NamedTuple):
    """What is static: the divergence, with its settings, and the size of a chunk."""

    name: str
    divergence: Callable
    temperature: float
    alpha: float
    chunk: int
    axis_name: str | None


class Sums(NamedTuple):
    """Sum and maximum over the vocabulary, of which a device may hold a part."""

    axis_name: str | None

    def sum(self, x: Array) -> Array:
        x = jnp.sum(x, axis=-1, keepdims=True)
        return lax.psum(x, self.axis_name) if self.axis_name else x

    def log_softmax(self, z: Array) -> Array:
        top = jnp.max(z, axis=-1, keepdims=True)
        top = lax.pmax(top, self.axis_name) if self.axis_name else top
        return z - top - jnp.log(self.sum(jnp.exp(z - top)))


def forward_kl(q: Array, p: Array, sums: Sums) -> tuple[Array, Array]:
    """KL(p || q) and its derivative by the logits of q, of log probabilities."""
    mass = jnp.exp(p)
    return sums.sum(mass * jnp.where(mass > 0, p - q, 0)), jnp.exp(q) - mass


def reverse_kl(q: Array, p: Array, sums: Sums) -> tuple[Array, Array]:
    mass, apart = jnp.exp(q), q - p
    value = sums.sum(mass * jnp.where(mass > 0, apart, 0))
    return value, mass * jnp.where(mass > 0, apart - value, 0)


def jsd(q: Array, p: Array, sums: Sums, beta: float) -> tuple[Array, Array]:
    m = jnp.logaddexp(q + jnp.log(1 - beta), p + jnp.log(beta))
    first, _ = forward_kl(m, p, sums)
    second, slope = reverse_kl(q, m, sums)  # d/dq of KL(q || m) at a fixed m is all there is
    return beta * first + (1 - beta) * second, (1 - beta) * slope


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def loss(setting: Setting, hidden: Array, head: Array, rest: Any) -> Array:
    return _scan(setting, hidden, head, rest, gradients=False)[0]


def _forward(setting: Setting, hidden: Array, head: Array, rest: Any):
    value, *gradients = _scan(setting, hidden, head, rest, gradients=True)
    return value, (hidden, head, gradients)


def _backward(setting: Setting, residuals: Any, g: Array):
    hidden, head, gradients = residuals
    out = [_alike((g * d).astype(x.dtype), x) for d, x in zip(gradients, (hidden, head))]
    return (*out, None)


loss.defvjp(_forward, _backward)


def _alike(gradient: Array, x: Array) -> Array:
    """Summed over the mesh axes along which x is one value."""
    axes = _compat.varying_axes(gradient) - _compat.varying_axes(x)
    return lax.psum(gradient, tuple(sorted(axes))) if axes else gradient


def _scan(setting: Setting, hidden: Array, head: Array, rest: Any, gradients: bool):
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


def _in_blocks(setting: Setting, z, teacher, weights, labels, gradients: bool):
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


def _rows(setting: Setting, z: Array, teacher: Any, weights: Array, labels: Array | None):
    """(weighted loss of each token, its derivative by the student's logits z)."""
    T, sums = setting.temperature, Sums(setting.axis_name)
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


def _completed(stored: TopK, q: Array, sums: Sums) -> Array:
    """`TopK.logits`, for a part of the vocabulary."""
    place = stored.indices - _offset(q, sums.axis_name)
    place = jnp.where((place >= 0) & (place < q.shape[1]), place, q.shape[1])  # out: dropped
    rows = jnp.arange(q.shape[0])[:, None]
    hit = jnp.zeros(q.shape, bool).at[rows, place].set(True, mode="drop")
    student_rest = jnp.log(sums.sum(jnp.where(hit, 0, jnp.exp(q))))
    log_probs = stored.log_probs.astype(q.dtype)
    spread = jnp.where(hit, 0, log_rest(log_probs) + q - student_rest)
    return spread.at[rows, place].set(log_probs, mode="drop")
