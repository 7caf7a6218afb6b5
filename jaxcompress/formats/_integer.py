# SPDX-License-Identifier: Apache-2.0
"""Integers of 1 to 8 bits, signed or unsigned.

Signed ones are narrow by default, -(2^(b-1) - 1) ... 2^(b-1) - 1: symmetric, so that negating the
weights negates the codes (ONNX, TFLite). Two bits would leave three values, which is what ternary
is for: `int2` is always -2 ... 1, and `int1` is two's complement too, -1 ... 0.
"""

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
class Integer(Format):
    """The integers from `min` to `max`."""

    affine: ClassVar[bool] = True

    def values(self) -> np.ndarray:
        return np.arange(self.min, self.max + 1)

    def round(self, v: Any, rounding: str = "half_even", key: Any = None) -> jax.Array:
        v = to_integer(jnp.asarray(v), rounding, key)
        return lax.clamp(np.float32(self.min), v, np.float32(self.max))

    @property
    def default_range(self) -> str:  # type: ignore[override]
        return "absmax" if self.min < 0 < self.max else "minmax"


def integer(bits: int, signed: bool = True, narrow: bool = True) -> Integer:
    """Returns the integer format of so many bits.

    Args:
        bits: 1 to 8.
        signed: two's complement, or from 0 to 2^bits - 1.
        narrow: leave out -2^(bits-1). Signed formats from 3 bits; others are always full.

    Raises:
        FormatError: if bits is not 1 to 8.

    Example:
        >>> import jaxcompress as jc
        >>> jc.formats.integer(8, narrow=False).min
        -128.0
    """
    if bits not in range(1, 9):
        raise FormatError(f"An integer format has 1 to 8 bits, asked for {bits!r}.")
    if not signed:
        return Integer(f"uint{bits}", bits, 0.0, 2.0**bits - 1, jnp.dtype(jnp.uint8))
    full = bits < 3 or not narrow
    name = f"int{bits}_full" if full and bits > 2 else f"int{bits}"
    high = 2.0 ** (bits - 1) - 1
    return Integer(name, bits, -high - full, high, jnp.dtype(jnp.int8))
