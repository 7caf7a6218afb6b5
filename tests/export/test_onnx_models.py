# SPDX-License-Identifier: Apache-2.0
"""Models as ONNX: four kinds by four recipes, exact integers, kernels, formats, what is refused."""

import collections
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from jax import lax

import jaxcompress as jc
from jaxcompress import Quantizer, Recipe, Rule

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def as_users_write():
    """Biases are added to batches without another axis."""
    with jax.numpy_rank_promotion("allow"):
        yield


def weights(*shape):
    fan = np.prod(shape[:-1]) if len(shape) > 1 else 10
    return jnp.asarray(RNG.normal(size=shape) / np.sqrt(fan), jnp.float32)


def mlp(p, x):
    return jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]


def conv(x, w, strides=1, groups=1):
    return lax.conv_general_dilated(
        x, w, (strides, strides), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip


def cnn(p, x):
    x = jax.nn.relu(conv(x, p["c1"]) + p["b1"])
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = jnp.clip(conv(x, p["c2"], 2) + p["b2"], 0, 6)
    x = conv(x, p["dw"], 1, 16) + p["b3"]
    return x.mean((1, 2)) @ p["w"] + p["b"]


LAYERS, WIDTH, HEADS = 2, 32, 4


def norm(x, scale):
    d = x - x.mean(-1, keepdims=True)
    return d * lax.rsqrt((d**2).mean(-1, keepdims=True) + 1e-5) * scale


def transformer(p, ids, mask):
    """Scanned layers, fused projections, a mean over tokens: as MiniLM is."""

    def layer(x, q):
        h = norm(x, q["g1"])
        a, b, v = jnp.moveaxis(jnp.einsum("btd,dchk->btchk", h, q["qkv"]), 2, 0)
        s = jnp.einsum("bthk,bshk->bhts", a, b) / np.sqrt(WIDTH / HEADS)
        s = jax.nn.softmax(jnp.where(mask[:, None, None], s, -1e9))
        x += jnp.einsum("bthk,hkd->btd", jnp.einsum("bhts,bshk->bthk", s, v), q["o"])
        h = jax.nn.gelu(norm(x, q["g2"]) @ q["w1"] + q["b1"])
        return x + h @ q["w2"] + q["b2"], None

    x = p["table"][ids] + p["places"][None, : ids.shape[1]]
    x, _ = lax.scan(layer, x, p["layers"])
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)


def gru(p, x):
    def cell(h, v):
        a, b = v @ p["wi"] + p["b"], h @ p["wh"]
        (ir, iz, i), (hr, hz, n) = jnp.split(a, 3, -1), jnp.split(b, 3, -1)
        r, z = jax.nn.sigmoid(ir + hr), jax.nn.sigmoid(iz + hz)
        h = (1 - z) * jnp.tanh(i + r * n) + z * h
        return h, None

    h, _ = lax.scan(cell, jnp.zeros((x.shape[0], 32)), jnp.swapaxes(x, 0, 1))
    return h @ p["out"]


def stack(*shape):
    return jnp.stack([weights(*shape) for _ in range(LAYERS)])


ones = functools.partial(jnp.ones, (LAYERS, WIDTH))
head = WIDTH // HEADS
MODELS = {
    "mlp": (
        mlp,
        {"w1": weights(64, 64), "b1": weights(64), "w2": weights(64, 10), "b2": weights(10)},
        (RNG.normal(size=(40, 64)).astype(np.float32),),
    ),
    "cnn": (
        cnn,
        {
            "c1": weights(3, 3, 3, 8), "b1": weights(8), "c2": weights(3, 3, 8, 16),
            "b2": weights(16), "dw": weights(3, 3, 1, 16), "b3": weights(16),
            "w": weights(16, 10), "b": weights(10),
        },
        (RNG.normal(size=(20, 12, 12, 3)).astype(np.float32),),
    ),
    "transformer": (
        transformer,
        {
            "table": weights(50, WIDTH), "places": weights(12, WIDTH),
            "layers": {
                "qkv": stack(WIDTH, 3, HEADS, head), "o": stack(HEADS, head, WIDTH),
                "w1": stack(WIDTH, 64), "b1": stack(64), "w2": stack(64, WIDTH),
                "b2": stack(WIDTH), "g1": ones(), "g2": ones(),
            },
        },
        (RNG.integers(0, 50, (8, 9), np.int32), np.arange(9) < RNG.integers(4, 9, (8, 1))),
    ),
    "gru": (
        gru,
        {"wi": weights(8, 96), "wh": weights(32, 96), "b": weights(96), "out": weights(32, 5)},
        (RNG.normal(size=(16, 11, 8)).astype(np.float32),),
    ),
}  # fmt: skip
RECIPES = ("float", "w8a8", "w8a8-static", "w4a16-g32")


@functools.cache
def compressed(model, recipe):
    fn, params, inputs = MODELS[model]
    if recipe == "float":
        return fn, params, inputs
    small = jc.quantize(fn, params, recipe, calibration=[jc.Inputs(*inputs)])
    return small.fn, small.params, inputs


def relative(got, want):
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


@pytest.mark.cover
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_minimum_cells(model, recipe, tmp_path):
    """Checked, run by onnxruntime, equal to the function; any size of batch; kernels."""
    fn, params, inputs = compressed(model, recipe)
    path = tmp_path / "m.onnx"
    found = jc.export.onnx(fn, params, *inputs, path=path, symbolic_batch=True)
    onnx.checker.check_model(str(path), full_check=True)
    want = np.asarray(jax.jit(fn)(params, *inputs))
    got = found.run(*inputs)
    # A stored range that a neighbour of a rounded value falls into moves what comes after it.
    bound = {"w8a8-static": 3e-2}.get(recipe, 1e-4)
    assert relative(got, want) < bound
    if recipe != "w8a8-static":
        np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))
    few = [x[:3] for x in inputs]
    assert relative(found.run(*few), want[:3]) < bound
    audit = found.audit()
    kernels = " ".join(row.runs for row in audit.rows)
    if recipe == "float":
        assert not audit.rows
    elif recipe == "w4a16-g32":
        assert "MatMulNBits" in kernels and (audit or model == "cnn")
    else:
        assert audit, audit.fallbacks
    if recipe == "w8a8-static":
        expected = {"mlp": "QGemm", "cnn": "QLinearConv", "gru": "MatMulIntegerToFloat"}
        assert expected.get(model, "MatMulIntegerToFloat") in kernels


def rounded(x, scale, low=-127):
    return np.clip(np.rint(np.float32(x) / scale), low, 127).astype(np.int64)


def absmax(w):
    """int8 of a matrix or kernel: codes and scales per output channel."""
    w = np.asarray(w, np.float32)
    scale = (np.abs(w).max(tuple(range(w.ndim - 1))) / np.float32(127)).astype(np.float32)
    return rounded(w, scale), scale


def test_static_mlp_is_the_integer_computation(tmp_path):
    """Codes, int32 bias and one multiplication: every value of the reference formula (Jacob et
    al. 2018, equations 7 and 8), computed in int64 from the ranges of the data alone."""
    fn, params, (x,) = compressed("mlp", "w8a8-static")
    p = MODELS["mlp"][1]
    found = jc.export.onnx(fn, params, x, path=tmp_path / "m.onnx")
    hidden = np.asarray(jax.nn.relu(jnp.asarray(x) @ p["w1"] + p["b1"]))
    s1, s2 = (np.float32(np.abs(v).max() / np.float32(127)) for v in (x, hidden))
    (q1, w1), (q2, w2) = absmax(p["w1"]), absmax(p["w2"])
    first = rounded(x, s1) @ q1 + np.rint(np.asarray(p["b1"], np.float64) / (s1 * w1)).astype(int)
    real = first.astype(np.float32) * ((s1 * w1) / s2)
    second = np.clip(np.rint(real), 0, 127).astype(np.int64)
    bias = np.rint(np.asarray(p["b2"], np.float64) / (s2 * w2)).astype(int)
    want = (second @ q2 + bias).astype(np.float32) * (s2 * w2)
    unit = (s2 * w2).max() * np.abs(q2).max()  # one step of one hidden value
    got = found.run(x)
    np.testing.assert_allclose(got, want, atol=1.01 * unit)
    assert (np.abs(got - want) > 1e-5).mean() < 0.02  # ties that fall to the other side


def test_static_conv_is_the_integer_computation(tmp_path):
    """QLinearConv against sums in int64, with biases, a pool and a clip between two convs."""
    x = RNG.normal(size=(6, 8, 8, 3)).astype(np.float32)
    p = {"c1": weights(3, 3, 3, 8), "b": weights(8), "c2": weights(1, 1, 8, 4)}

    def fn(p, x):
        x = jnp.clip(conv(x, p["c1"]) + p["b"], 0, 1.5)
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return conv(x, p["c2"])

    small = jc.quantize(fn, p, "w8a8-static", calibration=[x])
    found = jc.export.onnx(small.fn, small.params, x, path=tmp_path / "m.onnx")
    assert "QLinearConv" in found.audit().rows[0].runs
    between = np.asarray(fn({**p, "c2": jnp.eye(8)[None, None]}, x))
    s1, s2 = (np.float32(np.abs(v).max() / np.float32(127)) for v in (x, between))
    (q1, w1), (q2, w2) = absmax(p["c1"]), absmax(p["c2"])
    image = np.pad(rounded(x, s1), ((0, 0), (1, 1), (1, 1), (0, 0)))
    total = sum(image[:, i : i + 8, j : j + 8] @ q1[i, j] for i in range(3) for j in range(3))
    total = total + np.rint(np.asarray(p["b"], np.float64) / (s1 * w1)).astype(int)
    codes = np.rint(total.astype(np.float32) * ((s1 * w1) / s2))
    codes = np.clip(codes, 0, min(127, np.rint(np.float32(1.5) / s2))).astype(np.int64)
    codes = codes.reshape(6, 4, 2, 4, 2, 8).max((2, 4))
    want = (codes @ q2[0, 0]).astype(np.float32) * (s2 * w2)
    got = found.run(x)
    np.testing.assert_allclose(got, want, atol=1.01 * (s2 * w2).max() * np.abs(q2).max())
    assert (np.abs(got - want) > 1e-5).mean() < 0.02


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_dynamic_products_are_exact(model, tmp_path):
    """With ranges found from the values only sums in floats between sites may differ."""
    fn, params, inputs = compressed(model, "w8a8")
    found = jc.export.onnx(fn, params, *inputs, path=tmp_path / "m.onnx")
    assert relative(found.run(*inputs), np.asarray(jax.jit(fn)(params, *inputs))) < 2e-6
    assert all("Integer" in row.runs for row in found.audit().rows)


def test_unsigned_and_shifted_activations(tmp_path):
    """Ranges of both ends: a zero point that is no middle, in stored and in dynamic ranges."""
    p, x = MODELS["mlp"][1], MODELS["mlp"][2][0] + 1.0
    for range_ in ("static", "minmax"):
        q = Quantizer("uint8", "tensor", range=range_, symmetric=False)
        recipe = Recipe([Rule("*", Quantizer("int8", "channel"), q)], "affine")
        small = jc.quantize(mlp, p, recipe, calibration=[x])
        found = jc.export.onnx(small.fn, small.params, x, path=tmp_path / "m.onnx")
        want = np.asarray(jax.jit(small.fn)(small.params, x))
        assert relative(found.run(x), want) < 1e-2
        assert found.audit()


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_ranges_measured_by_the_model(model, tmp_path):
    """One uint8 range of the tensor: DynamicQuantizeLinear, and the product in integers."""
    fn, p, inputs = MODELS[model]
    recipe = Recipe([Rule("*", Quantizer("int8", "channel"), Quantizer("uint8", "tensor"))], "d")
    small = jc.quantize(fn, p, recipe, calibration=inputs)
    found = jc.export.onnx(small.fn, small.params, *inputs, path=tmp_path / "m.onnx")
    ops = [node.op_type for node in found.model.graph.node]
    assert ops.count("DynamicQuantizeLinear") == len(found.audit().rows)
    runs = {row.runs for row in found.audit().rows}
    assert runs <= {"DynamicQuantizeMatMul", "MatMulInteger", "ConvInteger"}
    want = np.asarray(jax.jit(small.fn)(small.params, *inputs))
    assert relative(found.run(*inputs), want) < 5e-6


def test_a_measured_range_is_the_integer_computation(tmp_path):
    rng = np.random.default_rng(3)
    w, x = (rng.normal(0.3, 1, s).astype(np.float32) for s in ((40, 7), (9, 40)))
    small = jc.quantize(
        lambda p, x: x @ p["w"], {"w": w},
        Recipe([Rule("*", Quantizer("int8", "channel"), Quantizer("uint8", "tensor"))], "d"),
        calibration=[x],
    )  # fmt: skip
    found = jc.export.onnx(small.fn, small.params, x, path=tmp_path / "m.onnx")
    unit = (x.max() - x.min()) / np.float32(255)
    zero = np.rint(-x.min() / unit)
    codes = np.clip(np.rint(x / unit) + zero, 0, 255).astype(np.int64) - int(zero)
    scale = np.abs(w).max(0) / np.float32(127)
    total = codes @ np.clip(np.rint(w / scale), -127, 127).astype(np.int64)
    np.testing.assert_allclose(found.run(x), total * (unit * scale), rtol=2e-6)


def test_reference_evaluator_agrees(tmp_path):
    fn, params, inputs = compressed("mlp", "w8a8-static")
    found = jc.export.onnx(fn, params, *inputs, path=tmp_path / "m.onnx", target="portable")
    a, b = (found.run(*inputs, evaluator=e) for e in ("onnxruntime", "reference"))
    assert relative(a, b) < 1e-2
    with pytest.raises(jc.ArtifactError, match='expected "onnxruntime" or "reference"'):
        found.run(*inputs, evaluator="other")


def operations(path):
    return collections.Counter(n.op_type for n in onnx.load(path).graph.node)


def test_targets(tmp_path):
    """TensorRT: int8, zero points 0, float biases; portable: no form of a certain runtime."""
    fn, params, (x,) = compressed("mlp", "w8a8-static")
    path = tmp_path / "m.onnx"
    got = {}
    for target in ("onnxruntime", "tensorrt", "portable"):
        got[target] = jc.export.onnx(fn, params, x, path=path, target=target).run(x)
        names = operations(path)
        assert names["Gemm"] == (0 if target == "tensorrt" else 2)
        arrays = [onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
        if target != "tensorrt":  # two products of a byte and more than 64 may leave 16 bits
            assert all(np.abs(a.astype(int)).max() <= 64 for a in arrays if a.dtype == np.int8)
        else:
            assert all(not a.any() for a in arrays if a.dtype == np.int8 and a.ndim == 0)
            assert not any(a.dtype in (np.uint8, np.int32) for a in arrays)
    for other in ("tensorrt", "portable"):
        assert relative(got[other], got["onnxruntime"]) < 1e-2
    with pytest.raises(jc.ArtifactError, match="expected one of onnxruntime, tensorrt, portable"):
        jc.export.onnx(fn, params, x, path=path, target="tpu")


# format, granularity, opset from which ONNX has it
FORMATS = [
    ("int8", "channel", 19), ("uint8", "channel", 19), ("int4", "channel", 21),
    ("int4", "group:32", 21), ("uint4", "group:16", 21), ("int3", "group:32", 21),
    ("int2", "group:32", 25), ("ternary", "channel", 25), ("int6", "tensor", 19),
    ("float8_e4m3fn", "channel", 19), ("float8_e5m2", "tensor", 19),
    ("float4_e2m1fn", "group:32", 23), ("mxfp4", None, 23), ("mxfp8_e4m3", None, 21),
    ("nvfp4", None, 23), ("nf4", "group:32", 18), ("float6_e2m3fn", "channel", 18),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fmt", "granularity", "opset"), FORMATS, ids=[f[0] + str(f[1]) for f in FORMATS]
)
def test_formats_of_weights(fmt, granularity, opset, tmp_path):
    """onnx's own evaluator decodes the stored bytes to the numbers of the function."""
    p, x = {"w": weights(64, 32)}, RNG.normal(size=(5, 64)).astype(np.float32)
    rule = Rule("w", Quantizer(fmt, granularity) if granularity else Quantizer(fmt))
    fn = jc.quantize_aware(lambda p, x: x @ p["w"], Recipe([rule], fmt))
    found = jc.export.onnx(fn, p, x, path=tmp_path / "m.onnx", opset=opset)
    want = np.asarray(jax.jit(fn)(p, x))
    assert relative(found.run(x, evaluator="reference"), want) < 1e-5
    (row,) = [row for row in found.report.rows if row.site == "w"]
    small = jc.formats.get(fmt).name not in ("nf4", "float6_e2m3fn")
    assert (row.bytes_after < 64 * 32 * 4 / 3) == small, row
    assert small or "stored decoded" in row.reason
    if opset > 19 or "float8" in fmt:
        lower = {25: 24, 23: 21, 21: 20, 19: 18}[opset]
        before = found.nbytes
        try:
            other = jc.export.onnx(fn, p, x, path=tmp_path / "n.onnx", opset=lower)
        except jc.ArtifactError as error:
            assert f"from opset {opset} on" in str(error) and not (tmp_path / "n.onnx").exists()
        else:  # a wider type holds it too
            assert other.nbytes >= before


@pytest.mark.parametrize(
    "fmt", ["float8_e4m3fn", "float6_e2m3fn", "mxfp8_e4m3", "mxfp4", "nvfp4", "float16", "binary"]
)
def test_formats_of_both_operands(fmt, tmp_path):
    """Roundings of small floats, found from the values, in onnx's own evaluator."""
    p, x = {"w": weights(64, 32)}, RNG.normal(size=(5, 64)).astype(np.float32)
    q = Quantizer(fmt)
    fn = jc.quantize_aware(lambda p, x: x @ p["w"], Recipe([Rule("w", q, q)], fmt))
    newest = onnx.defs.onnx_opset_version()
    found = jc.export.onnx(fn, p, x, path=tmp_path / "m.onnx", opset=newest, target="portable")
    assert relative(found.run(x, evaluator="reference"), np.asarray(jax.jit(fn)(p, x))) < 1e-5


def test_scales_of_mx_take_a_byte(tmp_path):
    p, x = {"w": weights(64, 32)}, np.ones((5, 64), np.float32)
    fn = jc.quantize_aware(lambda p, x: x @ p["w"], Recipe([Rule("w", Quantizer("mxfp4"))], "m"))
    sizes = {}
    for opset in (23, 24):
        found = jc.export.onnx(fn, p, x, path=tmp_path / "m.onnx", opset=opset)
        sizes[opset] = next(r.bytes_after for r in found.report.rows if r.site == "w")
    assert sizes == {23: 64 * 32 // 2 + 64 * 4, 24: 64 * 32 // 2 + 64}


def test_report_and_bytes(tmp_path):
    fn, params, inputs = compressed("transformer", "w4a16-g32")
    found = jc.export.onnx(fn, params, *inputs, path=tmp_path / "m.onnx")
    rows = {row.site: row for row in found.report.rows}
    assert rows["layers/w1"].weight == "int4"
    assert rows["layers/w1"].bytes_after == LAYERS * (WIDTH * 64 // 2 + 64 * 4) + 64 // 2
    assert rows["layers/b1"].weight == "float32" and rows["layers/b1"].reason
    stored = sum(len(t.raw_data) for t in onnx.load(found.path).graph.initializer)
    assert found.report.bytes_after == stored < found.nbytes
    assert found.report.bytes_before == jc.nbytes(MODELS["transformer"][1])


def test_strict(tmp_path):
    fn, params, inputs = compressed("cnn", "w4a16-g32")
    path = tmp_path / "m.onnx"
    with pytest.raises(
        jc.ArtifactError, match="3 of 4 sites in floats: `c1`: .*Nothing was written"
    ):
        jc.export.onnx(fn, params, *inputs, path=path, strict=True)
    assert not list(tmp_path.iterdir())
    fn, params, inputs = compressed("mlp", "w8a8-static")
    assert jc.export.onnx(fn, params, *inputs, path=path, strict=True).audit()


def test_other_transforms_around(tmp_path):
    """A mask outside of quantization, sparse storage, and gradients inside."""
    p, (x,) = MODELS["mlp"][1], MODELS["mlp"][2]
    masks = jax.tree.map(lambda w: jnp.abs(w) > 0.05 if w.ndim > 1 else jnp.array(True), p)
    fn = jc.prune.masked(jc.quantize_aware(mlp, "w8a8"), masks)
    slope = jax.grad(lambda x, p: mlp(p, x).sum())
    for f in (fn, lambda p, x: slope(x, p)):
        found = jc.export.onnx(f, p, x, path=tmp_path / "m.onnx")
        assert relative(found.run(x), np.asarray(jax.jit(f)(p, x))) < 1e-5


def test_saved_again_and_read(tmp_path):
    """`load`, `verify`, weights in a file beside it, and the same file again."""
    fn, params, (x,) = compressed("mlp", "float")
    path = tmp_path / "m.onnx"
    first = jc.export.onnx(fn, params, x, path=path, reference=True)
    found = jc.export.verify(jc.export.load(path))
    assert found.rows[0].values == 400 and found.close(1e-5)
    assert jc.export.verify(first, fn, params, [x, x[:40]]).close(1e-5)
    other = jc.export.onnx(fn, params, x, path=path, external_data=True)
    (data,) = tmp_path.glob("*.data")
    assert data.stat().st_size + path.stat().st_size == other.nbytes
    np.testing.assert_array_equal(other.run(x), first.run(x))
    again = jc.export.onnx(fn, params, x, path=path, external_data=True)
    assert not data.exists() and len(list(tmp_path.glob("*.data"))) == 1
    np.testing.assert_array_equal(again.run(x), first.run(x))
    with pytest.raises(jc.ArtifactError, match=r"Input `0` is float32\[40, 63\]"):
        again.run(x[:, 1:])


BAD = {
    "callback": (
        lambda p, x: jax.pure_callback(lambda v: v, jax.ShapeDtypeStruct((4,), jnp.float32), x),
        r"`pure_callback` at .*test_onnx_models.py:\d+.*calls back into Python",
    ),
    "random": (
        lambda p, x: x + jax.random.normal(jax.random.key(x[0].astype(jnp.uint32)), (4,)),
        "draws random numbers",
    ),
    "dtype": (lambda p, x: lax.complex(x, x).real, "there is no rule for it"),
    "unknown": (lambda p, x: lax.lgamma(x), r"`lgamma` at .*onnx_primitives\(\) lists"),
    "devices": (
        lambda p, x: jax.shard_map(
            lambda v: v * 2, mesh=jax.sharding.Mesh(np.array(jax.devices()[:2]), ("a",)),
            in_specs=jax.sharding.PartitionSpec("a"), out_specs=jax.sharding.PartitionSpec("a"),
        )(x),
        "Export the function of one device",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_onnx_cannot_say_is_refused(name, tmp_path):
    fn, message = BAD[name]
    path = tmp_path / "m.onnx"
    path.write_bytes(b"earlier")
    with pytest.raises(jc.ArtifactError, match=message):
        jc.export.onnx(fn, {}, jnp.ones(4), path=path)
    assert path.read_bytes() == b"earlier" and os.listdir(tmp_path) == ["m.onnx"]


def test_two_symbolic_sizes(tmp_path):
    """Any number of texts of any length: positions are cut to it."""
    fn, params, (ids, mask) = compressed("transformer", "w8a8")
    batch, tokens = jax.export.symbolic_shape("batch, tokens", constraints=["tokens <= 12"])
    shapes = [jax.ShapeDtypeStruct((batch, tokens), x.dtype) for x in (ids, mask)]
    found = jc.export.onnx(fn, params, *shapes, path=tmp_path / "m.onnx")

    def stacked(p, x):
        return transformer(p, x[0], x[1] > 0)

    both = jax.ShapeDtypeStruct((2, batch, tokens), jnp.int32)
    small = jc.quantize_aware(stacked, "w8a8")
    assert jc.export.onnx(small, MODELS["transformer"][1], both, path=tmp_path / "n.onnx").audit()
    for n, length in ((8, 9), (3, 5), (1, 9)):
        x = ids[:n, :length], mask[:n, :length] | (np.arange(length) == 0)
        assert relative(found.run(*x), np.asarray(jax.jit(fn)(params, *x))) < 1e-4


def test_bad_settings_are_refused(tmp_path):
    p, (x,) = MODELS["mlp"][1], MODELS["mlp"][2]
    path = tmp_path / "m.onnx"
    for settings, message in (
        ({"opset": 12}, "expected 18 to"),
        ({"opset": 99}, "expected 18 to"),
    ):
        with pytest.raises(jc.ArtifactError, match=message):
            jc.export.onnx(mlp, p, x, path=path, **settings)
    with pytest.raises(jc.ArtifactError, match="are shapes only"):
        shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), p)
        jc.export.onnx(mlp, shapes, x, path=path)
    with pytest.raises(jc.ArtifactError, match=r"ONNX takes the size b\^2 from no input"):
        b = jax.export.symbolic_shape("b")[0]
        jc.export.onnx(
            lambda p, x: jnp.tile(x.sum(), b * b),
            {},
            jax.ShapeDtypeStruct((b,), jnp.float32),
            path=path,
        )
    affine = Quantizer("uint8", "tensor", range="static", symmetric=False)
    recipe = Recipe([Rule("*", Quantizer("int8", "channel"), affine)], "affine")
    small = jc.quantize(mlp, p, recipe, calibration=[x])
    with pytest.raises(jc.ArtifactError, match="TensorRT takes none"):
        jc.export.onnx(small.fn, small.params, x, path=path, target="tensorrt")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(jc.ArtifactError, match="cannot be written"):
        jc.export.onnx(mlp, p, x, path=tmp_path / "file" / "m.onnx")


def test_damaged_files_are_refused(tmp_path):
    p, (x,) = MODELS["mlp"][1], MODELS["mlp"][2]
    path = tmp_path / "m.onnx"
    good = jc.export.onnx(mlp, p, x, path=path).path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(good)
        if rng.random() < 0.3:
            data = data[: rng.integers(1, len(data))]
        for i in rng.integers(0, len(data), rng.integers(1, 20)):
            data[i] = rng.integers(0, 256)
        path.write_bytes(bytes(data))
        try:
            jc.export.load(path)
        except jc.ArtifactError:
            pass
    with pytest.raises(jc.ArtifactError, match="cannot be read as an ONNX model"):
        jc.export.load(tmp_path / "missing.onnx")
    bare = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    path.write_bytes(bare.SerializeToString())
    with pytest.raises(jc.ArtifactError, match="no ONNX model of jaxcompress"):
        jc.export.load(path)


@pytest.mark.parametrize("left", ["int8", "uint8"])
@pytest.mark.parametrize("right", ["int8", "uint8"])
@pytest.mark.parametrize("known", ["left", "right", "neither"])
def test_products_of_bytes_are_exact(left, right, known, tmp_path):
    """Of the largest numbers: pairs of uint8 times int8 leave 16 bits, where kernels saturate."""
    a, b = (np.full(s, np.iinfo(d).max, d) for s, d in (((5, 64), left), ((64, 3), right)))
    a[::2] = np.iinfo(left).min

    def fn(p, x):
        l, r = (p, x) if known == "left" else (x, p)  # noqa: E741
        l, r = (l, r) if known != "neither" else x  # noqa: E741
        return lax.dot_general(l, r, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)

    p, x = (a, b) if known == "left" else (b, a)
    x = x if known != "neither" else (a, b)
    found = jc.export.onnx(fn, p, x, path=tmp_path / "m.onnx")
    np.testing.assert_array_equal(found.run(x), a.astype(np.int32) @ b.astype(np.int32))
