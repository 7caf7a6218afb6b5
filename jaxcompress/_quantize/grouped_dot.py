# SPDX-License-Identifier: Apache-2.0
"""Products of int8 activations with a weight in groups: a loop over groups of products of integers.

    y[m, n] = s[m] sum_g s[g, n] sum_{k in g} q_x[m, k] q_w[k, n]

The inner sums are exact in int32. A group after the other: XLA would make slow code of many
products side by side, and of one batched product. Codes of fewer than 8 bits are unpacked within
the loop, so that the weight never exists unpacked.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import formats
from .._core.blocks import Blocks
from .._core.qtensor import QTensor
from . import flat
from .integer_dot import Codes, longest, widest


def in_groups(w: QTensor) -> bool:
    """Whether a weight [k, n] is one that `grouped_product` takes.

    Its groups lie along k, its codes are signed integers without zero points, packed along n.
    """
    cut, fmt = w.blocks, w.format
    if not isinstance(cut, Blocks) or not isinstance(fmt, formats.Integer) or w.ndim != 2:
        return False
    if cut.axis != (-2,) or w.axis != -1 or w.shape[0] % cut.size or fmt.min >= 0:
        return False
    if w.zero_point is not None or w.global_scale is not None:
        return False
    return cut.size <= longest(128, widest(fmt, True))


def grouped_product(x: Codes, w: QTensor, dtype: Any = jnp.float32) -> jax.Array:
    """x times a weight whose groups lie along its first axis.

    Args:
      x: codes int8[..., k], scales of whole rows, no zero points.
      w: float[k, n] that is `in_groups`.
      dtype: of the result.

    Returns:
      [..., n]; without a derivative.

    >>> from jaxcompress import Quantizer
    >>> w = Quantizer("int4", "group:2").quantize(jnp.array([[7.0], [0.0], [14.0], [2.0]]), axis=0)
    >>> x = Codes(jnp.ones((1, 4), jnp.int8), jnp.full((1, 1), 0.5))
    >>> grouped_product(x, w)
    Array([[11.5]], dtype=float32)
    """
    fmt, (k, n) = w.format, w.shape
    assert isinstance(w.blocks, Blocks)
    size = w.blocks.size
    count = k // size
    rows = lax.reshape(x.codes, (x.codes.size // k, count, size))

    def step(total: jax.Array, group: tuple) -> tuple[jax.Array, None]:
        a, packed, scale = group
        b = fmt.unpack(packed, n)
        y = lax.convert_element_type(flat.matmul(a, b, 1, 0, None, jnp.int32), jnp.float32)
        return lax.add(total, lax.mul(y, lax.broadcast_in_dim(scale, y.shape, (0, 1)))), None

    groups = (
        lax.transpose(rows, (1, 0, 2)),
        lax.reshape(w.packed, (count, size, w.packed.shape[1])),
        w.scale,
    )
    # Varies over mesh axes as the operands do.
    start = step(jnp.zeros((rows.shape[0], n), jnp.float32), jax.tree.map(lambda v: v[0], groups))
    total, _ = lax.scan(step, start[0], jax.tree.map(lambda v: v[1:], groups))
    total = lax.reshape(total, (*x.codes.shape[:-1], n))
    scaled = lax.mul(total, lax.broadcast_in_dim(x.scale, total.shape, tuple(range(total.ndim))))
    return lax.convert_element_type(scaled, dtype)
