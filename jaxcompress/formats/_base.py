# SPDX-License-Identifier: Apache-2.0
"""`Format`: which numbers exist. How scales are shared and found is not its business.

A format is a finite grid of numbers. With a scale s and an integer zero point z,

    encode(x, s, z) = saturate(round_half_even(x / s) + z)        decode(c, s, z) = (c - z) * s

in float32 whatever the dtype of x (ONNX QuantizeLinear and DequantizeLinear). A new format
subclasses `Format` once, gives its grid and its rounding, and joins the table in `_table.py`.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._errors import FormatError


@dataclasses.dataclass(frozen=True, repr=False)
class Format(abc.ABC):
    """A grid of numbers. Immutable and hashable, so that it can be a static argument of `jit`.

    Attributes:
        name: the name by which `formats.get` finds it.
        bits: bits per value.
        min: lowest number of the grid.
        max: highest number of the grid, the one that the largest absolute value is mapped to.
        dtype: dtype of the codes.
        affine: whether the grid may be shifted by a zero point.
        has_nan: whether there is a code for NaN.
    """

    name: str
    bits: int
    min: float
    max: float
    dtype: np.dtype
    affine: ClassVar[bool]
    has_nan: ClassVar[bool]

    @abc.abstractmethod
    def values(self) -> np.ndarray:
        """Returns the finite numbers of the grid, float64, ascending, each once."""

    @abc.abstractmethod
    def round(self, v: jax.Array) -> jax.Array:
        """Returns the nearest grid value of each v: half to even, saturating, NaN stays NaN.

        Args:
            v: float32, any shape, already divided by the scale.
        """

    def encode(self, x: Any, scale: Any, zero_point: Any = None) -> jax.Array:
        """Returns the codes of x.

        The division is a true one, but under `jit` XLA itself turns the division by a broadcast
        or constant scale into a multiplication by its reciprocal, as it does in code written by
        hand. Codes of values within one float32 rounding of a tie may then differ by one step.

        Args:
            x: floating, any shape.
            scale: positive, broadcastable to the shape of x.
            zero_point: integers of the grid, broadcastable to the shape of x; integer formats.

        Returns:
            Codes of dtype `self.dtype`, in the shape of x.

        Raises:
            FormatError: if x is not floating; if the format takes no zero point; if x / scale is
                NaN somewhere, the format has no NaN and the arrays are concrete (not traced).

        Example:
            >>> import jaxcompress as jc
            >>> jc.formats.int4.encode([0.5, 1.0, -9.0], 0.5)
            Array([ 1,  2, -7], dtype=int8)
        """
        x = jnp.asarray(x)
        check_floating(x.dtype, f"{self.name}.encode")
        v = lax.div(x.astype(jnp.float32), _float32_like(scale, x.shape))
        if not self.has_nan:
            reject_nan(v, self.name)
        if zero_point is not None:
            self._check_affine()
            v = _round_half_even(v) + _float32_like(zero_point, x.shape)
        return self.round(v).astype(self.dtype)

    def decode(self, codes: Any, scale: Any, zero_point: Any = None) -> jax.Array:
        """Returns (codes - zero_point) * scale in float32, in the shape of the codes.

        Args:
            codes: any shape; dtype `self.dtype` (any integer dtype for integer formats).
            scale: broadcastable to the shape of the codes.
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
        v = codes.astype(jnp.float32)
        if zero_point is not None:
            self._check_affine()
            v = v - _float32_like(zero_point, codes.shape)
        return v * _float32_like(scale, codes.shape)

    def _check_affine(self) -> None:
        if not self.affine:
            raise FormatError(
                f"{self.name} takes no zero point: only integer formats do. Use a symmetric range."
            )

    def __repr__(self) -> str:
        return f"formats.{self.name}"


def check_floating(dtype: Any, what: str) -> None:
    """Raises FormatError unless `dtype` is floating; `what` names the caller."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise FormatError(
            f"{what} takes an array of floating dtype, got {jnp.dtype(dtype)}. "
            "Convert it with .astype(float32) if its integers are values and not codes."
        )


def reject_nan(v: jax.Array, name: str) -> None:
    """Raises FormatError if the concrete array v has NaNs, which format `name` cannot hold."""
    if isinstance(v, jax.core.Tracer):
        return
    bad = jnp.isnan(v)
    count = int(bad.sum())
    if count:
        first = tuple(int(i) for i in np.unravel_index(int(jnp.argmax(bad)), v.shape))
        raise FormatError(
            f"{name} has no NaN, but {count} of {v.size} scaled values are NaN, the first at "
            f"index {first}. Look for NaN or infinity in the array and its scale."
        )


def _float32_like(a: Any, shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(a).astype(jnp.float32), shape)


def _round_half_even(v: jax.Array) -> jax.Array:
    return lax.round(v, lax.RoundingMethod.TO_NEAREST_EVEN)
