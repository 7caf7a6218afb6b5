# SPDX-License-Identifier: Apache-2.0
"""Choosing the largest scores: exact counts, the same choice on any number of devices.

Nothing is sorted. A threshold is found bit by bit, each time by counting the scores above it, so
that arrays that are split over devices stay where they are and only counts travel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


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
    keys = [_ordered(x, wide) for x in scores]
    count = jnp.asarray(count, jnp.int32)

    def total(of: Callable[..., jax.Array], *more: Sequence) -> jax.Array:
        parts = [jnp.sum(of(*x), dtype=jnp.int32) for x in zip(keys, *more, strict=True)]
        return sum(parts, start=jnp.zeros((), jnp.int32))

    bound = _bisect(keys[0].dtype, lambda t: total(lambda k: k >= t) >= count)
    places, start = [], 0
    for x in scores:
        places.append(_places(x.shape) + jnp.uint32(start))
        start += x.size
    left = count - total(lambda k: k > bound)

    def first(_: None) -> jax.Array:
        fits = lambda end: total(lambda k, i: (k == bound) & (i < end), places) <= left  # noqa: E731
        return _bisect(jnp.dtype("uint32"), fits)

    # Usually one score lies at the threshold, and then there is nothing to look for.
    everyone = lambda _: jnp.uint32(0xFFFFFFFF)  # noqa: E731
    end = lax.cond(total(lambda k: k == bound) <= left, everyone, first, None)
    return [(k > bound) | ((k == bound) & (i < end)) for k, i in zip(keys, places, strict=True)]


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


def _bisect(dtype: Any, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest unsigned integer for which `holds`, which holds for all smaller ones."""
    width = dtype.itemsize * 8

    def step(i: jax.Array, low: jax.Array) -> jax.Array:
        bit = jnp.array(1, dtype) << (width - 1 - i).astype(dtype)
        return jnp.where(holds(low | bit), low | bit, low)

    return lax.fori_loop(0, width, step, jnp.zeros((), dtype))


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
