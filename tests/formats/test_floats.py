# SPDX-License-Identifier: Apache-2.0
"""Every code and every rounding boundary of the floats against ml_dtypes, gfloat and onnx."""

import gfloat
import gfloat.formats
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx.numpy_helper import to_float8e8m0
from onnx.reference import ReferenceEvaluator

from jaxcompress import formats
from jaxcompress._errors import FormatError

NAMED = [
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3", "float8_e3m4", "float8_e4m3fnuz",
    "float8_e5m2fnuz", "float8_e4m3b11fnuz", "float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn",
]  # fmt: skip
GFLOAT = {
    **{formats.p3109_draft(p): gfloat.formats.format_info_p3109(8, p) for p in range(1, 8)},
    formats.float8_e4m3fn: gfloat.formats.format_info_ocp_e4m3,
    formats.float8_e5m2: gfloat.formats.format_info_ocp_e5m2,
    formats.float6_e2m3fn: gfloat.formats.format_info_ocp_e2m3,
    formats.float6_e3m2fn: gfloat.formats.format_info_ocp_e3m2,
    formats.float4_e2m1fn: gfloat.formats.format_info_ocp_e2m1,
}
every_named = pytest.mark.parametrize("name", NAMED)
every_gfloat = pytest.mark.parametrize("fmt", GFLOAT, ids=lambda f: f.name)
BFLOAT16 = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)


def boundaries(grid):
    """Grid values, midpoints, their float32 neighbours, and what is too large or too small."""
    mid = ((grid[1:] + grid[:-1]) / 2).astype(np.float32)
    points = np.concatenate([mid, grid.astype(np.float32)])
    points = np.concatenate(
        [points, *(np.nextafter(points, d * np.inf) for d in np.float32([-1, 1]))]
    )
    high = np.float32(min(grid[-1], 1.7e38))
    edges = np.float32(
        [0.0, -0.0, np.inf, -np.inf, np.nan, 3e38, 1e-30, -1e-30, high * 1.5, -high * 2]
    )
    tiny = np.abs(points) < np.finfo(np.float32).smallest_normal  # XLA flushes subnormal numbers
    points = np.concatenate([np.where(tiny, 0, points), edges]).astype(np.float32)
    return np.pad(points, (0, -points.size % 1600))  # few shapes, to be compiled once


def bits(a):
    a = np.asarray(a)
    return a if a.dtype == np.uint8 else a.view(np.uint8)


@every_named
def test_codes_are_those_of_ml_dtypes(name):
    fmt, dtype = formats.get(name), getattr(ml_dtypes, name)
    for x in (boundaries(fmt.values()), BFLOAT16):
        x = x if fmt.has_nan else x[~np.isnan(x)]
        x = np.where(np.abs(x) < np.finfo(np.float32).smallest_normal, np.copysign(0, x), x)
        with np.errstate(invalid="ignore"):
            want = np.clip(x, np.float32(fmt.min), np.float32(fmt.max)).astype(dtype)
        for encode in (fmt.encode, jax.jit(fmt.encode)):
            got = encode(x)
            finite = ~np.isnan(x)
            np.testing.assert_array_equal(bits(got)[finite], bits(want)[finite])
            np.testing.assert_array_equal(np.asarray(fmt.decode(got)), want.astype(np.float32))
        np.testing.assert_array_equal(fmt.round(x), want.astype(np.float32))


@every_named
def test_every_code_decodes_as_ml_dtypes(name):
    fmt, dtype = formats.get(name), getattr(ml_dtypes, name)
    codes = np.arange(2**fmt.bits, dtype=np.uint8)
    want = codes.view(dtype).astype(np.float32)
    got = fmt.decode(codes.view(dtype) if fmt.dtype == dtype else codes)
    np.testing.assert_array_equal(got, want)
    number = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got)[number], np.signbit(want)[number])
    finite = np.isfinite(want)
    np.testing.assert_array_equal(bits(fmt.encode(want[finite])), codes[finite])
    np.testing.assert_array_equal(fmt.values(), np.unique(want[finite].astype(np.float64) + 0.0))


@every_gfloat
def test_gfloat_agrees(fmt):
    info = GFLOAT[fmt]
    codes = np.arange(2**info.k, dtype=np.uint8)
    want = np.array([gfloat.decode_float(info, int(c)).fval for c in codes])
    got = fmt.decode(codes.view(fmt.dtype))
    np.testing.assert_array_equal(got, want.astype(np.float32))
    x = boundaries(fmt.values())
    x = x if fmt.has_nan else x[~np.isnan(x)]
    want = gfloat.round_ndarray(info, x.astype(np.float64), gfloat.RoundMode.TiesToEven, sat=True)
    np.testing.assert_array_equal(fmt.round(x), want)
    np.testing.assert_array_equal(fmt.decode(fmt.encode(x)), want)


def test_gfloat_agrees_on_scales_and_mxint8():
    codes = np.arange(256, dtype=np.uint8)
    info = gfloat.formats.format_info_ocp_e8m0
    want = np.float32([gfloat.decode_float(info, int(c)).fval for c in codes])
    np.testing.assert_array_equal(
        formats.float8_e8m0fnu.from_codes(codes.view(ml_dtypes.float8_e8m0fnu)), want
    )
    info, element = gfloat.formats.format_info_ocp_int8, formats.mxint8.element
    want = np.float32([gfloat.decode_float(info, int(c)).fval for c in codes])
    np.testing.assert_array_equal(element.decode(codes.view(np.int8)), want)
    x = boundaries(element.values())
    x = np.clip(x[~np.isnan(x)], element.min, element.max)  # we leave out -2
    want = gfloat.round_ndarray(info, x.astype(np.float64), gfloat.RoundMode.TiesToEven, sat=True)
    np.testing.assert_array_equal(formats.mxint8.round(x), want)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_sixteen_bits(name):
    fmt, dtype = formats.get(name), np.dtype(getattr(jnp, name))
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    want = every.astype(np.float32)
    tiny = np.abs(want) < np.finfo(np.float32).smallest_normal  # the scale flushes them on CPUs
    np.testing.assert_array_equal(fmt.decode(every), np.where(tiny, 0, want))
    np.testing.assert_array_equal(fmt.from_codes(jnp.asarray(every)), want)
    finite = every[np.isfinite(every.astype(np.float32))].astype(np.float32)
    np.testing.assert_array_equal(np.asarray(fmt.round(finite)), finite)
    grid = fmt.values()
    x = boundaries(grid[np.abs(grid) > 1e-37] if name == "bfloat16" else grid)
    with np.errstate(invalid="ignore"):
        want = np.clip(x, np.float32(fmt.min), np.float32(fmt.max)).astype(dtype)
    want = want.astype(np.float32)
    np.testing.assert_array_equal(fmt.round(x), want)
    np.testing.assert_array_equal(jax.jit(fmt.round)(x), want)
    np.testing.assert_array_equal(fmt.decode(fmt.encode(x)), want)
    assert fmt.default_range == "fixed"


def test_e8m0():
    fmt = formats.float8_e8m0fnu
    codes = np.arange(255, dtype=np.uint8)
    values = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(fmt.values(), values.astype(np.float64))
    np.testing.assert_array_equal(bits(fmt.to_codes(jnp.asarray(values))), codes)
    normal = values[1:]
    x = np.concatenate([normal * f for f in np.float32([1, 1.25, 1.49, 1.5, 1.51, 1.75])])
    x = np.concatenate([x[np.isfinite(x) & (x < 2.5e38)], [np.nan]]).astype(np.float32)
    with np.errstate(invalid="ignore"):
        want = np.clip(x, 0, np.float32(2.0**127)).astype(ml_dtypes.float8_e8m0fnu)
    np.testing.assert_array_equal(bits(fmt.encode(x)), bits(want))
    np.testing.assert_array_equal(bits(fmt.encode([0.0, -3.0, np.inf])), [0, 0, 254])
    np.testing.assert_array_equal(fmt.round(jnp.array([3.9, 3.9]), "floor"), [2, 2])


def test_e8m0_against_the_encoder_of_onnx():
    """Every power of two and the float32 around 1, 1.25, 1.5 and 1.75 times it.

    Subnormal numbers are left out: there its "nearest" goes up from 2^-127 on.
    """
    mantissas = np.float32([1, 1.25, 1.5, 1.75])
    around = [np.nextafter(mantissas, np.float32(far)) for far in (1, 2)]
    mantissas = np.concatenate([mantissas, *around]).astype(np.float64)
    x = (np.exp2(np.arange(-126.0, 128.0))[:, None] * mantissas).ravel().astype(np.float32)
    fmt = formats.float8_e8m0fnu
    for rounding, mode in (("half_even", "nearest"), ("half_away", "nearest"), ("floor", "down")):
        want = to_float8e8m0(x, round_mode=mode).view(np.uint8)
        np.testing.assert_array_equal(bits(fmt.encode(x, rounding=rounding)), want)


@pytest.mark.parametrize("name, enum", [
    ("int4", "INT4"), ("uint4", "UINT4"), ("int2", "INT2"), ("float4_e2m1fn", "FLOAT4E2M1"),
    ("float8_e4m3fn", "FLOAT8E4M3FN"), ("float8_e5m2", "FLOAT8E5M2"),
    ("float8_e4m3fnuz", "FLOAT8E4M3FNUZ"), ("float8_e5m2fnuz", "FLOAT8E5M2FNUZ"),
    ("uint2", "UINT2"), ("float6_e2m3fn", "FLOAT6E2M3"), ("float6_e3m2fn", "FLOAT6E3M2"),
])  # fmt: skip
def test_onnx_quantize_linear_agrees(name, enum):
    fmt = formats.get({"int4": "int4_full"}.get(name, name))
    kind = getattr(onnx.TensorProto, enum)
    make = onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [make("QuantizeLinear", ["x", "s"], ["q"], output_dtype=kind),
         make("DequantizeLinear", ["q", "s"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in "xs"],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
    )  # fmt: skip
    opset = 28 if "FLOAT6" in enum else 25 if "INT2" in enum else 23
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    x = boundaries(fmt.values())
    x = x[np.isfinite(x) & (np.abs(x) < 1e6)] * np.float32(0.5)
    (want,) = ReferenceEvaluator(model).run(None, {"x": x, "s": np.float32(0.5)})
    np.testing.assert_array_equal(fmt.decode(fmt.encode(x, 0.5), 0.5), want)


@pytest.mark.cover
@pytest.mark.parametrize("exponent, mantissa", [(2, 3), (3, 4), (5, 1), (4, 0), (1, 3)])
@pytest.mark.parametrize("nan", ["none", "last", "negative_zero"])
@pytest.mark.parametrize("infinities", [False, True])
@pytest.mark.parametrize("subnormals", [False, True])
def test_minifloats_by_brute_force(exponent, mantissa, nan, infinities, subnormals):
    fmt = formats.minifloat(
        exponent, mantissa, nan=nan, infinities=infinities, subnormals=subnormals
    )
    grid = fmt.values()
    assert (grid[-1], grid[0]) == (fmt.max, fmt.min) and 0 in grid
    x = boundaries(grid)
    x = x[~np.isnan(x)]
    distance = np.abs(grid[:, None] - np.clip(x, fmt.min, fmt.max).astype(np.float64))
    got = np.asarray(fmt.round(x))
    np.testing.assert_array_equal(np.abs(got - np.clip(x, fmt.min, fmt.max)), distance.min(0))
    np.testing.assert_array_equal(fmt.decode(fmt.encode(x)), got)
    decoded = np.asarray(fmt.decode(np.arange(2**fmt.bits, dtype=np.uint8)))
    zeros = 2 if subnormals or nan == "negative_zero" else 2 * 2**mantissa
    assert np.isin(decoded[np.isfinite(decoded)], grid).all() and zeros
    assert np.isnan(decoded).sum() == {"none": 0, "last": 2, "negative_zero": 1}[nan]
    assert np.isinf(decoded).sum() == 2 * infinities
    assert formats.get(formats.to_data(fmt)) == fmt


def test_ieee_layout_is_that_of_ml_dtypes():
    fmt = formats.minifloat(4, 3, infinities=True, nan="ieee")
    codes = np.arange(256, dtype=np.uint8)
    want = codes.view(ml_dtypes.float8_e4m3).astype(np.float32)
    np.testing.assert_array_equal(fmt.decode(codes), want)
    assert np.isnan(fmt.decode(fmt.encode([np.nan])))[0]
    with pytest.raises(FormatError, match="'ieee' needs infinities"):
        formats.minifloat(4, 3, nan="ieee")


@pytest.mark.parametrize("name", [
    *NAMED, "float16", "bfloat16", "p3109_draft_p3", "int4", "uint8", "ternary", "nf4", "mxint8",
])  # fmt: skip
@pytest.mark.parametrize("rounding", ["half_away", "floor"])
def test_other_roundings_by_brute_force(name, rounding):
    fmt = formats.get(name)
    grid = fmt.values() if fmt.bits <= 8 else fmt.values()[::37]
    fmt_grid = fmt.values()
    x = boundaries(grid)
    x = np.clip(x[~np.isnan(x)], np.float32(fmt.min), np.float32(fmt.max)).astype(np.float64)
    low = fmt_grid[np.clip(np.searchsorted(fmt_grid, x, "right") - 1, 0, None)]
    high = fmt_grid[np.clip(np.searchsorted(fmt_grid, x, "left"), None, fmt_grid.size - 1)]
    away = np.where(x > 0, high, low)
    toward = np.where(x > 0, low, high)
    want = low if rounding == "floor" else np.where(
        np.abs(x - away) <= np.abs(x - toward), away, toward)  # fmt: skip
    np.testing.assert_array_equal(fmt.round(x.astype(np.float32), rounding), want)


def test_bad_layouts():
    with pytest.raises(FormatError, match="at most 7 of both, asked for 5 and 3"):
        formats.minifloat(5, 3)
    with pytest.raises(FormatError, match="expected one of none, ieee, last, negative_zero"):
        formats.minifloat(3, 2, nan="some")
    with pytest.raises(FormatError, match="that float32 has not"):
        formats.minifloat(4, 3, bias=200)
    with pytest.raises(FormatError, match="precision 1 to 7, asked for 8"):
        formats.p3109_draft(8)
    with pytest.raises(FormatError, match="no rounding 'up'"):
        formats.float8_e5m2.encode([1.0], rounding="up")
    with pytest.raises(FormatError, match="float4_e2m1fn has no NaN"):
        formats.float4_e2m1fn.encode([np.nan])
