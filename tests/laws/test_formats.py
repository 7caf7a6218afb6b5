# SPDX-License-Identifier: Apache-2.0
"""Formats crossed with granularities, dtypes and transformations: the laws that hold for each.

The default run takes each format with one dtype and one granularity in turn; `-m full` takes the
product, see CONTRIBUTING.md.
"""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import twins

import jaxcompress as jc
from jaxcompress import formats
from jaxcompress._quantize.quantizer import Quantizer

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
GRANULARITIES = (None, "tensor", "group:16", "block:4x8")
MADE = (
    formats.minifloat(3, 2), formats.codebook([-1, -0.25, 0, 0.5, 1]), formats.fixed_point(6, 4),
    formats.fixed_point(12, 8), formats.block_float(4, 16), formats.mx("e3m2", block=16),
)  # fmt: skip
EVERY = (*formats.TABLE.values(), *MADE)
FEW = [fmt for fmt in EVERY if not fmt.name.endswith(twins.ALIKE)]
PRODUCT = list(itertools.product(EVERY, GRANULARITIES))
COVER = [
    (fmt, None if i % 2 else GRANULARITIES[i // 2 % 4], DTYPES[i % 3]) for i, fmt in enumerate(FEW)
]
BFLOAT16 = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)


def normal(shape=(64, 24), dtype=jnp.float32, seed=0):
    return twins.normal(*shape, seed=seed, dtype=dtype)


def transformed(q, x):
    """What a quantizer makes of x under jvp, vmap, and the gradient of a vmap."""
    fake = lambda x: q.fake_quantize(x, 0)  # noqa: E731
    stored = q.quantize(x, 0)
    y, tangent = jax.jvp(fake, (x,), (jnp.ones_like(x),))
    mapped, pull = jax.vjp(jax.vmap(fake), jnp.stack([x, x[::-1]]))
    (gradient,) = pull(3 * jnp.ones_like(mapped))
    loop = jnp.stack([y, fake(x[::-1])])
    return stored, stored.dequantize(), y, tangent, mapped, loop, gradient


def laws(fmt, granularity, dtypes):
    q, xs = Quantizer(fmt, granularity), [normal(dtype=dtype) for dtype in dtypes]
    if fmt.min > 0:  # E8M0: its smallest number is subnormal in float32, which XLA may flush
        xs = [jnp.abs(x) + jnp.ones_like(x) for x in xs]
    every = jax.jit(lambda xs: [transformed(q, x) for x in xs])(xs)  # one program is cheaper
    for x, (inside, restored, y_inside, tangent, mapped, loop, gradient) in zip(xs, every):
        y, stored = q.fake_quantize(x, 0), q.quantize(x, 0)
        assert y.dtype == x.dtype and y.shape == x.shape
        # Storage: the same values, the promised bytes, the promised shapes and dtypes.
        np.testing.assert_array_equal(stored.dequantize(), y)
        assert stored.nbytes == q.nbytes(x.shape, 0) == jc.nbytes(stored)
        assert stored.scale.shape == q.scale_shape(x.shape, 0)
        assert stored.scale.dtype == fmt.scale_dtype
        assert (stored.global_scale is not None) == fmt.two_level
        # Under jit, jvp and vmap the same; a stack, mapped, is a loop.
        for got in (restored, y_inside, loop[0]):
            np.testing.assert_array_equal(got, y)
        for a, b in zip(jax.tree.leaves(inside), jax.tree.leaves(stored), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(mapped, loop)
        # Derivatives pass where nothing is clipped on purpose, and are those of each alone.
        np.testing.assert_array_equal(gradient[0], 3 * tangent)
        if q.clips:  # without a scale: to the range of the format
            np.testing.assert_array_equal(tangent, (x >= fmt.min) & (x <= fmt.max))
        else:
            np.testing.assert_array_equal(gradient, 3)
        # Values are numbers of the grid times scales.
        grid = np.asarray(fmt.from_codes(stored.codes), np.float64)
        assert np.isin(grid, fmt.values()).all()
        # Monotone along what shares a scale.
        if str(q.granularity) != "block:4x8":
            order = np.argsort(np.asarray(x[:4, 0], np.float32), kind="stable")
            assert (np.diff(np.asarray(y[:4, 0], np.float32)[order]) >= 0).all()
    assert Quantizer.from_dict(json.loads(json.dumps(q.to_dict()))) == q


@pytest.mark.parametrize("fmt, granularity, dtype", COVER, ids=str)
def test_laws(fmt, granularity, dtype):
    laws(fmt, granularity, [dtype])


@pytest.mark.full
@pytest.mark.parametrize("fmt, granularity", PRODUCT, ids=str)
def test_laws_full(fmt, granularity):
    laws(fmt, granularity, DTYPES)


@pytest.mark.parametrize("fmt", twins.different(EVERY), ids=str)
def test_codes_saturation_and_nearest(fmt):
    grid = fmt.values()
    scale = 0.5 if fmt.name not in ("bfloat16", "float8_e8m0fnu", "float16") else 1.0
    few = grid if grid.size <= 300 else grid[np.abs(grid) > 1e-30][::97]
    few = few[(np.abs(few) > 1e-37) | (few == 0)]
    x = jnp.asarray((few * scale).astype(np.float32))
    codes = fmt.encode(x, scale)
    np.testing.assert_array_equal(fmt.decode(codes, scale), x)  # every grid value is exact
    again = fmt.encode(fmt.decode(codes, scale), scale)
    np.testing.assert_array_equal(
        np.asarray(again).view(np.uint8), np.asarray(codes).view(np.uint8)
    )
    ends = fmt.decode(fmt.encode(jnp.float32([np.inf, -np.inf, 3e38, -3e38]), 1.0))
    if fmt.name != "bfloat16" and fmt.min > 1e-37 or fmt.min <= 0:
        want = np.float32([fmt.max, fmt.min] * 2)
        if fmt.name == "bfloat16":
            want[2:] = np.float32(jnp.float32([3e38, -3e38]).astype(jnp.bfloat16))
        np.testing.assert_array_equal(ends, want)
    rng = np.random.default_rng(0)
    top = min(fmt.max, 1e6) if fmt.max > 0 else -fmt.min
    v = np.float32(rng.uniform(-top, top, 400) * 1.1)
    v = np.clip(v, np.float32(fmt.min), np.float32(fmt.max))
    got = np.asarray(fmt.round(v), np.float64)
    # Sorted neighbours by brute force in float64.
    right = np.clip(np.searchsorted(grid, v.astype(np.float64)), 1, grid.size - 1)
    best = np.minimum(np.abs(grid[right] - v), np.abs(grid[right - 1] - v))
    np.testing.assert_array_equal(np.abs(got - v.astype(np.float64)), best)


@pytest.mark.parametrize("fmt", twins.different(EVERY), ids=str)
def test_all_bfloat16_go_to_a_nearest_number(fmt):
    x = BFLOAT16[np.argsort(BFLOAT16.astype(np.float32), kind="stable")]  # NaN comes last
    number = ~np.isnan(x.astype(np.float32))
    with np.errstate(invalid="ignore"):  # signalling NaNs
        got = np.asarray(fmt.round(jnp.asarray(x, jnp.float32)), np.float64)
    assert np.isnan(got[~number]).all()
    v, got, grid = x[number].astype(np.float64), got[number], fmt.values()
    right = np.clip(np.searchsorted(grid, v), 1, grid.size - 1)
    low, high = grid[right - 1], grid[right]
    best = np.where(np.abs(high - v) < np.abs(low - v), high, low)
    tie = np.abs(high - v) == np.abs(low - v)
    np.testing.assert_array_equal(np.where(tie & (got == high), high, best), got)
    assert (np.diff(got) >= 0).all()
    kept = x if fmt.has_nan and fmt.block is None else x[number]
    codes = fmt.encode(kept)
    assert codes.dtype == fmt.dtype
    tiny = np.minimum(np.abs(v), np.abs(got)) < np.finfo(np.float32).smallest_normal
    ours = np.asarray(fmt.decode(codes), np.float64)[: got.size]
    ours = np.where(tiny, got, ours)  # CPUs flush them when they divide by the scale
    np.testing.assert_array_equal(ours, got)


@pytest.mark.parametrize("fmt", [f for f in FEW if f.name != "float8_e8m0fnu"], ids=str)
def test_zeros_and_empty_arrays(fmt):
    q = Quantizer(fmt)

    @jax.jit  # one program is cheaper
    def every(zeros, empty):
        both = [(q.fake_quantize(x, 0), q.quantize(x, 0).dequantize()) for x in empty]
        return q.fake_quantize(zeros, 0), q.scales(zeros, 0)[0], both

    shapes = ((0, 3), (32, 0))
    y, scales, both = every(jnp.zeros((32, 3)), [jnp.zeros(shape) for shape in shapes])
    if fmt.name == "binary":
        np.testing.assert_array_equal(jnp.abs(y), y[0, 0])
    else:
        np.testing.assert_array_equal(y, 0)
    assert np.isfinite(scales).all()
    for shape, results in zip(shapes, both, strict=True):
        assert [x.shape for x in results] == [shape] * 2


@pytest.mark.parametrize("fmt", [f for f in EVERY if f.block is None], ids=lambda f: f.name)
def test_rounding_is_no_cast(fmt):
    """XLA removes a cast to fewer bits and back where it may keep more of them: on GPUs."""
    text = str(jax.make_jaxpr(fmt.round)(jnp.ones(8)))
    assert set(re.findall(r":(b?f\d+\w*)\[", text)) == {"f32"}
