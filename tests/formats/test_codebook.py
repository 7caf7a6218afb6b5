# SPDX-License-Identifier: Apache-2.0
"""Codebooks, NF4, k-means, ternary, binary and fixed point."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from twins import default

from jaxcompress import formats
from jaxcompress._errors import FormatError

CODES = np.arange(2**16, dtype=np.uint16)
BFLOAT16 = CODES[CODES & 0x7FFF <= 0x7F80].view(ml_dtypes.bfloat16).astype(np.float32)  # no NaN
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


def nearest(grid, x):
    """Positions in the grid by brute force in float64; of two nearest ones the even one."""
    distance = np.abs(np.asarray(grid, np.float64)[:, None] - np.asarray(x, np.float64))
    odd = (np.arange(len(grid)) % 2)[:, None]
    return np.argmin(np.where(distance == distance.min(0), odd, 9), axis=0)


def test_nf4_is_the_published_table():
    np.testing.assert_array_equal(formats.nf4.values(), np.float32(PUBLISHED))
    ppf, offset = NormalDist().inv_cdf, 0.9677083
    positive = [ppf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-ppf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    quantiles = np.sort([*positive, 0.0, *negative])
    np.testing.assert_allclose(formats.nf4.values(), quantiles / quantiles.max(), atol=2e-7)
    np.testing.assert_array_equal(formats.nf4.encode([-1, -0.5, 0, 0.8, 1.0]), [0, 2, 7, 14, 15])


@pytest.mark.parametrize("grid", [
    PUBLISHED, [-1.0, 1.0], [0.0, 1.0, 2.0, 4.0, 8.0], np.linspace(-3, 5, 37), np.arange(256.0),
])  # fmt: skip
def test_codebooks_by_brute_force(grid):
    fmt = formats.codebook(grid)
    table = fmt.values()
    mid = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    around = [np.nextafter(mid, np.float32(far)) for far in (-9e9, 9e9)]
    edges = [np.inf, -np.inf, -0.0, 1e30]
    x = np.concatenate([mid, *around, table, edges, BFLOAT16[::7]]).astype(np.float32)
    x = np.where(np.abs(x) < 1e-12, 0, x)  # what float64 cannot tell from a tie at 0
    want = nearest(table, np.clip(x, table[0], table[-1]))
    for encode in (fmt.encode, jax.jit(fmt.encode)):
        np.testing.assert_array_equal(encode(x), want)
    np.testing.assert_array_equal(fmt.round(x), table[want])
    np.testing.assert_array_equal(fmt.decode(fmt.encode(x)), table[want])
    codes = np.arange(len(table), dtype=np.uint8)
    np.testing.assert_array_equal(fmt.encode(fmt.decode(codes, 0.5), 0.5), codes)
    low = np.clip(np.searchsorted(table, x, "right") - 1, 0, None)
    np.testing.assert_array_equal(fmt.round(x, "floor"), table[low])
    assert np.isnan(fmt.round(jnp.float32(np.nan)))
    assert formats.get(formats.to_data(fmt)) == fmt


def test_kmeans_finds_the_clusters_and_obeys_weights():
    rng = np.random.default_rng(0)
    centers = np.array([-5.0, -1.0, 0.5, 9.0])
    x = (rng.choice(centers, 4000) + 0.01 * rng.standard_normal(4000)).astype(np.float32)
    fmt = formats.codebook_from_data(x, 2)
    np.testing.assert_allclose(fmt.values(), centers, atol=2e-3)
    assert fmt.default_range == "fixed" and fmt == formats.get(formats.to_data(fmt))
    h = np.where(x > 0, 1.0, 0.0).astype(np.float32)
    two = formats.codebook_from_data(x[:8], 1, weights=np.float32([0, 0, 0, 1, 1, 1, 1, 1]))
    assert two.bits == 1
    weighted = formats.codebook_from_data(np.float32([0, 1, 10, 11]), 1, np.float32([3, 1, 1, 3]))
    np.testing.assert_array_equal(weighted.values(), [0.25, 10.75])
    assert formats.codebook_from_data(x, 2, h, key=jax.random.key(0)).values().size <= 4


def test_kmeans_beats_uniform_and_more_bits_help():
    x = np.random.default_rng(0).standard_normal((512, 3)).astype(np.float32)
    errors = []
    for bits in (1, 2, 3, 4):
        fmt = formats.codebook_from_data(x, bits)
        errors.append(float(np.mean((np.asarray(fmt.round(x)) - x) ** 2)))
    assert errors == sorted(errors, reverse=True)
    assert abs(errors[1] - 0.1175) < 0.02  # Lloyd and Max: four levels for a normal distribution
    per = formats.codebook_from_data(x * np.float32([1, 10, 100]), 2, per="channel")
    assert len(per) == 3 and per[2].max > 5 * per[1].max > 25 * per[0].max


def test_bad_codebooks():
    for values in ([1.0], [1.0, 1.0], [0.0, np.nan], [0.0, 1e300], np.arange(300.0)):
        with pytest.raises(FormatError, match="2 to 256 different finite"):
            formats.codebook(values)
    with pytest.raises(FormatError, match="found 1 different values"):
        formats.codebook_from_data(np.ones(4, np.float32), 2)
    with pytest.raises(FormatError, match="floating dtype, got int"):
        formats.codebook_from_data(np.arange(4), 2)
    with pytest.raises(FormatError, match="1 to 8 bits per"):
        formats.codebook_from_data(np.ones(4, np.float32), 9)
    with pytest.raises(FormatError, match="weights of its shape"):
        formats.codebook_from_data(np.arange(4.0), 2, np.ones(3))
    with pytest.raises(FormatError, match="no maker 'x'"):
        formats.get({"maker": "x"})


def test_ternary_and_binary():
    x = np.float32([-9, -1, -0.51, -0.5, -0.0, 0.0, 0.5, 0.51, 1.5, np.inf])
    np.testing.assert_array_equal(formats.ternary.round(x), [-1, -1, -1, 0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(formats.ternary.encode(x), [-1, -1, -1, 0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(formats.binary.round(x), [-1, -1, -1, -1, 1, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(formats.binary.encode(x), [0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(formats.binary.decode(np.uint8([0, 1])), [-1, 1])
    np.testing.assert_array_equal(formats.binary.round(jnp.float32([0.9, 1.0]), "floor"), [-1, 1])


@pytest.mark.parametrize("bits, fraction", [(6, 4), (8, 6), (12, 8), (16, 10), (4, -3)])
@pytest.mark.parametrize("signed", [True, False])
def test_fixed_point(bits, fraction, signed):
    fmt = formats.fixed_point(bits, fraction, signed=signed)
    step = 2.0**-fraction
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    np.testing.assert_array_equal(fmt.values(), np.arange(low, high + 1) * step)
    x = BFLOAT16
    want = np.clip(np.rint(x.astype(np.float64) / step), low, high)
    np.testing.assert_array_equal(fmt.encode(x), want)
    np.testing.assert_array_equal(fmt.round(x), want * step)
    assert formats.get(formats.to_data(fmt)) == fmt
    assert fmt.dtype.itemsize == (1 if bits <= 8 else 2)


def test_bad_fixed_point():
    with pytest.raises(FormatError, match="2 to 16 bits and -64 to 64 fraction bits"):
        formats.fixed_point(17, 3)


@pytest.mark.parametrize("name", default([
    "int4", "ternary", "binary", "nf4", "float8_e4m3fn", "float4_e2m1fn", "float16", "bfloat16",
    "float8_e8m0fnu", "mxint8",
], "int4", "nf4", "float8_e4m3fn", "mxint8"))  # fmt: skip
def test_stochastic_rounding_is_unbiased_and_keeps_the_grid(name):
    fmt, key = formats.get(name), jax.random.key(0)
    grid = fmt.values()
    grid = grid[np.abs(grid) < 1e30].astype(np.float32)
    at = int(np.searchsorted(grid, np.float32(0.9)))
    grid = grid[max(at - 100, 0) : at + 100]
    at = int(np.searchsorted(grid, np.float32(0.9)))
    np.testing.assert_array_equal(fmt.round(grid, "stochastic", key), grid)
    a, b = (float(v) for v in grid[at - 1 : at + 1])
    for part in (0.125, 0.5, 0.75):
        x = jnp.full(40_000, a + part * (b - a), jnp.float32)
        y = np.asarray(fmt.round(x, "stochastic", key), np.float64)
        assert set(np.unique(y)) <= {a, b}
        assert abs((y.mean() - a) / (b - a) - part) < 0.012  # five standard deviations
    with pytest.raises(FormatError, match="needs a PRNG key"):
        fmt.round(x, "stochastic")


def test_six_decibels_per_bit():
    x = np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float32)
    errors = [float(np.std(x - np.asarray(formats.fixed_point(b, b - 1).round(x))))
              for b in range(4, 12)]  # fmt: skip
    np.testing.assert_allclose(20 * np.log10(np.array(errors[:-1]) / errors[1:]), 6.02, atol=0.35)
