# SPDX-License-Identifier: Apache-2.0
"""Fixed point: integers times a power of two, k 2^-f, as in `ap_fixed<b, b - f>` of FPGA flows."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._errors import FormatError
from ._base import Format
from ._rounding import to_integer


@dataclasses.dataclass(frozen=True, repr=False)
class FixedPoint(Format):
    """The numbers k 2^-fraction_bits; the codes are the integers k, two's complement."""

    fraction_bits: int
    signed: bool
    narrow: bool
    default_range: ClassVar[str] = "fixed"

    @property
    def code_bits(self) -> int:
        return int(self.bits) if self.bits <= 8 else 16

    def values(self) -> np.ndarray:
        step = 2.0**-self.fraction_bits
        return np.arange(round(self.min / step), round(self.max / step) + 1) * step

    def round(self, v: Any, rounding: str = "half_even", key: Any = None) -> jax.Array:
        v = lax.clamp(np.float32(self.min), jnp.asarray(v), np.float32(self.max))
        k = to_integer(v * np.float32(2.0**self.fraction_bits), rounding, key)
        return k * np.float32(2.0**-self.fraction_bits)

    def to_codes(self, grid: jax.Array) -> jax.Array:
        return (grid * np.float32(2.0**self.fraction_bits)).astype(self.dtype)

    def from_codes(self, codes: jax.Array) -> jax.Array:
        return codes.astype(jnp.float32) * np.float32(2.0**-self.fraction_bits)

    def settings(self) -> dict[str, Any]:
        return {
            "maker": "fixed_point",
            "bits": self.bits,
            "fraction_bits": self.fraction_bits,
            "signed": self.signed,
            "narrow": self.narrow,
        }


def fixed_point(
    bits: int, fraction_bits: int, *, signed: bool = True, narrow: bool = False
) -> FixedPoint:
    """Returns the fixed-point format of so many bits, of which `fraction_bits` after the point.

    A `Quantizer` uses it as it is, without a scale: values outside are clipped.

    Args:
        bits: 2 to 16.
        fraction_bits: -64 to 64; negative for multiples of powers of two.
        signed: two's complement, or from 0.
        narrow: leave out the lowest number, -2^(bits - 1 - fraction_bits).

    Raises:
        FormatError: if an argument is out of range.

    Example:
        >>> import jaxcompress as jc
        >>> jc.formats.fixed_point(6, 4).encode([0.5, -3.0])
        Array([  8, -32], dtype=int8)
    """
    if bits not in range(2, 17) or fraction_bits not in range(-64, 65):
        raise FormatError(
            "A fixed-point format has 2 to 16 bits and -64 to 64 fraction bits, "
            f"asked for {bits!r} and {fraction_bits!r}."
        )
    step = 2.0**-fraction_bits
    high = 2 ** (bits - signed) - 1
    low = -high - (not narrow) if signed else 0
    name = f"{'' if signed else 'u'}fixed{bits}_{fraction_bits}{'_narrow' * (signed and narrow)}"
    size = 8 if bits <= 8 else 16
    dtype = jnp.dtype(f"{'' if signed else 'u'}int{size}")
    return FixedPoint(name, bits, low * step, high * step, dtype, fraction_bits, signed, narrow)
