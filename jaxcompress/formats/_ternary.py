# SPDX-License-Identifier: Apache-2.0
"""Ternary (-1, 0, 1) and binary (-1, 1) weights.

Their scale is a mean, not a maximum: mean|w| of BitNet b1.58 (Ma et al. 2024, equations 1 to 3)
for ternary and of XNOR-Net (Rastegari et al. 2016, section 3.1) for binary, both the range
"absmean" of a `Quantizer`. Ternary Weight Networks (Li and Liu 2016, equations 5 and 6) instead
set |w| <= 0.7 mean|w| to zero and take the mean of the rest: the range "twn".
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._base import Format
from ._base3 import pack_base3, unpack_base3
from ._rounding import to_integer


@dataclasses.dataclass(frozen=True, repr=False)
class Ternary(Format):
    """-1, 0 and 1.

    Attributes:
        packing: "bits" for two bits of two's complement, "base3" for five values a byte.
    """

    packing: str = "bits"
    default_range: ClassVar[str] = "absmean"

    def values(self) -> np.ndarray:
        return np.array([-1.0, 0.0, 1.0])

    def round(self, v: Any, rounding: str = "half_even", key: Any = None) -> jax.Array:
        v = to_integer(jnp.asarray(v), rounding, key)
        return lax.clamp(np.float32(-1), v, np.float32(1))

    @property
    def code_bits(self) -> int:
        return 2

    def pack(self, codes: jax.Array) -> jax.Array:
        return pack_base3(codes) if self.packing == "base3" else super().pack(codes)

    def unpack(self, packed: jax.Array, size: int) -> jax.Array:
        return (
            unpack_base3(packed, size) if self.packing == "base3" else super().unpack(packed, size)
        )

    @property
    def unit(self) -> tuple[int, int]:
        return (5, 1) if self.packing == "base3" else super().unit

    def packed_nbytes(self, shape: tuple[int, ...]) -> int:
        if self.packing != "base3":
            return super().packed_nbytes(shape)
        return math.prod(shape[:-1]) * -(-shape[-1] // 5)


@dataclasses.dataclass(frozen=True, repr=False)
class Binary(Format):
    """-1 and 1, stored as the bits 0 and 1. Zero, which lies between them, becomes 1."""

    default_range: ClassVar[str] = "absmean"

    def values(self) -> np.ndarray:
        return np.array([-1.0, 1.0])

    def round(self, v: Any, rounding: str = "half_even", key: Any = None) -> jax.Array:
        # The grid is 2 k - 1. Nearest is the sign; the tie at 0 goes to 1 whichever the mode.
        v = jnp.asarray(v)
        k = (lax.clamp(np.float32(-1), v, np.float32(1)) + np.float32(1)) * np.float32(0.5)
        if rounding in ("half_even", "half_away"):
            k = lax.select(v >= 0, lax.full_like(v, 1), lax.full_like(v, 0))
        else:
            k = to_integer(k, rounding, key)
        return lax.select(jnp.isnan(v), v, np.float32(2) * k - np.float32(1))

    def to_codes(self, grid: jax.Array) -> jax.Array:
        return (grid > 0).astype(self.dtype)

    def from_codes(self, codes: jax.Array) -> jax.Array:
        return np.float32(2) * codes.astype(jnp.float32) - np.float32(1)


ternary = Ternary("ternary", 2, -1.0, 1.0, jnp.dtype(jnp.int8))
ternary_base3 = dataclasses.replace(ternary, name="ternary_base3", bits=8 / 5, packing="base3")
binary = Binary("binary", 1, -1.0, 1.0, jnp.dtype(jnp.uint8))
