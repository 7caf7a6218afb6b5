# SPDX-License-Identifier: Apache-2.0
"""MX, NVFP4 and block floating point against golden arrays and NumPy loops."""

import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from onnx.numpy_helper import to_float8e8m0

from jaxcompress import formats
from jaxcompress._errors import FormatError
from jaxcompress._quantize.quantizer import Quantizer

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "mx.npz")
RULES = ("floor", "round", "ceil")
MX = ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2")


def bits(a):
    a = np.asarray(a)
    return a if a.dtype == np.uint8 else a.view(np.uint8)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MX)
def test_mx_golden(name, rule):
    fmt = formats.get(name + f"_{rule}" * (rule != "floor"))
    stored = Quantizer(fmt).quantize(GOLDEN["x"], 1)
    assert stored.scale.dtype == jnp.uint8 and stored.global_scale is None
    np.testing.assert_array_equal(np.ravel(stored.scale), GOLDEN[f"{name}_{rule}_scale"])
    np.testing.assert_array_equal(bits(stored.codes), GOLDEN[f"{name}_{rule}_codes"])
    np.testing.assert_array_equal(Quantizer(fmt).fake_quantize(GOLDEN["x"], 1), stored.dequantize())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", [*MX, "mxint8"])
def test_mx_scale_of_every_bfloat16(name, rule):
    fmt = formats.get(name + f"_{rule}" * (rule != "floor"))
    a = np.arange(0x80, 0x7F80, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    m, k = np.frexp(a.astype(np.float64))
    top_m, top_k = np.frexp(fmt.max)
    want = {
        "floor": k - 1,
        "round": np.where(m >= 0.875, k, k - 1),
        "ceil": np.where(m > top_m, k, k - 1),
    }[rule] - (top_k - 1)
    got = fmt.find_scale(jnp.asarray(a))
    np.testing.assert_array_equal(got, np.clip(want, -127, 127) + 127)
    if rule == "ceil":
        fits = want > -127
        assert (a[fits] / np.exp2(want[fits].astype(np.float64)) <= fmt.max).all()


@pytest.mark.parametrize("name", [*MX, "mxint8"])
def test_mx_scales_against_the_encoder_of_onnx(name):
    """Its mode "down" is the rule "floor" of extent / 2^emax, "up" is "ceil" of extent / top.

    Every power of two times mantissas at and around the places where a rule changes. Its "nearest"
    (mantissa 1.5) is no scale rule: see test_floats.py. Zero is left out, of which it makes 2^-127
    and we 1.
    """
    rules = {r: formats.get(name + f"_{r}" * (r != "floor")) for r in ("floor", "ceil")}
    top = np.float32(rules["floor"].max)
    one = np.float32(1)
    around = [one, np.float32(1.5), np.float32(1.75), np.frexp(top)[0] * np.float32(2)]
    near = [np.nextafter(m, np.float32(far)) for m in around for far in (1, 2)]
    a = np.exp2(np.arange(-126, 128, dtype=np.float64))[:, None] * np.float64([*around, *near])
    a = np.concatenate([a.ravel(), [np.inf, np.nan]]).astype(np.float32)
    for rule, mode, unit in (
        ("floor", "down", np.exp2(np.floor(np.log2(top)))),
        ("ceil", "up", top),
    ):
        ratio = a / np.float32(unit)
        keep = ~(ratio < np.finfo(np.float32).smallest_normal)  # those are rounded by the division
        want = to_float8e8m0(ratio[keep], round_mode=mode).view(np.uint8)
        np.testing.assert_array_equal(rules[rule].find_scale(jnp.asarray(a[keep])), want)
        assert (~keep).sum() <= 12 * (16 + 1) and (rules[rule].find_scale(a[~keep]) <= 1).all()


def test_mx_scale_rules_of_the_literature():
    a = jnp.array([1.74, 1.75, 3.49, 3.5])
    np.testing.assert_array_equal(
        formats.mx("int8", scale_rule="round").find_scale(a) - 127, [0, 1, 1, 2]
    )
    np.testing.assert_array_equal(
        formats.mxfp4.find_scale(jnp.array([6, 4, 7.9, 3.3])), [127, 127, 127, 126]
    )


def test_mx_edges():
    x = np.zeros((4, 32), np.float32)
    x[1, 3], x[2, 5], x[3, 0] = np.nan, np.inf, -(2.0**-126)
    stored = jax.jit(lambda x: Quantizer("mxfp4").quantize(x, 1))(x)
    np.testing.assert_array_equal(np.ravel(stored.scale), [127, 255, 255, 0])
    got = np.asarray(stored.dequantize())
    np.testing.assert_array_equal(got[0], 0)
    assert np.isnan(got[1:3]).all()
    assert got[3, 0] == -(2.0**-126)  # 2 times the scale 2^-127, which XLA would flush
    top = np.full((1, 32), 3e38, np.float32)
    for name in ("mxint8", "mxint8_ceil"):
        got = Quantizer(name).fake_quantize(top, 1)
        np.testing.assert_allclose(got, top, rtol=0.13)


@pytest.mark.parametrize("rule", RULES)
def test_mx_gradient_is_the_identity_also_where_the_scale_saturates(rule):
    """As in the autograd functions of microxcaling (mx/linear.py), which mask nothing."""
    x = jnp.linspace(-1.0, 1.0, 32)[None].at[0, 3].set(7.9)
    q = Quantizer("mxfp4" + f"_{rule}" * (rule != "floor"))
    y, pull = jax.vjp(lambda x: q.fake_quantize(x, 1), x)
    assert y[0, 3] == (6 if rule == "floor" else 8)  # the scale of "floor" is 1
    t = jnp.arange(1.0, 33.0)[None]
    np.testing.assert_array_equal(pull(t)[0], t)


def test_encode_refuses_nan_unless_the_scale_says_it():
    x = jnp.array([1.0, np.nan])
    for fmt, stored, nan in (
        (formats.mxfp4, jnp.uint8(127), jnp.uint8(255)),
        (formats.mxint8, jnp.uint8(127), jnp.uint8(255)),
        (formats.nvfp4, jnp.float8_e4m3fn(1), jnp.float8_e4m3fn(np.nan)),
    ):
        for scale in (1.0, stored):
            with pytest.raises(FormatError, match=f"{fmt.name} has no NaN, but 1 of 2 .* \\(1,\\)"):
                fmt.encode(x, scale)
        np.testing.assert_array_equal(fmt.encode(x, nan), [0, 0])
        assert np.isnan(fmt.decode(fmt.encode(x, nan), nan)).all()
    assert np.isnan(formats.mxfp8_e4m3.encode(x, 1.0).astype(np.float32)[1])


def test_mxint8_and_block_float_against_a_loop():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 32)) * np.exp2(rng.integers(-9, 9, (64, 1)))).astype(np.float32)
    assert formats.block_float(8, 32) == formats.mxint8
    for fmt, m in ((formats.mxint8, 8), (formats.block_float(4, 32), 4)):
        want = np.empty_like(x)
        for i, row in enumerate(x):
            unit = 2.0 ** (np.floor(np.log2(np.abs(row).max())) - (m - 2))
            k = np.clip(np.rint(row / unit), -(2 ** (m - 1)) + 1, 2 ** (m - 1) - 1)
            want[i] = k * unit
        np.testing.assert_array_equal(Quantizer(fmt).fake_quantize(x, 1), want)
    assert formats.block_float(4, 16).bits == 4.5


def nvfp4_loop(x, g, four_over_six):
    """From the definition, one block at a time, in float32, with the scale g of the tensor."""
    f32, e4m3, e2m1 = np.float32, ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
    out = np.empty_like(x)
    for i in np.ndindex(*x.shape[:-1]):
        for j in range(0, x.shape[-1], 16):
            block = x[i][j : j + 16]
            tried = []
            for top in (6, 4) if four_over_six else (6,):
                ratio = f32(np.abs(block).max() * f32(6 / top))
                s = f32(f32(min(f32(ratio / f32(6)) / g, f32(448))).astype(e4m3)) * g
                q = np.clip(block / s, -6, 6).astype(e2m1).astype(f32) if s else block * 0
                tried.append(q * s)
            errors = [np.sum((t - block) ** 2) for t in tried]
            out[i][j : j + 16] = tried[int(np.argmin(errors))]
    return out


@pytest.mark.parametrize("sd", [1e-4, 0.02, 3.0])
@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_four_over_six"])
def test_nvfp4_equals_a_loop(name, sd):
    x = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32) * np.float32(sd)
    q, four_over_six = Quantizer(name), name != "nvfp4"
    g = np.ravel(q.quantize(x, 1).global_scale)[0]
    top = np.float32(6 * (256 if four_over_six else 448))
    # XLA divides by a constant by multiplying with its reciprocal, as it may: one rounding.
    np.testing.assert_array_max_ulp(g, np.abs(x).max() / top, maxulp=1)
    np.testing.assert_array_equal(q.fake_quantize(x, 1), nvfp4_loop(x, g, four_over_six))


def test_nvfp4_storage_and_exact_case():
    x = np.zeros((2, 32), np.float32)
    x[0, :8] = [0.5, -1, 6, 1.5, 2, 3, 4, 0]  # 448 is the largest scale: g is 2^-k / 448 * 448
    x[1, 16] = 6 * 448
    stored = Quantizer("nvfp4").quantize(x, 1)
    assert stored.scale.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(stored.global_scale, [[[1.0]]])
    np.testing.assert_array_equal(np.squeeze(stored.scale), [[1, 1], [1, 448]])
    np.testing.assert_array_equal(stored.dequantize(), x)
    assert np.asarray(stored.packed)[0, :2].tobytes().hex() == "a137"
    assert stored.nbytes == 2 * 16 + 4 + 4 == Quantizer("nvfp4").nbytes(x.shape, 1)


def test_nvfp4_error_does_not_depend_on_the_size_of_the_values():
    x = np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32)
    errors = []
    for sd in np.float32([1e-6, 1e-3, 0.002, 0.02, 1, 1e3]):
        y = np.asarray(Quantizer("nvfp4").fake_quantize(x * sd, 1), np.float64)
        errors.append(np.sqrt(np.mean((y / sd - x) ** 2)))
    assert max(errors) / min(errors) < 1.05 and abs(errors[-1] - 0.096) < 0.006


def test_block_formats_bring_their_granularity():
    for name, granularity in (("mxfp4", "group:32"), ("nvfp4", "group:16"), ("int4", "channel")):
        assert str(Quantizer(name).granularity) == granularity
    assert str(Quantizer(formats.block_float(4, 8)).granularity) == "group:8"
    assert str(Quantizer("nvfp4", "block:16x16").granularity) == "block:16x16"
    with pytest.raises(FormatError, match="group:32 does not fit"):
        Quantizer("mxfp4").quantize(jnp.ones((30, 2)), 0)


def test_encode_takes_stored_or_float_scales():
    x = jnp.array([[3.0, -12.0]])
    fmt = formats.mxfp4
    np.testing.assert_array_equal(fmt.encode(x, 2.0), fmt.encode(x, jnp.uint8(128)))
    np.testing.assert_array_equal(fmt.decode(fmt.encode(x, 2.0), jnp.uint8(128)), x)
    np.testing.assert_array_equal(
        formats.nvfp4.decode(formats.nvfp4.encode(x, 2.0), jnp.float8_e4m3fn(2)), x
    )


def test_bad_blocks():
    with pytest.raises(FormatError, match="MX has no elements 'e9m9'. Available: e4m3"):
        formats.mx("e9m9")
    with pytest.raises(FormatError, match="no scale_rule 'up'. Available: floor, round, ceil"):
        formats.mx("e2m1", scale_rule="up")
    with pytest.raises(FormatError, match="at least one value, asked for 0"):
        formats.mx("e2m1", block=0)
    with pytest.raises(FormatError, match="scales of its own"):
        Quantizer("mxfp4", power_of_two="ceil")
