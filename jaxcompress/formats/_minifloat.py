# SPDX-License-Identifier: Apache-2.0
"""Floats of few bits: sign, exponent e, mantissa m, worth 2^(e - bias) (1 + m / 2^M), saturating.

Neither the casts of XLA nor those of ml_dtypes saturate (465 becomes NaN in E4M3, infinity in
E5M2), so values are clipped first: infinity and everything too large become the largest finite
number, as in the saturating mode of OFP8 section 5.2.1. NaN stays NaN where there is a code for it.

Rounding is done in float32: v / ulp is rounded to an integer, where ulp is a power of two, so both
the division and the product are exact. Codes of six bits and less, which XLA cannot cast to, are
put together from the bits of the float32.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from .._errors import FormatError
from ._base import Format
from ._rounding import to_integer

_NANS = ("none", "ieee", "last", "negative_zero")


@dataclasses.dataclass(frozen=True, repr=False)
class Minifloat(Format):
    """A floating-point format. Codes are of a floating dtype where there is one, else raw bits.

    Attributes:
        exponent_bits, mantissa_bits, bias: of the layout; the sign is the highest bit.
        infinities: whether there are codes for infinities. They are decoded, never encoded.
        nan: which codes are NaN: "none", "ieee" (the highest exponent, less the infinities),
            "last" (all ones) or "negative_zero" (the code of -0, which then does not exist).
        subnormals: whether exponent 0 holds m 2^(1 - bias - M); if not, it is zero for all m.
        default_range: "absmax", or "fixed" for formats that are used without a scale.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    infinities: bool
    nan: str
    subnormals: bool
    default_range: str = "absmax"  # type: ignore[misc]

    @property
    def has_nan(self) -> bool:  # type: ignore[override]
        return self.nan != "none"

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    def values(self) -> np.ndarray:
        last = _last_finite(self.exponent_bits, self.mantissa_bits, self.infinities, self.nan)
        codes = np.arange(last + 1)
        exponent, mantissa = codes >> self.mantissa_bits, codes & (2**self.mantissa_bits - 1)
        fraction = mantissa / 2**self.mantissa_bits
        normal = np.ldexp(1 + fraction, exponent - self.bias)
        tiny = np.ldexp(fraction * self.subnormals, 1 - self.bias)
        positive = np.where(exponent == 0, tiny, normal)
        return np.unique(np.concatenate([-positive, positive]) + 0.0)

    def round(self, v: Any, rounding: str = "half_even", key: Any = None) -> jax.Array:
        v = lax.clamp(np.float32(self.min), jnp.asarray(v), np.float32(self.max))
        # Not by a cast there and back: XLA removes such pairs (xla_allow_excess_precision) on GPUs,
        # and the rounding with them. On CPUs this is 3 times faster, too.
        lowest, M = 1 - self.bias, self.mantissa_bits
        exponent = lax.max(_exponent(v), np.int32(lowest))
        step = np.int32(M)
        if not self.subnormals:  # below the smallest normal number its own size is the step
            step = lax.select(
                lax.abs(v) < np.float32(self.smallest_normal),
                lax.full_like(exponent, 0),
                lax.full_like(exponent, M),
            )
        ulp = exponent - step
        v = v * _power(-ulp)
        k = to_integer(v, rounding, key)
        if M == 0 and rounding == "half_even":  # 1.5 lies between exponents, one of which is even
            down = (lax.abs(v) == np.float32(1.5)) & ((exponent + np.int32(self.bias)) % 2 == 0)
            k = lax.select(down, lax.sign(v), k)
        return k * _power(ulp)

    def to_codes(self, grid: jax.Array) -> jax.Array:
        if jnp.issubdtype(self.dtype, jnp.floating):
            return grid.astype(self.dtype)
        M, width = self.mantissa_bits, self.exponent_bits + self.mantissa_bits
        bits = lax.bitcast_convert_type(grid, jnp.int32)
        size = lax.abs(grid)
        normal = ((bits & np.int32(0x7FFFFFFF)) >> np.int32(23 - M)) - np.int32(
            (127 - self.bias) << M
        )
        subnormal = (size * np.float32(2.0 ** (M - 1 + self.bias))).astype(jnp.int32)
        code = lax.select(size < np.float32(self.smallest_normal), subnormal, normal)
        sign = (bits >> np.int32(31)) & np.int32(1)
        if self.nan == "negative_zero":
            sign = lax.select(code == 0, lax.full_like(sign, 0), sign)
        code = code | (sign << np.int32(width))
        nan = {"last": 2**width - 1, "negative_zero": 2**width, "none": 0}.get(
            self.nan, 2**width - 2 ** max(self.mantissa_bits - 1, 0)
        )
        return lax.select(jnp.isnan(grid), lax.full_like(code, nan), code).astype(self.dtype)

    def from_codes(self, codes: jax.Array) -> jax.Array:
        if jnp.issubdtype(self.dtype, jnp.floating):
            return codes.astype(jnp.float32)
        M, width = self.mantissa_bits, self.exponent_bits + self.mantissa_bits
        codes = codes.astype(jnp.int32)
        size = codes & np.int32(2**width - 1)
        bits = (size << np.int32(23 - M)) + np.int32((127 - self.bias) << 23)
        normal = lax.bitcast_convert_type(bits, jnp.float32)
        tiny = np.float32(2.0 ** (1 - self.bias - M) * self.subnormals)
        subnormal = size.astype(jnp.float32) * tiny
        v = lax.select(size < np.int32(2**M), subnormal, normal)
        last = _last_finite(self.exponent_bits, M, self.infinities, self.nan)
        if self.infinities:
            v = lax.select(size == last + 1, lax.full_like(v, np.inf), v)
        if self.nan in ("ieee", "last"):
            v = lax.select(size > last + self.infinities, lax.full_like(v, np.nan), v)
        negative = (codes >> np.int32(width)) & np.int32(1) == 1
        if self.nan == "negative_zero":
            v = lax.select(negative & (size == 0), lax.full_like(v, np.nan), v)
        return lax.select(negative, -v, v)

    def settings(self) -> dict[str, Any]:
        names = ("exponent_bits", "mantissa_bits", "bias", "infinities", "nan", "subnormals")
        return {"maker": "minifloat", **{name: getattr(self, name) for name in names}}


def minifloat(
    exponent_bits: int,
    mantissa_bits: int,
    *,
    bias: int | None = None,
    infinities: bool = False,
    nan: str = "none",
    subnormals: bool = True,
) -> Minifloat:
    """Returns the format of a sign, so many exponent bits and so many mantissa bits.

    Args:
        exponent_bits: at least 1.
        mantissa_bits: at least 0; with the sign and the exponent at most 8.
        bias: of the exponent; by default 2^(exponent_bits - 1) - 1.
        infinities: whether the highest codes (before NaN) are infinities. They are decoded, but
            never encoded: formats saturate.
        nan: "none", "ieee" (the highest exponent holds infinities and NaN only), "last" (the code
            of all ones) or "negative_zero" (the code of -0).
        subnormals: whether exponent 0 holds numbers below the smallest normal one.

    Raises:
        FormatError: if the layout is impossible, or beyond the range of float32.

    Example:
        >>> import jaxcompress as jc
        >>> jc.formats.minifloat(2, 1).values()[7:]
        array([0. , 0.5, 1. , 1.5, 2. , 3. , 4. , 6. ])
    """
    if exponent_bits < 1 or mantissa_bits < 0 or exponent_bits + mantissa_bits > 7:
        raise FormatError(
            "A minifloat has at least 1 exponent bit, at least 0 mantissa bits and at most 7 of "
            f"both, asked for {exponent_bits} and {mantissa_bits}."
        )
    if nan not in _NANS or (nan == "ieee" and (not infinities or exponent_bits < 2)):
        raise FormatError(
            f"nan={nan!r} with infinities={infinities} and {exponent_bits} exponent bits: expected "
            f"one of {', '.join(_NANS)}, and 'ieee' needs infinities and at least 2 exponent bits."
        )
    if bias is None:
        bias = int(2 ** (exponent_bits - 1)) - 1
    name = f"minifloat_e{exponent_bits}m{mantissa_bits}_b{bias}"
    name += "_inf" * infinities + f"_{nan}" * (nan != "none") + "_flush" * (not subnormals)
    return _make(name, exponent_bits, mantissa_bits, bias, infinities, nan, subnormals)


def p3109_draft(precision: int) -> Minifloat:
    """Returns the 8-bit format of that precision of IEEE P3109, which is still a draft.

    Signed, with infinities, one zero, one NaN (the code 0x80) and the bias 2^(7 - precision).

    Args:
        precision: 1 to 7, mantissa bits plus one.

    Raises:
        FormatError: if there is no such precision.

    Example:
        >>> import jaxcompress as jc
        >>> jc.formats.p3109_draft(4).max
        224.0

    References: IEEE SA P3109 working group, interim report (2025), formats binary8p1 to binary8p7.
    """
    if precision not in range(1, 8):
        raise FormatError(f"P3109 has 8-bit formats of precision 1 to 7, asked for {precision!r}.")
    name, bias = f"p3109_draft_p{precision}", 2 ** (7 - precision)
    return _make(name, 8 - precision, precision - 1, bias, True, "negative_zero", True)


def _make(
    name: str, E: int, M: int, bias: int, infinities: bool, nan: str, subnormals: bool = True
) -> Minifloat:
    last = _last_finite(E, M, infinities, nan)
    exponent, mantissa = last >> M, last & (2**M - 1)
    if last < 1 or exponent - bias > 127 or 1 - bias - M < -126:
        raise FormatError(f"{name} has no numbers, or some that float32 has not.")
    high = 2.0 ** (exponent - bias) * (1 + mantissa / 2**M)
    if exponent == 0:
        high = 2.0 ** (1 - bias) * (mantissa / 2**M)
    dtype = jnp.dtype(getattr(ml_dtypes, name, np.uint8) if 1 + E + M == 8 else np.uint8)
    return Minifloat(name, 1 + E + M, -high, high, dtype, E, M, bias, infinities, nan, subnormals)


def _last_finite(E: int, M: int, infinities: bool, nan: str) -> int:
    """Returns the code, without its sign, of the largest finite number."""
    if nan == "ieee":
        return 2 ** (E + M) - 2**M - 1
    return 2 ** (E + M) - 1 - infinities - (nan == "last")


def _exponent(v: jax.Array) -> jax.Array:
    """Returns floor(log2 |v|), and -127 for zero and subnormal numbers."""
    bits = lax.bitcast_convert_type(v, jnp.int32)
    return ((bits >> np.int32(23)) & np.int32(0xFF)) - np.int32(127)


def _power(exponent: jax.Array) -> jax.Array:
    """Returns 2^exponent for exponents from -126 to 127."""
    return lax.bitcast_convert_type((exponent + np.int32(127)) << np.int32(23), jnp.float32)


float8_e4m3fn = _make("float8_e4m3fn", 4, 3, 7, False, "last")
float8_e5m2 = _make("float8_e5m2", 5, 2, 15, True, "ieee")
float8_e4m3 = _make("float8_e4m3", 4, 3, 7, True, "ieee")
float8_e3m4 = _make("float8_e3m4", 3, 4, 3, True, "ieee")
float8_e4m3fnuz = _make("float8_e4m3fnuz", 4, 3, 8, False, "negative_zero")
float8_e5m2fnuz = _make("float8_e5m2fnuz", 5, 2, 16, False, "negative_zero")
float8_e4m3b11fnuz = _make("float8_e4m3b11fnuz", 4, 3, 11, False, "negative_zero")
float6_e2m3fn = _make("float6_e2m3fn", 2, 3, 1, False, "none")
float6_e3m2fn = _make("float6_e3m2fn", 3, 2, 3, False, "none")
float4_e2m1fn = _make("float4_e2m1fn", 2, 1, 1, False, "none")
float16 = dataclasses.replace(
    Minifloat("float16", 16, -65504.0, 65504.0, jnp.dtype(jnp.float16),
              5, 10, 15, True, "ieee", True), default_range="fixed"
)  # fmt: skip

# The formats that `minifloat` does not make, by name.
NAMED = {
    fmt.name: fmt
    for fmt in (
        float16,
        float8_e4m3fn,
        float8_e5m2,
        float8_e4m3,
        float8_e3m4,
        float8_e4m3fnuz,
        float8_e5m2fnuz,
        float8_e4m3b11fnuz,
        float6_e2m3fn,
        float6_e3m2fn,
        float4_e2m1fn,
        *(p3109_draft(precision) for precision in range(1, 8)),
    )
}
