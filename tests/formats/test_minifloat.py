# SPDX-License-Identifier: Apache-2.0
"""OFP8 formats against ml_dtypes and against brute force over the grid."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxcompress import formats
from jaxcompress._errors import FormatError

every_minifloat = pytest.mark.parametrize(
    "fmt, dtype, count",
    [(formats.float8_e4m3fn, ml_dtypes.float8_e4m3fn, 253),
     (formats.float8_e5m2, ml_dtypes.float8_e5m2, 247)],
    ids=["e4m3fn", "e5m2"],
)  # fmt: skip
BFLOAT16 = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)


@every_minifloat
def test_grid(fmt, dtype, count):
    assert (fmt.name, fmt.bits) == (np.dtype(dtype).name, 8)
    assert fmt.max == {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}[fmt.name] == -fmt.min
    assert fmt.values().size == count  # 256 codes less NaNs, infinities and one of the zeros
    assert np.all(np.diff(fmt.values()) > 0)
    assert fmt.values()[-1] == fmt.max
    assert formats.get(fmt.name) is fmt


@every_minifloat
def test_every_finite_code_survives_decode_and_encode(fmt, dtype, count):
    codes = np.arange(256, dtype=np.uint8).view(dtype)
    codes = codes[np.isfinite(codes.astype(np.float32))]
    decoded = fmt.decode(codes, 0.125)
    assert decoded.dtype == jnp.float32
    np.testing.assert_array_equal(decoded, codes.astype(np.float32) * 0.125)
    again = fmt.encode(decoded, 0.125)
    assert again.dtype == fmt.dtype
    np.testing.assert_array_equal(np.asarray(again).view(np.uint8), codes.view(np.uint8))


@every_minifloat
@pytest.mark.parametrize("scale", [1.0, 2.0**-6])
def test_all_bfloat16_against_ml_dtypes(fmt, dtype, count, scale):
    with np.errstate(over="ignore", invalid="ignore"):
        v = BFLOAT16.astype(np.float32) / np.float32(scale)
        want = np.clip(v, -fmt.max, fmt.max).astype(dtype)
    for encode in (fmt.encode, jax.jit(fmt.encode)):
        np.testing.assert_array_equal(
            np.asarray(encode(BFLOAT16, scale)).astype(np.float32), want.astype(np.float32)
        )
    np.testing.assert_array_equal(jax.jit(fmt.round)(v), want.astype(np.float32))
    np.testing.assert_array_equal(fmt.decode(fmt.encode(v, 1.0), 1.0), want.astype(np.float32))


@every_minifloat
def test_nearest_with_ties_to_the_even_code_by_brute_force(fmt, dtype, count):
    grid = fmt.values()
    positive = grid[grid >= 0]  # position on the positive half is the code: parity decides ties
    ties = (positive[1:] + positive[:-1]) / 2
    rng = np.random.default_rng(0)
    v = np.concatenate([ties, rng.uniform(0, fmt.max * 1.2, 500), rng.uniform(0, 0.1, 500)])
    v = v.astype(np.float32)
    distance = np.abs(positive[:, None] - v.astype(np.float64))
    parity = (np.arange(positive.size) % 2)[:, None]
    want = positive[np.argmin(np.where(distance == distance.min(axis=0), parity, 9), axis=0)]
    np.testing.assert_array_equal(fmt.round(v), want)
    np.testing.assert_array_equal(fmt.round(-v), -want)


@every_minifloat
def test_saturates_and_keeps_nan(fmt, dtype, count):
    x = jnp.array([np.inf, -np.inf, fmt.max * 1.5, np.nan])
    want = [fmt.max, fmt.min, fmt.max, np.nan]
    np.testing.assert_array_equal(fmt.decode(fmt.encode(x, 1.0), 1.0), want)
    np.testing.assert_array_equal(fmt.round(x), want)


@every_minifloat
def test_bad_arguments(fmt, dtype, count):
    with pytest.raises(FormatError, match=f"{fmt.name} takes no zero point"):
        fmt.encode(jnp.ones(3), 1.0, 0)
    with pytest.raises(FormatError, match=f"{fmt.name} takes no zero point"):
        fmt.decode(jnp.ones(3, fmt.dtype), 1.0, 0)
    with pytest.raises(FormatError, match=f"codes of dtype {fmt.name}, got uint8"):
        fmt.decode(jnp.ones(3, jnp.uint8), 1.0)
    with pytest.raises(FormatError, match="floating dtype, got int32"):
        fmt.encode(jnp.arange(3), 1.0)
