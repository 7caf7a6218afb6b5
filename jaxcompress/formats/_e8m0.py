# SPDX-License-Identifier: Apache-2.0
"""E8M0: the powers of two from 2^-127 to 2^127 in a byte, the scales of OCP MX (section 5.4.1).

Found with integer arithmetic on the bits of a float32: the cast of XLA and ml_dtypes rounds to
nearest, which is none of the scale rules, and makes NaN of zero.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._errors import FormatError
from ._base import Format
from ._rounding import check, uniform

SCALE_RULES = ("floor", "round", "ceil")
NAN, ONE = 255, 127  # codes


@dataclasses.dataclass(frozen=True, repr=False)
class E8M0(Format):
    """The powers of two. Zero and negative numbers become the smallest, as nearest ones."""

    has_nan: ClassVar[bool] = True
    default_range: ClassVar[str] = "fixed"

    def values(self) -> np.ndarray:
        return np.exp2(np.arange(-127.0, 128.0))

    def round(self, v: Any, rounding: str = "half_even", key: Any = None) -> jax.Array:
        return self.from_codes(self._nearest(jnp.asarray(v), rounding, key))

    def to_codes(self, grid: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(
            self._nearest(grid, "floor", None).astype(jnp.uint8), self.dtype
        )

    def from_codes(self, codes: jax.Array) -> jax.Array:
        if codes.dtype == self.dtype:
            codes = lax.bitcast_convert_type(codes, jnp.uint8)
        return e8m0_value(codes)

    def _nearest(self, v: jax.Array, rounding: str, key: Any) -> jax.Array:
        """Returns the codes as int32. Ties, half way between 2^k and 2^(k+1), go up."""
        check(rounding, key)
        bits = lax.bitcast_convert_type(v, jnp.int32)
        code = bits >> np.int32(23)
        up = (bits & np.int32(0x7FFFFF)) * np.float32(2.0**-23)  # the part of the way to 2 |v|
        # A subnormal float32 has no leading one: 2^-127 is 0x400000 and 2^-126 is twice that.
        half = np.int32(0x400000)
        tiny = lax.max(bits - half, np.int32(0)).astype(jnp.float32) * np.float32(2.0**-22)
        up = lax.select(code == 0, tiny, up)
        if rounding in ("half_even", "half_away"):
            code = code + (up >= np.float32(0.5)).astype(jnp.int32)
        elif rounding == "stochastic":
            code = code + (uniform(key, v, rounding) < up).astype(jnp.int32)
        code = lax.clamp(np.int32(0), code, np.int32(254))
        return lax.select(jnp.isnan(v), lax.full_like(code, NAN), code)


# One program for an array instead of one for each operation.
@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def e8m0_scale(extent: jax.Array, top: float, rule: str) -> jax.Array:
    """Returns the E8M0 code of the scale that maps an extent to the top of an element format.

    With top = 2^emax t, 1 <= t < 2:

        floor   floor(log2 extent) - emax                     OCP MX v1.0, section 6.3; saturates
        round   the same, of an extent whose mantissa from 1.75 on counts as 2
        ceil    the smallest power of two s with extent / s <= top; never saturates

    Args:
        extent: float32, any shape, not negative.
        top: largest number of the elements, positive.
        rule: "floor", "round" or "ceil".

    Returns:
        uint8 in the shape of the extent: exponent + 127, which is clipped to 0 ... 254; the code
        of 1 where the extent is zero, and 255 (NaN) where it is NaN or infinite.
    """
    check_rule(rule)
    emax = int(np.floor(np.log2(top)))
    bits = lax.bitcast_convert_type(extent, jnp.int32)
    if rule == "round":
        bits = bits + np.int32(1 << 21)
    exponent = bits >> np.int32(23)
    if rule == "ceil":
        mantissa = int(np.float32(top).view(np.int32)) & 0x7FFFFF
        exponent = exponent + ((bits & np.int32(0x7FFFFF)) > np.int32(mantissa)).astype(jnp.int32)
    code = lax.clamp(np.int32(0), exponent - np.int32(emax), np.int32(254))
    code = lax.select(extent > 0, code, lax.full_like(code, ONE))
    wrong = jnp.isnan(extent) | (extent == np.float32(np.inf))
    return lax.select(wrong, lax.full_like(code, NAN), code).astype(jnp.uint8)


@functools.partial(jax.jit, inline=True)
def e8m0_value(code: jax.Array) -> jax.Array:
    """Returns 2^(code - 127) in float32, NaN for 255. Code 0 is subnormal: see `e8m0_factors`."""
    code = code.astype(jnp.int32)
    bits = lax.select(code == 0, lax.full_like(code, 0x400000), code << np.int32(23))
    bits = lax.select(code == NAN, lax.full_like(code, 0x7FC00000), bits)
    return lax.bitcast_convert_type(bits, jnp.float32)


@functools.partial(jax.jit, inline=True)
def e8m0_factors(code: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns two powers of two whose product is 2^(code - 127), NaN for 255.

    Both and their reciprocals are normal numbers, so that scaling by one after the other is exact
    even where XLA flushes subnormal numbers, to which 2^-127 belongs.
    """
    code = code.astype(jnp.int32)
    low = (code + np.int32(127)) >> np.int32(1)  # biased exponents that add up to code + 127
    high = code + np.int32(127) - low
    a, b = (lax.bitcast_convert_type(e << np.int32(23), jnp.float32) for e in (low, high))
    return lax.select(code == NAN, lax.full_like(a, np.nan), a), b


def check_rule(rule: str) -> None:
    """Raises FormatError unless there is such a scale rule."""
    if rule not in SCALE_RULES:
        raise FormatError(f"There is no scale_rule {rule!r}. Available: {', '.join(SCALE_RULES)}.")


float8_e8m0fnu = E8M0("float8_e8m0fnu", 8, 2.0**-127, 2.0**127, jnp.dtype(jnp.float8_e8m0fnu))
