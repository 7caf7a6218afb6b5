# SPDX-License-Identifier: Apache-2.0
"""`Format`: which numbers exist. How scales are shared and found is not its business.

A format is a finite grid of numbers. With a scale s and an integer zero point z,

    encode(x, s, z) = saturate(round_half_even(x / s) + z)        decode(c, s, z) = (c - z) * s

in float32 whatever the dtype of x (ONNX QuantizeLinear and DequantizeLinear). A new format
subclasses `Format` once, gives its grid and its rounding, and joins the table in `_table.py`.
A block format also says how its scales are stored, see `_block.py`.
"""

import abc
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._errors import FormatError
from ._checks import check_floating, reject_nan
from ._pack import pack, packed_nbytes, unpack
from ._rounding import check, to_integer

# Under this the reciprocal of a scale overflows, or the scale itself is flushed to zero.
_SMALLEST_SCALE = np.finfo(np.float32).smallest_normal


@dataclasses.dataclass(frozen=True, repr=False)
class Format(abc.ABC):
    """A grid of numbers. Immutable and hashable, so that it can be a static argument of `jit`.

    Attributes:
        name: the name by which `formats.get` finds it.
        bits: bits per value, with its share of the scale of its natural block.
        min: lowest number of the grid.
        max: highest number of the grid.
        dtype: dtype of the codes.
        affine: whether the grid may be shifted by a zero point.
        has_nan: whether there is a code (or a scale) for NaN.
        block: how many values share a scale by definition of the format, or None.
        two_level: whether the scales of blocks are multiples of a scale of the tensor.
        default_range: how `Quantizer` finds scales when it is not told: "absmax", "minmax",
            "absmean", or "fixed" for formats that are used without a scale.
        top: the number of the grid that the largest absolute value is mapped to.
        code_bits: bits of a code, without scales.
    """

    name: str
    bits: float
    min: float
    max: float
    dtype: np.dtype
    # Not annotated: a subclass may make a field of one, which dataclasses would put in front.
    affine = False
    has_nan = False
    block = None
    two_level = False
    default_range = "absmax"

    @abc.abstractmethod
    def values(self) -> np.ndarray:
        """Returns the finite numbers of the grid, float64, ascending, each once."""

    @abc.abstractmethod
    def round(self, v: Any, rounding: str = "half_even", key: Any = None) -> jax.Array:
        """Returns the grid value that each v is rounded to, saturating; NaN stays NaN.

        Args:
            v: float32, any shape, already divided by the scale.
            rounding: "half_even" (nearest, ties to the even code), "half_away" (nearest, ties
                away from zero), "floor" or "stochastic" (one of the two neighbours, unbiased).
            key: PRNG key, for "stochastic" only.
        """

    def to_codes(self, grid: jax.Array) -> jax.Array:
        """Returns the codes of float32 grid values."""
        return grid.astype(self.dtype)

    def from_codes(self, codes: jax.Array) -> jax.Array:
        """Returns the float32 grid values of codes."""
        return codes.astype(jnp.float32)

    @property
    def top(self) -> float:
        return self.max if self.max > 0 else -self.min

    @property
    def code_bits(self) -> int:
        return int(self.bits)

    @property
    def scale_dtype(self) -> np.dtype:
        """The dtype in which scales are stored."""
        return jnp.dtype(jnp.float32)

    @property
    def table_nbytes(self) -> int:
        """Bytes of the numbers of the grid, where they have to be stored beside the codes."""
        return 0

    def global_scale(self, absmax: jax.Array) -> jax.Array | None:
        """Returns the scale of the tensor, from its largest absolute value; None without one."""
        return None

    def find_scale(self, extent: jax.Array, global_scale: Any = None) -> jax.Array:
        """Returns the scale, as stored, that maps an extent to the top of the grid.

        Args:
            extent: float32, any shape, the largest absolute value that a scale is for.
            global_scale: of formats with two levels, broadcasts to the extent.

        Returns:
            extent / top, or 1 where that is zero or subnormal. NaN stays NaN.
        """
        return safe_scale(extent, self.top)

    def factors(self, scale: Any, global_scale: Any = None) -> tuple[jax.Array, ...]:
        """Returns float32 arrays whose product is the scale that was stored."""
        return (jnp.asarray(scale).astype(jnp.float32),)

    def pack(self, codes: jax.Array) -> jax.Array:
        """Returns the codes as they are stored, packed along the last axis.

        Args:
            codes: of dtype `self.dtype`, [..., n].

        Returns:
            uint8 of codes that are smaller than a byte; larger ones as they are.
        """
        return codes if self.code_bits >= 8 else pack(codes, self.code_bits)

    def unpack(self, packed: jax.Array, size: int) -> jax.Array:
        """Returns the codes, [..., size], of what `pack` made of them."""
        return packed if self.code_bits >= 8 else unpack(packed, self.code_bits, size, self.dtype)

    @property
    def unit(self) -> tuple[int, int]:
        """(codes, bytes) of the shortest run of codes that `pack` puts into whole bytes.

        (1, 1) from 8 bits up, where a code is an array element.
        """
        if self.code_bits >= 8:
            return 1, 1
        common = math.gcd(self.code_bits, 8)
        return 8 // common, self.code_bits // common

    def packed_nbytes(self, shape: tuple[int, ...]) -> int:
        """Returns the bytes that `pack` makes of codes of that shape."""
        return packed_nbytes(shape, self.code_bits)

    def settings(self) -> dict[str, Any] | None:
        """Returns {"maker": name, argument: value, ...} of a format that a maker makes."""
        return None

    def encode(
        self,
        x: Any,
        scale: Any = 1.0,
        zero_point: Any = None,
        *,
        rounding: str = "half_even",
        key: Any = None,
    ) -> jax.Array:
        """Returns the codes of x.

        The division is a true one, but under `jit` XLA itself turns the division by a broadcast
        or constant scale into a multiplication by its reciprocal, as it does in code written by
        hand. Codes of values within one float32 rounding of a tie may then differ by one step.

        Args:
            x: floating, any shape.
            scale: broadcastable to the shape of x; floating, or as the format stores it.
            zero_point: integers of the grid, broadcastable to the shape of x; integer formats.
            rounding: "half_even", "half_away", "floor" or "stochastic", as in `round`.
            key: PRNG key, for "stochastic" only.

        Returns:
            Codes of dtype `self.dtype`, in the shape of x.

        Raises:
            FormatError: if x is not floating; if the format takes no zero point; if x / scale is
                NaN somewhere, the format has no NaN and the arrays are concrete (not traced); if
                the rounding is unknown or lacks its key.

        Example:
            >>> import jaxcompress as jc
            >>> jc.formats.int4.encode([0.5, 1.0, -9.0], 0.5)
            Array([ 1,  2, -7], dtype=int8)
        """
        x = jnp.asarray(x)
        check_floating(x.dtype, f"{self.name}.encode")
        check(rounding, key)
        factors = self.factors(scale)
        v = divide(x.astype(jnp.float32), factors)
        self.check_nan(v, factors)
        if zero_point is not None:
            self._check_affine()
            v = to_integer(v, rounding, key) + float32_like(zero_point, x.shape)
            rounding = "half_even"
        return _codes(self, v, rounding, key)

    def decode(self, codes: Any, scale: Any = 1.0, zero_point: Any = None) -> jax.Array:
        """Returns (codes - zero_point) * scale in float32, in the shape of the codes.

        Args:
            codes: any shape; dtype `self.dtype` (any integer dtype for integer formats).
            scale: broadcastable to the shape of the codes; floating, or as the format stores it.
            zero_point: broadcastable to the shape of the codes; integer formats only.

        Raises:
            FormatError: if the codes have another dtype, or the format takes no zero point.

        Example:
            >>> import jaxcompress as jc
            >>> jc.formats.int4.decode(jc.formats.int4.encode([0.6, -9.0], 0.5), 0.5)
            Array([ 0.5, -3.5], dtype=float32)
        """
        codes = jnp.asarray(codes)
        both_integer = all(jnp.issubdtype(d, jnp.integer) for d in (codes.dtype, self.dtype))
        if codes.dtype != self.dtype and not both_integer:
            raise FormatError(
                f"{self.name}.decode takes codes of dtype {self.dtype}, got {codes.dtype}."
            )
        if zero_point is not None:
            self._check_affine()
        return _decoded(self, codes, scale, zero_point)

    def check_nan(self, v: jax.Array, factors: tuple[jax.Array, ...]) -> None:
        """Raises FormatError if v, which was divided by the factors, has NaNs and codes cannot."""
        if not self.has_nan:
            reject_nan(v, self.name)

    def _check_affine(self) -> None:
        if not self.affine:
            raise FormatError(
                f"{self.name} takes no zero point: only integer formats do. Use a symmetric range."
            )

    def __repr__(self) -> str:
        return f"formats.{self.name}"


def safe_scale(extent: jax.Array, top: float, *, signed: bool = False) -> jax.Array:
    """Returns extent / top, or 1 where that is zero or subnormal. NaN stays NaN."""
    scale = lax.div(extent, lax.full_like(extent, top))
    size = lax.abs(scale) if signed else scale
    small = lax.lt(size, lax.full_like(scale, _SMALLEST_SCALE))
    return lax.select(small, lax.full_like(scale, 1), scale)


def divide(v: jax.Array, factors: tuple[jax.Array, ...]) -> jax.Array:
    """Returns float32 v divided by each factor in turn."""
    for factor in factors:
        v = lax.div(v, float32_like(factor, v.shape))
    return v


def multiply(v: jax.Array, factors: tuple[jax.Array, ...]) -> jax.Array:
    """Returns float32 v multiplied by each factor in turn."""
    for factor in factors:
        v = lax.mul(v, float32_like(factor, v.shape))
    return v


def float32_like(a: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns a in float32, broadcast to the shape."""
    return jnp.broadcast_to(jnp.asarray(a).astype(jnp.float32), shape)


# One program instead of one for each operation where arrays are concrete. Division is not among
# them: a true one is promised there.


@functools.partial(jax.jit, static_argnums=(0, 2), inline=True)
def _codes(fmt: Format, v: jax.Array, rounding: str, key: Any) -> jax.Array:
    return fmt.to_codes(fmt.round(v, rounding, key))


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _decoded(fmt: Format, codes: jax.Array, scale: Any, zero_point: Any) -> jax.Array:
    v = fmt.from_codes(codes)
    if zero_point is not None:
        v = v - float32_like(zero_point, codes.shape)
    return multiply(v, fmt.factors(scale))
