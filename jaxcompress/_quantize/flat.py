# SPDX-License-Identifier: Apache-2.0
"""Products laid out as XLA likes them: two free dimensions, and weight gradients in a fast order.

On a CPU XLA multiplies matrices well and runs products of more dimensions several times slower, so
that the free dimensions of both operands are merged. The gradient of `x @ w` for w sums over the
first axis of both x and the cotangent, which is slow too (9 times for a head of ten classes): the
smaller of the two is transposed first, behind a barrier, or XLA would merge the transpose back.
`benchmarks/qat.py` measures both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Parameters of a convolution that say what it computes.
CONV = (
    "window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers",
    "feature_group_count", "batch_group_count", "precision",
)  # fmt: skip


class Side(NamedTuple):
    """How one operand becomes a matrix.

    Attributes:
      order: its dimensions, transposed.
      shape: of the matrix.
      summed: the axis of the matrix that is summed over.
    """

    order: tuple[int, ...]
    shape: tuple[int, int]
    summed: int

    def merge(self, x: jax.Array) -> jax.Array:
        if self.order != tuple(range(x.ndim)):
            x = lax.transpose(x, self.order)
        return x if x.shape == self.shape else lax.reshape(x, self.shape)


def sides(numbers: Any, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> tuple[Side, Side] | None:
    """How the operands of a dot become matrices; None if it has batch dimensions.

    >>> sides((((2,), (0,)), ((), ())), (4, 5, 8), (8, 3))[0]
    Side(order=(0, 1, 2), shape=(20, 8), summed=1)
    """
    (summed, batch) = numbers
    if batch[0]:
        return None
    return _side(lhs, tuple(summed[0])), _side(rhs, tuple(summed[1]))


def _side(shape: tuple[int, ...], summed: tuple[int, ...]) -> Side:
    free = tuple(d for d in range(len(shape)) if d not in summed)
    k, n = (math.prod(shape[d] for d in dims) for dims in (summed, free))
    every = tuple(range(len(shape)))
    if summed + free == every and free + summed != every:
        return Side(every, (k, n), 0)
    return Side(free + summed, (n, k), 1)


def dot(lhs: jax.Array, rhs: jax.Array, numbers: Any, precision: Any, dtype: Any) -> jax.Array:
    """`lax.dot_general` of matrices, in the shape that it has of the operands as they are."""
    found = sides(numbers, lhs.shape, rhs.shape)
    if found is None:
        return lax.dot_general(lhs, rhs, numbers, precision=precision, preferred_element_type=dtype)
    a, b = found
    y = matmul(a.merge(lhs), b.merge(rhs), a.summed, b.summed, precision, dtype)
    return lax.reshape(y, _shape(lhs, rhs, numbers))


def dot_for_right(
    lhs: jax.Array, rhs: jax.Array, numbers: Any, precision: Any, dtype: Any
) -> jax.Array:
    """The same as `dot`, written so that its transpose, the gradient of `rhs`, is fast."""
    found = sides(numbers, lhs.shape, rhs.shape)
    if found is None or found[0].summed != 1:
        return dot(lhs, rhs, numbers, precision, dtype)
    a, b = found
    left, right, j = a.merge(lhs), b.merge(rhs), b.summed
    (m, k), n = left.shape, right.shape[1 - j]
    barrier, turned = lax.optimization_barrier, functools.partial(lax.transpose, permutation=(1, 0))
    if j == 1:  # its gradient is g^T l
        y = turned(barrier(matmul(right, left, 1, 1, precision, dtype)))
    elif isinstance(m, int) and m * n + k * n < m * k:  # (g^T l)^T
        y = turned(barrier(matmul(barrier(turned(right)), left, 1, 1, precision, dtype)))
    else:  # l^T g
        y = matmul(barrier(turned(left)), right, 0, 0, precision, dtype)
    return lax.reshape(y, _shape(lhs, rhs, numbers))


def split_by_mesh(arrays: Iterable[jax.Array]) -> bool:
    """Whether a mesh of explicit axes splits an array, which then has to stay as it is laid out."""
    return any(any(jax.typeof(x).sharding.spec) for x in arrays)


def _shape(lhs: jax.Array, rhs: jax.Array, numbers: Any) -> tuple[int, ...]:
    pairs = zip((lhs, rhs), numbers[0], strict=True)
    return tuple(n for x, summed in pairs for d, n in enumerate(x.shape) if d not in summed)


def matmul(a: jax.Array, b: jax.Array, i: int, j: int, precision: Any, dtype: Any) -> jax.Array:
    """Sum over axis `i` of a and axis `j` of b."""
    numbers = (((i,), (j,)), ((), ()))

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=dtype)

    def padded(a: jax.Array, b: jax.Array) -> jax.Array:
        a = lax.pad(a, np.zeros((), a.dtype), [(0, int(d != i), 0) for d in range(2)])
        return lax.slice_in_dim(product(a, b), 0, 1)

    if dtype == jnp.int32 and a.shape[1 - i] == 1:  # XLA has no fast kernel for one row of int8
        return lax.platform_dependent(a, b, cpu=padded, default=product)
    return product(a, b)


def conv(lhs: jax.Array, rhs: jax.Array, params: tuple, dtype: Any) -> jax.Array:
    """`lax.conv_general_dilated` with these parameters."""
    return lax.conv_general_dilated(lhs, rhs, **dict(params), preferred_element_type=dtype)
