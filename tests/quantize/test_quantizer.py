# SPDX-License-Identifier: Apache-2.0
"""Quantizer against hand-written twins, NumPy loops and the laws of straight-through gradients."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twins
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxcompress import formats
from jaxcompress._core.qtensor import QTensor
from jaxcompress._errors import FormatError, RecipeError
from jaxcompress._quantize import granularity
from jaxcompress._quantize.granularity import Granularity, per_group
from jaxcompress._quantize.quantizer import Quantizer

# Block formats and those that are used without a scale: see test_quantizer_laws.py.
EVERY_FORMAT = [
    name
    for name, fmt in formats.TABLE.items()
    if fmt.block is None and fmt.default_range in ("absmax", "minmax")
]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def normal(shape, dtype=jnp.float32, seed=0):
    return twins.normal(*shape, seed=seed, dtype=dtype)


def power_of_two_range(shape, steps, low, axis, seed=0):
    """Integers times a random power of two per slice, so that every division is exact.

    Each slice along `axis` holds `low` and `low + steps`: XLA, which multiplies by reciprocals,
    and NumPy then agree bit for bit.
    """
    rng = np.random.default_rng(seed)
    x = rng.uniform(low, low + steps, np.prod(shape)).astype(np.float32).reshape(shape)
    x = np.moveaxis(x, axis, 0)
    x[0], x[-1] = low, low + steps
    x *= np.exp2(rng.integers(-8, 8, x.shape[1:])).astype(np.float32)
    return np.moveaxis(x, 0, axis)


# --- values ---------------------------------------------------------------------------------


def twin(x, axis, top, cast=None):
    """What a person writes by hand."""
    v = x.astype(jnp.float32)
    m = jnp.max(jnp.abs(v), axis=axis, keepdims=True)
    s = jnp.where(m == 0, 1.0, m / top)
    q = jnp.clip(v / s, -top, top).astype(cast) if cast else jnp.clip(jnp.round(v / s), -top, top)
    return (q.astype(jnp.float32) * s).astype(x.dtype)


@pytest.mark.cover
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axis", [((64, 33), 0), ((5, 7, 16), -1),
                                         ((3, 3, 8, 16), (0, 1, 2))])  # fmt: skip
@pytest.mark.parametrize("fmt, top, cast", [
    ("int8", 127, None), ("int4", 7, None), ("int2", 1, None),
    ("float8_e4m3fn", 448, "float8_e4m3fn"), ("float8_e5m2", 57344, "float8_e5m2"),
])  # fmt: skip
def test_hand_twin_bit_for_bit(dtype, shape, axis, fmt, top, cast):
    x = normal(shape, dtype)
    q = Quantizer(fmt)
    want = jax.jit(twin, static_argnums=(1, 2, 3))(x, axis, top, cast)
    for got in (jax.jit(lambda x: q.fake_quantize(x, axis))(x), q.fake_quantize(x, axis)):
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, want)


def test_hand_twin_inside_a_larger_program():
    q, w, x = Quantizer("int8"), normal((64, 32)), normal((16, 64), seed=1)
    ours = lambda w, x: jnp.tanh(x @ q.fake_quantize(w, 0)) * 3  # noqa: E731
    by_hand = lambda w, x: jnp.tanh(x @ twin(w, 0, 127)) * 3  # noqa: E731
    np.testing.assert_array_equal(jax.jit(ours)(w, x), jax.jit(by_hand)(w, x))


@pytest.mark.parametrize("name, shared", [("tensor", (0, 1, 2)), ("channel", (2, 0)),
                                          ("token", (2, 0)), ("example", (1, 2))])  # fmt: skip
def test_granularities_share_over_the_right_axes(name, shared):
    x = normal((4, 6, 8))
    q = Quantizer("int8", name)
    want = jax.jit(twin, static_argnums=(1, 2))(x, shared, 127)
    np.testing.assert_array_equal(q.fake_quantize(x, (2, 0)), want)
    scale, zero = q.scales(x, (2, 0))
    assert zero is None
    assert scale.shape == q.scale_shape(x.shape, (2, 0))
    assert scale.shape == tuple(1 if i in shared else n for i, n in enumerate(x.shape))
    assert sorted(q.shared_axes(x.shape, (2, 0))) == sorted(shared)


@pytest.mark.parametrize("shape, axis, size, indivisible", [
    ((8, 5), (0,), 4, "error"), ((5, 8), (1,), 4, "error"), ((4, 6, 5), (0, 1), 8, "error"),
    ((4, 5, 6), (2, 0), 8, "error"), ((4, 5, 6), (0, 2), 3, "error"), ((9, 5), (0,), 4, "pad"),
    ((3, 5), (0,), 4, "pad"), ((9, 5), (0,), 4, "channel"), ((8, 5), (0,), 4, "channel"),
])  # fmt: skip
@pytest.mark.parametrize("rng", ["absmax", "minmax"])
def test_groups_against_a_numpy_loop(shape, axis, size, indivisible, rng):
    fmt = formats.int4 if rng == "absmax" else formats.uint4
    length = int(np.prod([shape[a] for a in axis]))
    width = length if indivisible == "channel" and length % size else size
    low, steps = (-7, 14) if rng == "absmax" else (-5, 15)
    rows = [power_of_two_range((min(width, length - start), 5), steps, low, 0, seed=start)
            for start in range(0, length, width)]  # fmt: skip
    for row in rows:
        if len(row) == 1 and rng == "absmax":
            row[:] = 7  # one value: it is the range
    columns = np.concatenate(rows)  # [contracted, kept], both flattened
    columns = np.broadcast_to(columns[:, :, None], (length, 5, np.prod(shape) // length // 5))
    columns = columns.reshape(length, -1)

    want = np.empty_like(columns)
    for j in range(columns.shape[1]):
        for start in range(0, length, width):
            part = columns[start : start + width, j]
            if rng == "absmax":
                s, z = np.float32(np.abs(part).max() / np.float32(7)), np.float32(0)
            else:
                lowest, highest = min(part.min(), 0), max(part.max(), 0)
                s = np.float32((highest - lowest) / np.float32(15))
                z = np.clip(np.rint(-lowest / s), 0, 15)
            codes = np.clip(np.rint(part / s) + z, fmt.min, fmt.max)
            want[start : start + width, j] = (codes - z) * s

    kept = [a for a in range(len(shape)) if a not in axis]
    order = [*axis, *kept]
    back = lambda c: c.reshape([shape[a] for a in order]).transpose(np.argsort(order))  # noqa: E731
    x, want = back(columns), back(want)
    q = Quantizer(fmt, per_group(size), range=rng, indivisible=indivisible)
    np.testing.assert_array_equal(q.fake_quantize(jnp.asarray(x), axis), want)
    assert np.any(x != want)
    scale, _ = q.scales(jnp.asarray(x), axis)
    assert scale.shape == q.scale_shape(shape, axis)


def test_one_axis_is_split_without_transposing():
    jaxpr = jax.make_jaxpr(lambda x: Quantizer("int4", "group:4").fake_quantize(x, 1))
    assert "transpose" not in str(jaxpr(jnp.ones((3, 8, 5))))
    assert "transpose" not in str(jaxpr(jnp.ones((3, 8))))
    assert Quantizer("int4", "group:4").shared_axes((3, 8), 1) == ()


@pytest.mark.parametrize("name", ["uint8", "uint4", "int8", "int4", "int8_full", "uint2"])
@pytest.mark.parametrize("low", [-1.0, -0.4, 0.0])
def test_minmax_against_a_numpy_loop(name, low):
    fmt = formats.get(name)
    steps = np.float32(fmt.max - fmt.min)
    x = power_of_two_range((40, 6), steps, np.round(low * steps), 0)
    x[:, 5] = np.linspace(1, steps, 40) / 4  # a range without zero is widened to it
    want = np.empty_like(x)
    for j in range(x.shape[1]):
        lowest, highest = np.minimum(x[:, j].min(), 0), np.maximum(x[:, j].max(), 0)
        s = (highest - lowest) / steps
        z = np.clip(np.rint(np.float32(fmt.min) - lowest / s), fmt.min, fmt.max)
        want[:, j] = (np.clip(np.rint(x[:, j] / s) + z, fmt.min, fmt.max) - z) * s
    q = Quantizer(fmt, range="minmax")
    np.testing.assert_array_equal(q.fake_quantize(jnp.asarray(x), 0), want)
    _, zero = q.scales(jnp.asarray(x), 0)
    assert np.all(zero == np.rint(zero)) and fmt.min <= zero.min() and zero.max() <= fmt.max


def check_storage(q, x, axis):
    stored = q.quantize(x, axis)
    assert isinstance(stored, QTensor)
    assert (stored.shape, stored.dtype) == (x.shape, x.dtype)
    assert stored.scale.shape == q.scale_shape(x.shape, axis)
    assert stored.nbytes == q.nbytes(x.shape, axis)
    np.testing.assert_array_equal(stored.dequantize(), q.fake_quantize(x, axis))


@pytest.mark.parametrize("fmt", twins.different(EVERY_FORMAT))
def test_dequantized_storage_is_the_fake_quantized_array(fmt):
    check_storage(Quantizer(fmt), normal((257, 65)), 0)
    check_storage(Quantizer(fmt, "group:5", indivisible="pad"), normal((12, 7), jnp.bfloat16), 0)


@pytest.mark.cover
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", ["int4", "uint3", "float8_e4m3fn"])
@pytest.mark.parametrize("gran, axis", [
    ("tensor", 0), ("token", -1), ("example", 1),
    ("group:4", 0), ("group:6", (2, 0)), ("group:5", (0, 1)),
])  # fmt: skip
def test_dequantized_storage_for_every_granularity(dtype, fmt, gran, axis):
    check_storage(Quantizer(fmt, gran), normal((12, 5, 7), dtype), axis)


def test_about_six_decibels_per_bit():
    x = jax.random.uniform(jax.random.key(0), (100_000,), minval=-1.0)
    error = [float(jnp.std(x - Quantizer(f"int{b}").fake_quantize(x, 0))) for b in range(3, 9)]
    for bits, (coarse, fine) in zip(range(3, 8), zip(error, error[1:], strict=False), strict=True):
        steps = (2**bits - 1) / (2 ** (bits - 1) - 1)
        assert abs(20 * np.log10(coarse / fine) - 20 * np.log10(steps)) < 0.1


def test_nbytes_counts_what_is_stored():
    assert Quantizer("int4", "group:32").nbytes((64, 128), 0) == 64 * 64 + 4 * 2 * 128
    assert Quantizer("uint4", "group:32").nbytes((64, 128), 0) == 64 * 64 + (4 + 0.5) * 2 * 128
    assert Quantizer("int3").nbytes((10, 5), 0) == 10 * 2 + 4 * 5
    assert Quantizer("int8", "tensor").nbytes((10, 5), 0) == 50 + 4


# --- edges ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", twins.different(EVERY_FORMAT))
def test_zero_and_subnormal_ranges_stay_finite(fmt):
    x = jnp.array([[0.0, 1e-38, 1e-40, 1.0], [0.0, 0.0, -1e-40, 0.5]])
    q = Quantizer(fmt)
    got = q.fake_quantize(x, 0)
    np.testing.assert_array_equal(got[:, 0], 0)
    assert np.all(np.abs(got[:, 1:3]) <= 1.2e-38)
    scale, zero = q.scales(x, 0)
    assert scale[0, 0] == 1
    if zero is not None:
        assert formats.get(fmt).decode(zero[0, 0].astype(int), 1.0, zero[0, 0]) == 0


@pytest.mark.cover
@pytest.mark.parametrize("shape, axis", [((0, 3), 0), ((4, 0), 0), ((2, 0, 4), (1, 2))])
@pytest.mark.parametrize("gran", ["channel", "tensor", "group:4"])
@pytest.mark.parametrize("fmt", ["int4", "uint8"])
def test_empty_arrays(shape, axis, gran, fmt):
    q = Quantizer(fmt, gran)
    x = jnp.zeros(shape, jnp.bfloat16)
    got = q.fake_quantize(x, axis)
    assert (got.shape, got.dtype) == (shape, jnp.bfloat16)
    assert q.quantize(x, axis).dequantize().shape == shape
    assert np.all(np.isfinite(q.scales(x, axis)[0]))


def test_scalars_pass_unchanged():
    for dtype in DTYPES:
        got = Quantizer("int8").fake_quantize(jnp.asarray(0.3, dtype), ())
        assert got.dtype == dtype and got == jnp.asarray(0.3, dtype)
    assert Quantizer("int8").fake_quantize(0.3, ()) == jnp.float32(0.3)
    with pytest.raises(FormatError, match="at least one axis, got a scalar"):
        Quantizer("int8").quantize(jnp.float32(1), ())


def test_nan_spreads_over_its_scale_only():
    x = jnp.ones((3, 2)).at[1, 0].set(jnp.nan)
    for fmt in ("int8", "uint8", "float8_e4m3fn"):
        got = Quantizer(fmt).fake_quantize(x, 0)
        assert np.isnan(got[:, 0]).all() and (got[:, 1] == 1).all()


def test_nan_and_infinity_are_errors_when_stored_and_concrete():
    x = jnp.ones((3, 2)).at[1, 0].set(jnp.nan).at[2, 1].set(jnp.inf)
    with pytest.raises(FormatError, match=r"int8 has no NaN, but 2 of 6 .* index \(1, 0\)"):
        Quantizer("int8").quantize(x, 0)
    assert jax.jit(lambda x: Quantizer("int8").quantize(x, 0))(x).shape == (3, 2)
    assert np.isnan(Quantizer("float8_e5m2").quantize(x, 0).dequantize()[:, 0]).all()


# --- derivatives and transformations --------------------------------------------------------

VARIANTS = [
    Quantizer("int8"),
    Quantizer("uint4"),
    Quantizer("int4", "group:4"),
    Quantizer("float8_e5m2", "tensor"),
    Quantizer("int4", "group:3", indivisible="pad"),
]
every_variant = pytest.mark.parametrize(
    "q", VARIANTS, ids=lambda q: f"{q.format.name}-{q.granularity}"
)


@pytest.mark.cover
@every_variant
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tangent_passes_unchanged(q, dtype):
    x, t = normal((8, 5), dtype), normal((8, 5), dtype, seed=1)
    fn = lambda x: q.fake_quantize(x, 0)  # noqa: E731
    want = fn(x)
    jvp = lambda x, t: jax.jvp(fn, (x,), (t,))  # noqa: E731
    for out, tangent in (jvp(x, t), jax.jit(jvp)(x, t)):
        np.testing.assert_array_equal(out, want)
        np.testing.assert_array_equal(tangent, t)
    out, pull = jax.vjp(fn, x)
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(pull(t)[0], t)
    out, linear = jax.linearize(fn, x)
    np.testing.assert_array_equal(linear(t), t)


def test_gradient_of_a_matmul_is_that_of_the_quantized_operands():
    q, w, x = Quantizer("int8"), normal((16, 4)), normal((3, 16), seed=1)
    loss = lambda w, x: jnp.sum(jnp.sin(q.fake_quantize(x, 1) @ q.fake_quantize(w, 0)))  # noqa: E731
    got = jax.jit(jax.grad(loss, (0, 1)))(w, x)

    def by_hand(w, x):
        wq, xq = twin(w, 0, 127), twin(x, 1, 127)
        d = jnp.cos(xq @ wq)
        return xq.T @ d, d @ wq.T

    for a, b in zip(got, jax.jit(by_hand)(w, x), strict=True):
        np.testing.assert_array_equal(a, b)


def test_second_derivatives():
    q, x = Quantizer("int8"), normal((6,))
    f = lambda x: jnp.sum(q.fake_quantize(x, 0) ** 3)  # noqa: E731
    diagonal = 6 * q.fake_quantize(x, 0)
    np.testing.assert_allclose(jax.hessian(f)(x), jnp.diag(diagonal), rtol=1e-6)
    np.testing.assert_allclose(jax.jacrev(jax.grad(f))(x), jnp.diag(diagonal), rtol=1e-6)


@every_variant
def test_vmap_is_a_loop(q):
    x = normal((3, 8, 5))
    fn = lambda x: q.fake_quantize(x, 0)  # noqa: E731
    want = jnp.stack([fn(row) for row in x])
    np.testing.assert_array_equal(jax.vmap(fn)(x), want)
    np.testing.assert_array_equal(jax.vmap(fn, in_axes=1, out_axes=2)(jnp.moveaxis(x, 0, 1)),
                                  jnp.moveaxis(want, 0, 2))  # fmt: skip
    stacked = jax.vmap(lambda x: q.quantize(x, 0))(x)
    assert stacked.shape == x.shape
    np.testing.assert_array_equal(stacked.dequantize(), want)
    np.testing.assert_array_equal(lax.scan(lambda c, s: (c, s.dequantize()), 0, stacked)[1], want)


@every_variant
def test_scan_and_its_gradient(q):
    x, t = normal((3, 8, 5)), normal((3, 8, 5), seed=1)
    scanned = lambda x: lax.scan(lambda c, r: (c, q.fake_quantize(r, 0)), 0, x)[1]  # noqa: E731
    want = jnp.stack([q.fake_quantize(row, 0) for row in x])
    np.testing.assert_array_equal(scanned(x), want)
    loss = lambda x: jnp.sum(scanned(x) * t)  # noqa: E731
    np.testing.assert_array_equal(jax.grad(loss)(x), t)
    np.testing.assert_array_equal(jax.grad(jax.checkpoint(loss))(x), t)


def test_the_jaxpr_names_the_primal_and_keeps_no_residuals():
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(Quantizer("int8").fake_quantize(x, 0))))(
        jnp.ones((4, 4))))  # fmt: skip
    assert "name=jaxcompress_fake_quantize" in jaxpr and "stop_gradient" not in jaxpr


def test_a_repeated_shape_is_traced_once():
    x = normal((8, 4))
    count = 0

    class Counting(formats.Integer):
        def round(self, v):
            nonlocal count
            count += 1
            return super().round(v)

    fmt = Counting("counting", 4, -7.0, 7.0, np.dtype("int8"))
    jax.make_jaxpr(lambda x: [Quantizer(fmt).fake_quantize(x, 0) for _ in range(5)])(x)
    jax.make_jaxpr(lambda x: Quantizer(fmt).fake_quantize(x, (-2,)))(x)
    assert count == 1


@pytest.mark.parametrize("fmt", ["int8", "uint8"])
def test_sync_shares_the_range_over_a_named_axis(fmt):
    x = normal((4, 8, 5)) * jnp.arange(1.0, 5).reshape(4, 1, 1)
    q = Quantizer(fmt)
    whole = q.fake_quantize(x, (0, 1))
    fn = lambda x: q.fake_quantize(x, 0, sync=("d",))  # noqa: E731
    np.testing.assert_array_equal(jax.vmap(fn, axis_name="d")(x), whole)
    assert np.any(jax.vmap(lambda x: q.fake_quantize(x, 0), axis_name="d")(x) != whole)
    scale, _ = jax.vmap(lambda x: q.scales(x, 0, ("d",)), axis_name="d")(x)
    np.testing.assert_array_equal(scale, jnp.broadcast_to(q.scales(x, (0, 1))[0], scale.shape))
    grad = jax.vmap(jax.grad(lambda x: jnp.sum(fn(x) * x.shape[0])), axis_name="d")(x)
    np.testing.assert_array_equal(grad, jnp.full_like(x, 8))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_equals_one_device(check_vma):
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x, q = normal((8 * devices, 5)), Quantizer("int8")
    sharded = jax.shard_map(
        lambda x: q.fake_quantize(x, 0, sync=("d",)),
        mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=check_vma,
    )  # fmt: skip
    np.testing.assert_array_equal(jax.jit(sharded)(x), q.fake_quantize(x, 0))
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: jnp.sum(sharded(x))))(x), 1.0)


# --- settings -------------------------------------------------------------------------------


def test_strings_resolve_and_defaults():
    q = Quantizer("int4", "group:32")
    assert q == Quantizer(formats.int4, per_group(32), range="absmax", symmetric=True)
    assert hash(q) == hash(Quantizer("int4", "group:32"))
    assert (q.range, q.symmetric, q.indivisible) == ("absmax", True, "error")
    assert Quantizer("int8").granularity == Granularity("channel")
    assert Quantizer("uint8").range == "minmax" and not Quantizer("uint8").symmetric
    assert Quantizer("uint8", range="absmax").symmetric
    assert Quantizer("int8", symmetric=False).range == "minmax"
    assert Quantizer("uint8", symmetric=True).range == "absmax"


def test_dict_round_trip():
    for q in (*VARIANTS, Quantizer("int8_full", "token", range="minmax", indivisible="channel")):
        assert Quantizer.from_dict(json.loads(json.dumps(q.to_dict()))) == q
    with pytest.raises(RecipeError, match=r"no settings \['bits'\]. Available: \['format'"):
        Quantizer.from_dict({"format": "int4", "bits": 4})


def test_granularity_names():
    for name in ("tensor", "channel", "token", "example", "group:32"):
        assert str(granularity.get(name)) == name
    assert granularity.get(per_group(8)) == Granularity("group", 8)
    with pytest.raises(RecipeError, match="no granularity 'rows'. Available: 'tensor'"):
        granularity.get("rows")
    for bad in ("group", "group:0", "group:x", "group:-1", "group:", "channel:4", "token:x"):
        with pytest.raises(RecipeError, match="a group has a size of at least 1"):
            granularity.get(bad)


def test_bad_settings():
    with pytest.raises(FormatError, match="no format 'int44'"):
        Quantizer("int44")
    with pytest.raises(FormatError, match="float8_e5m2 takes no zero point.*Use 'absmax'"):
        Quantizer("float8_e5m2", range="minmax")
    with pytest.raises(RecipeError, match="no range='mean'. Available: 'absmax', 'absmean'"):
        Quantizer("int8", range="mean")
    with pytest.raises(RecipeError, match="range='minmax' and symmetric=True disagree"):
        Quantizer("int8", range="minmax", symmetric=True)
    with pytest.raises(RecipeError, match="no indivisible='drop'"):
        Quantizer("int8", indivisible="drop")


def test_bad_arrays_and_axes():
    q, x = Quantizer("int8"), jnp.ones((4, 6))
    for method in (q.fake_quantize, q.quantize, q.scales):
        with pytest.raises(FormatError, match="floating dtype, got int32"):
            method(jnp.arange(4), 0)
        with pytest.raises(FormatError, match=r"axis \(2,\) is out of range .* shape \(4, 6\)"):
            method(x, 2)
        with pytest.raises(FormatError, match=r"axis \(0, -2\) names an axis .* twice"):
            method(x, (0, -2))


def test_a_group_that_does_not_fit_says_which_would():
    q = Quantizer("int4", "group:128")
    message = r"group:128 does not fit shape \(4100, 2\): axis \(0,\) of length 4100"
    for method in (q.check, q.scale_shape, q.nbytes):
        with pytest.raises(FormatError, match=message + " is .* 128. Sizes that fit: 100, 82, 50;"):
            method((4100, 2), 0)
    with pytest.raises(FormatError, match=message):
        q.fake_quantize(jnp.ones((4100, 2)), 0)
    assert Quantizer("int4", "group:128", indivisible="pad").scale_shape((4100, 2), 0) == (33, 1, 2)
    assert Quantizer("int4", "group:128", indivisible="channel").scale_shape((4100, 2), 0) == (1, 2)
