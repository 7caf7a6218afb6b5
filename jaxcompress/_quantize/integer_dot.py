# SPDX-License-Identifier: Apache-2.0
"""Products of integers: int8 operands, sums in int32, and scales afterwards.

    y = s_l s_r sum (q_l - z_l) (q_r - z_r)
      = s_l s_r (sum q_l q_r - z_l sum q_r - z_r sum q_l + z_l z_r n)

The sums are exact: int32 wraps around, and `longest` says for how many terms the result fits.
Scales and zero points are those of output rows and columns, never of what is summed over.
Jacob et al. 2018, Quantization and Training of Neural Networks, section 2.3.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import formats
from .._core.qtensor import QTensor
from .._core.sites import Site
from ..formats import Format
from . import flat


class Codes(NamedTuple):
    """One operand in integers, (codes - zero_point) * scale, in the layout of the operand.

    Attributes:
      codes: int8.
      scale: float32, 1 along axes that share it: all that the product sums over.
      zero_point: int32 like `scale`, or None.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None

    def decode(self, dtype: Any) -> jax.Array:
        """The values, computed in float32."""
        v = lax.convert_element_type(self.codes, jnp.float32)
        if self.zero_point is not None:
            v = lax.sub(v, _like(lax.convert_element_type(self.zero_point, v.dtype), v.shape))
        return lax.convert_element_type(lax.mul(v, _like(self.scale, v.shape)), dtype)


class Dot(NamedTuple):
    """A `lax.dot_general`: its dimension numbers and the name of the dtype of its result."""

    numbers: tuple
    dtype: str

    def terms(self, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> int:
        """How many products one result sums."""
        return math.prod(lhs[d] for d in self.numbers[0][0])

    def sums(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        """Sums of products of int8 in int32."""
        return flat.dot(lhs, rhs, self.numbers, None, jnp.int32)

    def alone(self, pair: tuple[jax.Array, jax.Array], i: int, ndim: int) -> jax.Array:
        """Sums of operand `i` of a pair without the other, in the layout of the result."""
        axes, x = self.numbers[0][i], lax.convert_element_type(pair[i], jnp.int32)
        x = lax.expand_dims(lax.reduce(x, np.int32(0), lax.add, axes), sorted(axes))
        return self.spread(x, i, ndim)

    def spread(self, x: jax.Array, i: int, ndim: int) -> jax.Array:
        """What has one value for each row of operand `i`, in the layout of the result."""
        summed, batch = (pair[i] for pair in self.numbers)
        free = [d for d in range(x.ndim) if d not in (*summed, *batch)]
        x = lax.transpose(x, (*batch, *free, *summed))
        lead, own = x.shape[: len(batch)], x.shape[len(batch) : len(batch) + len(free)]
        gap = (1,) * (ndim - len(batch) - len(free))
        return lax.reshape(x, (*lead, *gap, *own) if i else (*lead, *own, *gap))


class Conv(NamedTuple):
    """A `lax.conv_general_dilated` with one batch group: its parameters, sorted, and a dtype."""

    params: tuple
    dtype: str

    def terms(self, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> int:
        numbers = dict(self.params)["dimension_numbers"]
        return math.prod(rhs[d] for d in numbers.rhs_spec[1:])

    def sums(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return flat.conv(lhs, rhs, self.params, jnp.int32)

    def alone(self, pair: tuple[jax.Array, jax.Array], i: int, ndim: int) -> jax.Array:
        """As of `Dot`. What padding adds is zero whatever the zero point: it is not counted."""
        ones = [lax.full_like(x, 1) for x in pair]
        if i == 1:  # the same for all examples
            ones[0] = lax.slice_in_dim(
                ones[0], 0, 1, axis=dict(self.params)["dimension_numbers"].lhs_spec[0]
            )
        return self.sums(*((pair[0], ones[1]) if i == 0 else (ones[0], pair[1])))

    def spread(self, x: jax.Array, i: int, ndim: int) -> jax.Array:
        numbers = dict(self.params)["dimension_numbers"]
        own, place = (numbers.lhs_spec, numbers.rhs_spec)[i][0], numbers.out_spec[i]
        shape = [x.shape[own] if d == place else 1 for d in range(ndim)]
        return lax.reshape(x, shape)


Operation = Dot | Conv


def operation_of(site: Site) -> Operation | None:
    """The product of a site; None where there is none of integers."""
    dtype = site.out_avals[0].dtype.name
    if site.op == "dot_general" and site.params.get("out_sharding") is None:
        return Dot(site.params["dimension_numbers"], dtype)
    if site.op == "conv_general_dilated" and site.params["batch_group_count"] == 1:
        params = {k: v for k, v in site.params.items() if k in flat.CONV}
        return Conv(tuple(sorted(params.items())), dtype)
    return None


def product(op: Operation, lhs: Codes, rhs: Codes) -> jax.Array:
    """The operation on two operands in integers, with `op.dtype`; it has no derivative.

    Args:
      op: what `operation_of` found.
      lhs, rhs: the operands; the scales of a convolution are per example and output channel.

    >>> numbers = (((1,), (0,)), ((), ()))
    >>> x = Codes(jnp.array([[1, -2]], jnp.int8), jnp.array([[0.5]]))
    >>> w = Codes(jnp.array([[3], [4]], jnp.int8), jnp.array([[2.0]]), jnp.array([[1]]))
    >>> product(Dot(numbers, "float32"), x, w)
    Array([[-4.]], dtype=float32)
    """
    total = op.sums(lhs.codes, rhs.codes)
    if lhs.zero_point is not None or rhs.zero_point is not None:
        total = lax.sub(total, _correction(op, lhs, rhs, total.shape))
    y = lax.convert_element_type(total, jnp.float32)
    a, b = (op.spread(x.scale, i, y.ndim) for i, x in enumerate((lhs, rhs)))
    if 1 in (a.size, b.size):
        y = lax.mul(y, _like(a * b, y.shape))
    else:
        y = lax.mul(lax.mul(y, _like(a, y.shape)), _like(b, y.shape))
    return lax.convert_element_type(y, op.dtype)


def _correction(op: Operation, lhs: Codes, rhs: Codes, shape: tuple[int, ...]) -> jax.Array:
    """z_l sum q_r + z_r (sum q_l - n z_l), int32 in the shape of the result."""
    zl, zr = (
        None if x.zero_point is None else _like(op.spread(x.zero_point, i, len(shape)), shape)
        for i, x in enumerate((lhs, rhs))
    )
    pair, out = (lhs.codes, rhs.codes), None

    def alone(pair: tuple[jax.Array, jax.Array], i: int) -> jax.Array:
        return _like(op.alone(pair, i, len(shape)), shape)

    if zl is not None:
        out = lax.mul(zl, alone(pair, 1))
    if zr is not None:
        rest = alone(pair, 0)
        if zl is not None:
            ones = lax.full_like(rhs.codes, 1)
            rest = lax.sub(rest, lax.mul(zl, alone((lhs.codes, ones), 1)))
        out = lax.mul(zr, rest) if out is None else lax.add(out, lax.mul(zr, rest))
    assert out is not None
    return out


def whole(fmt: Format) -> bool:
    """Whether the numbers of a format are integers that fit in eight bits."""
    return isinstance(fmt, formats.Integer | formats.Ternary | formats.Binary)


def widest(fmt: Format, symmetric: bool) -> int:
    """The largest |codes - zero_point|."""
    return int(max(-fmt.min, fmt.max) if symmetric else fmt.max - fmt.min)


def longest(lhs: int, rhs: int) -> int:
    """How many terms a sum may have whose operands are at most so large."""
    return (2**31 - 1) // (lhs * rhs)


def codes_from_grid(grid: jax.Array, scale: jax.Array, zero: Any, fmt: Format) -> Codes:
    """Codes of float32 numbers of a `whole` format, zero point included in them."""
    if zero is None and fmt.max <= 127:
        return Codes(lax.convert_element_type(grid, jnp.int8), scale)
    if zero is None:
        zero = lax.full_like(scale, 0)
    if fmt.max - fmt.min <= 127:
        grid = lax.sub(grid, _like(zero, grid.shape))
        return Codes(lax.convert_element_type(grid, jnp.int8), scale)
    shift = np.float32(128 if fmt.max > 127 else 0)
    codes, zero = lax.sub(grid, shift), lax.sub(zero, shift)
    return Codes(
        lax.convert_element_type(codes, jnp.int8), scale, lax.convert_element_type(zero, jnp.int32)
    )


def codes_of(q: QTensor) -> Codes | None:
    """The codes of a packed array; None where values are no integers times a scale of a row."""
    if not whole(q.format) or q.blocks is not None or q.global_scale is not None:
        return None
    zero = None if q.zero_point is None else lax.convert_element_type(q.zero_point, jnp.float32)
    if zero is None and q.format.dtype == jnp.int8 and isinstance(q.format, formats.Integer):
        return Codes(q.codes, q.scale)
    return codes_from_grid(q.format.from_codes(q.codes), q.scale, zero, q.format)


def _like(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, tuple(range(x.ndim)))
