# SPDX-License-Identifier: Apache-2.0
"""Choosing the largest scores: exact counts, the same choice on any number of devices.

Nothing is sorted. A threshold is found bit by bit, each time by counting the scores above it,
until the count is the one wanted. Arrays that are split over devices stay where they are and only
counts travel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.jit, inline=True)
def largest(scores: Sequence[jax.Array], count: Any) -> list[jax.Array]:
    """Masks of the `count` largest scores of all arrays together; ties go to the first.

    Args:
      scores: floating-point arrays. NaN counts as larger than infinity, -0 as 0.
      count: how many to choose, an integer or int32[]; may exceed their number.

    Returns:
      bool arrays of their shapes, with exactly `count` True among them.

    >>> largest([jnp.array([1.0, 3.0, 1.0]), jnp.array([[1.0]])], 2)
    [Array([ True,  True, False], dtype=bool), Array([[False]], dtype=bool)]
    """
    wide = any(x.dtype.itemsize > 4 for x in scores)
    keys, start = [], 0
    for x in scores:
        # Pairs in lexicographic order: the score, and for equal ones what is larger in front.
        keys.append((_ordered(x, wide), ~(_places(x.shape) + jnp.uint32(start))))
        start += x.size
    count = jnp.asarray(count, jnp.int32)
    width = 64 if wide else 32

    def total(masks: Sequence[jax.Array]) -> jax.Array:
        parts = [jnp.sum(mask, dtype=jnp.int32) for mask in masks]
        return sum(parts, start=jnp.zeros((), jnp.int32))

    def bisected(bits: int, dtype: Any, exact: Any, above: Callable) -> tuple:
        """The largest number above which there are `count`, and whether there are just as many."""

        def step(state: tuple) -> tuple:
            i, found, _ = state
            higher = found | (jnp.ones((), dtype) << (bits - 1 - i).astype(dtype))
            n = total(above(higher))
            return i + 1, jnp.where(n >= count, higher, found), n == count

        start = (jnp.int32(0), jnp.zeros((), dtype), exact)
        _, found, exact = lax.while_loop(lambda s: ~s[2] & (s[0] < bits), step, start)
        return found, exact

    # First a score, then, where it is not the only one of its value, a place among the equal.
    dtype = keys[0][0].dtype
    high, exact = bisected(width, dtype, count == 0, lambda t: [k >= t for k, _ in keys])

    def among_equals(low: jax.Array) -> list[jax.Array]:
        return [(k > high) | ((k == high) & (p >= low)) for k, p in keys]

    low, _ = bisected(32, jnp.uint32, exact, among_equals)
    return [mask & (count > 0) for mask in among_equals(low)]


def _ordered(x: jax.Array, wide: bool) -> jax.Array:
    """Unsigned integers in the order of the numbers."""
    bits, floats = (jnp.uint64, jnp.float64) if wide else (jnp.uint32, jnp.float32)
    top = jnp.array(1 << (63 if wide else 31), bits)
    x = jnp.where(x == 0, 0, x).astype(floats)
    x = lax.bitcast_convert_type(x, bits)
    return jnp.where(x >= top, ~x, x | top)


def _places(shape: tuple[int, ...]) -> jax.Array:
    """Position of every element in row-major order."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    return place


@functools.partial(jax.jit, static_argnames=("m", "axis"), inline=True)
def n_of_m(scores: jax.Array, n: Any, m: int, axis: int) -> jax.Array:
    """Mask of the n largest of every m consecutive scores along an axis; ties go to the first.

    Args:
      scores: floating-point array.
      n: how many to choose in each group, an integer or int32[].
      m: size of the groups; divides the size of the axis.
      axis: the axis.

    Returns:
      bool array of the same shape.

    >>> n_of_m(jnp.array([1.0, 3.0, 3.0, 3.0]), 2, 4, 0)
    Array([False,  True,  True, False], dtype=bool)
    """
    axis %= scores.ndim
    shape = scores.shape
    split = scores.reshape(*shape[:axis], shape[axis] // m, m, *shape[axis + 1 :])
    parts = [lax.index_in_dim(split, i, axis + 1, keepdims=False) for i in range(m)]
    ranks = [jnp.zeros(parts[0].shape, jnp.int32)] * m  # how many come before
    for j in range(m):
        for i in range(j):
            before = parts[i] >= parts[j]
            ranks[j] = ranks[j] + before
            ranks[i] = ranks[i] + ~before
    return (jnp.stack(ranks, axis + 1) < n).reshape(shape)
