# SPDX-License-Identifier: Apache-2.0
"""Matrix products with a large QTensor on a CPU: a block of output channels at a time.

XLA does not fuse the unpacking into a matrix product on CPUs: it writes the whole float weight
first. A loop over blocks of the other axis of the weight writes one block at a time. Every output
still is one sum over the whole contracted axis, in the order in which XLA's matmul adds up; with
blocks of 256 and more channels and 512 and more terms that order does not depend on the block on
CPUs with AVX512, so that the result has the same bits as that of the whole product there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .qtensor import QTensor, is_qtensor

# (output channels of a block: tried in this order, at least 4 blocks)
_BLOCKS = (512, 256)
_SMALLEST = 2**20  # values of a weight: less is not worth a loop
_TERMS = 512


def dot_general(
    lhs: Any, rhs: Any, run: Callable[[list], list], part: Callable, **params: Any
) -> list | None:
    """The product, in blocks where it is lowered for a CPU; None if the weight does not fit.

    Args:
        lhs: array or QTensor.
        rhs: array or QTensor.
        run: the product of arrays.
        part: `part(q, axis, i, size)` is block `i` of `size` along an axis of a QTensor, or None.
        params: parameters of the primitive.
    """
    side = 1 if is_qtensor(rhs) else 0
    q, x = (rhs, lhs) if side else (lhs, rhs)
    (contracting, batch) = params["dimension_numbers"]
    free = [a for a in range(q.ndim) if a not in (*contracting[side], *batch[side])]
    if is_qtensor(x) or batch[side] or q.size < _SMALLEST or not free:
        return None
    axis = max(free, key=lambda a: q.shape[a])
    size = next((b for b in _BLOCKS if q.shape[axis] % b == 0 and q.shape[axis] >= 4 * b), None)
    terms = math.prod(q.shape[a] for a in contracting[side])
    vector = x.size == terms and max(contracting[side]) > axis  # other kernels, another order
    if size is None or terms < _TERMS or vector or part(q, axis, 0, size) is None:
        return None
    count = q.shape[axis] // size
    place = free.index(axis) + (x.ndim - len(contracting[0]) if side else 0)

    def blocks(q: QTensor, x: jax.Array) -> jax.Array:
        def one(i: jax.Array) -> jax.Array:
            w = part(q, axis, i, size).dequantize()
            return run([x, w] if side else [w, x])[0]

        out = jnp.moveaxis(lax.map(jax.checkpoint(one), jnp.arange(count)), 0, place)
        sizes = (*out.shape[:place], count * size, *out.shape[place + 2 :])
        return lax.reshape(out, sizes)

    def whole(q: QTensor, x: jax.Array) -> jax.Array:
        return run([x, q.dequantize()] if side else [q.dequantize(), x])[0]

    return [lax.platform_dependent(q, x, cpu=blocks, default=whole)]
