# SPDX-License-Identifier: Apache-2.0
"""Integer formats against NumPy, and the table of formats."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxcompress import formats
from jaxcompress._errors import FormatError

INTEGERS = [f for f in formats.TABLE.values() if isinstance(f, formats.Integer)]
every_integer = pytest.mark.parametrize("fmt", INTEGERS, ids=lambda f: f.name)
BFLOAT16 = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)


def codes_of(fmt):
    return np.arange(fmt.min, fmt.max + 1).astype(fmt.dtype)


@pytest.mark.parametrize(
    "name, low, high",
    [("int1", -1, 0), ("uint1", 0, 1), ("int2", -2, 1),
     ("int3", -3, 3), ("int4", -7, 7), ("int8", -127, 127), ("uint2", 0, 3),
     ("uint8", 0, 255), ("int8_full", -128, 127), ("int3_full", -4, 3)],
)  # fmt: skip
def test_ranges(name, low, high):
    fmt = formats.get(name)
    np.testing.assert_array_equal(fmt.values(), np.arange(low, high + 1.0))
    assert (fmt.min, fmt.max) == (low, high)
    assert fmt.values().dtype == np.float64
    assert fmt.dtype == (np.uint8 if low == 0 else np.int8)


def test_attributes_names_and_identity():
    for bits in range(1, 9):
        for name, made in ((f"int{bits}", formats.integer(bits)),
                           (f"uint{bits}", formats.integer(bits, signed=False))):  # fmt: skip
            assert getattr(formats, name) == formats.get(name) == made
            assert (made.name, made.bits) == (name, bits)
            assert hash(made) == hash(formats.get(name))
    assert formats.integer(8, narrow=False).name == "int8_full"
    assert formats.integer(2, narrow=False) == formats.int2
    assert formats.int8 != formats.get("int8_full")
    assert repr(formats.int4) == "formats.int4"


@every_integer
def test_every_code_survives_decode_and_encode(fmt):
    codes = codes_of(fmt)
    for scale in (1.0, 0.37, 1e-3):
        decoded = fmt.decode(codes, scale)
        assert decoded.dtype == jnp.float32
        assert np.all(np.diff(np.asarray(decoded)) > 0)
        again = fmt.encode(decoded, scale)
        assert again.dtype == fmt.dtype
        np.testing.assert_array_equal(again, codes)


@every_integer
def test_zero_point_shifts_the_grid(fmt):
    codes = codes_of(fmt)
    for zero in (codes[0], codes[len(codes) // 2], codes[-1]):
        decoded = fmt.decode(codes, 0.5, zero)
        np.testing.assert_array_equal(decoded, (codes.astype(np.float32) - np.float32(zero)) * 0.5)
        np.testing.assert_array_equal(fmt.encode(decoded, 0.5, zero), codes)


def test_rounds_before_adding_the_zero_point():
    # 0.5 -> 0, 1.5 -> 2, then + 1; rounding x / s + z would give 2 and 2.
    codes = formats.uint4.encode(jnp.array([0.5, 1.5]), 1.0, jnp.uint8(1))
    np.testing.assert_array_equal(codes, [1, 3])


@every_integer
def test_nearest_half_to_even_by_brute_force(fmt):
    rng = np.random.default_rng(0)
    v = np.concatenate([rng.uniform(fmt.min - 2, fmt.max + 2, 2000),
                        fmt.values() + 0.5, fmt.values() - 0.5]).astype(np.float32)  # fmt: skip
    distance = np.abs(fmt.values()[:, None] - v.astype(np.float64))
    nearest = distance == distance.min(axis=0)
    parity = np.abs(fmt.values()[:, None] % 2)
    want = fmt.values()[np.argmin(np.where(nearest, parity, 9), axis=0)]
    np.testing.assert_array_equal(fmt.round(v), want)
    np.testing.assert_array_equal(fmt.decode(fmt.encode(v, 1.0), 1.0), want)


@every_integer
@pytest.mark.parametrize("scale", [1.0, 2.0**-6])
def test_all_bfloat16_against_numpy(fmt, scale):
    x = BFLOAT16[~np.isnan(BFLOAT16.astype(np.float32))]
    with np.errstate(over="ignore"):
        v = x.astype(np.float32) / np.float32(scale)
    want = np.clip(np.rint(v), fmt.min, fmt.max)
    np.testing.assert_array_equal(fmt.encode(x, scale), want.astype(fmt.dtype))
    np.testing.assert_array_equal(jax.jit(fmt.encode)(x, scale), want.astype(fmt.dtype))
    np.testing.assert_array_equal(fmt.round(v), want)
    cast = getattr(ml_dtypes, fmt.name.removesuffix("_full"), fmt.dtype)  # where it has the format
    np.testing.assert_array_equal(fmt.encode(x, scale), want.astype(cast).astype(fmt.dtype))


@every_integer
def test_saturates_and_keeps_nan_in_round(fmt):
    np.testing.assert_array_equal(fmt.encode([np.inf, 1e30], 1.0), [fmt.max] * 2)
    np.testing.assert_array_equal(fmt.encode([-np.inf, -1e30], 1.0), [fmt.min] * 2)
    assert np.isnan(fmt.round(jnp.float32(np.nan)))


def test_true_division_where_a_reciprocal_would_round_up():
    x, s = np.float32([[22.75], [-22.75]]), np.float32(3.5)
    assert np.rint(x[0] * (np.float32(1) / s)) == 7 and np.rint(x[0] / s) == 6
    for scale in (s, np.full((1, 1), s)):
        np.testing.assert_array_equal(formats.int4.encode(x, scale), [[6], [-6]])


def test_scale_broadcasts():
    x = jnp.arange(6.0).reshape(2, 3)
    codes = formats.int4.encode(x, jnp.array([[1.0], [2.0]]))
    np.testing.assert_array_equal(codes, [[0, 1, 2], [2, 2, 2]])


def test_nan_is_an_error_when_concrete_and_passes_when_traced():
    x = jnp.array([[1.0, 2.0], [np.nan, np.nan]])
    with pytest.raises(FormatError, match=r"int4 has no NaN, but 2 of 4 .* index \(1, 0\)"):
        formats.int4.encode(x, 1.0)
    with pytest.raises(FormatError, match="1 of 1 scaled values"):
        formats.int4.encode(1.0, np.nan)
    assert jax.jit(formats.int4.encode)(x, 1.0).shape == (2, 2)


def test_bad_arrays():
    with pytest.raises(FormatError, match=r"int8.encode takes .* floating dtype, got int32"):
        formats.int8.encode(jnp.arange(3), 1.0)
    with pytest.raises(FormatError, match="got bool"):
        formats.int8.encode(np.ones(3, bool), 1.0)
    with pytest.raises(FormatError, match="int8.decode takes codes of dtype int8, got float32"):
        formats.int8.decode(jnp.ones(3), 1.0)


def test_unknown_names_and_bits():
    with pytest.raises(FormatError, match=r"no format 'int44'. Did you mean int4.*Available: int1"):
        formats.get("int44")
    with pytest.raises(FormatError, match="float8_e5m2"):
        formats.get("zzz")
    for bits in (0, 9, 2.5):
        with pytest.raises(FormatError, match=f"1 to 8 bits, asked for {bits}"):
            formats.integer(bits)
    assert formats.get(formats.int4) is formats.int4


def test_table_is_read_only():
    with pytest.raises(TypeError):
        formats.TABLE["int4"] = formats.int8
