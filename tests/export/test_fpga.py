# SPDX-License-Identifier: Apache-2.0
"""QONNX and hls4ml: the C simulation of the hardware computes the very numbers of the function."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from twins import default

import jaxcompress as jc
from jaxcompress import Quantizer, Recipe, Rule

RNG = np.random.default_rng(0)
EXAMPLES = 1000


def grid(*shape, size=1.0):
    """Numbers with six binary digits behind the point."""
    return jnp.asarray(np.round(RNG.normal(size=shape) * size * 64) / 64, jnp.float32)


def mlp(p, x):
    x = jax.nn.relu(x @ p["w1"] + p["b1"][None])
    return x @ p["w2"] + p["b2"][None]


def conv(x, w, groups=1):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip


def cnn(p, x):
    x = jax.nn.relu(conv(x, p["c"]) + p["b"][None, None, None])
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    if "depthwise" in p:
        x = jax.nn.relu(conv(x, p["depthwise"], 4))
    return x.reshape(x.shape[0], -1) @ p["w"]


DENSE = {"w1": grid(16, 12, size=0.3), "b1": grid(12), "w2": grid(12, 5, size=0.3), "b2": grid(5)}
IMAGES = {"c": grid(3, 3, 1, 4, size=0.3), "b": grid(4), "w": grid(64, 5, size=0.3)}
X = RNG.normal(size=(EXAMPLES, 16)).astype(np.float32)
PICTURES = RNG.normal(size=(EXAMPLES, 8, 8, 1)).astype(np.float32)
STATIC = Quantizer("int6", "tensor", range="static", power_of_two="ceil")
SIGNS = Quantizer("binary", "tensor", range="fixed", range_value=1.0)
TERNARY = Recipe([Rule("*", Quantizer("ternary", "tensor", power_of_two="round"), STATIC)], "t")

MODELS = {
    "mlp": (mlp, DENSE, X, "fpga-w6a6-static"),
    "cnn": (cnn, IMAGES, PICTURES, "fpga-w6a6-static"),
    "depthwise": (
        cnn,
        {**IMAGES, "depthwise": grid(3, 3, 1, 4, size=0.3)},
        PICTURES,
        "fpga-w6a6-static",
    ),
    "ternary": (mlp, {**DENSE, "b1": jnp.zeros(12)}, X, TERNARY),
    "binary": (
        lambda p, x: (x @ p["w1"]) @ p["w2"],
        DENSE,
        X,
        Recipe([Rule("*", SIGNS, SIGNS)], "signs"),
    ),
}


def compressed(fn, params, x, recipe):
    small = jc.quantize(fn, params, recipe, calibration=[x[:200]])
    return small.fn, small.params


# Each costs half a minute of compiling C++.
@pytest.mark.parametrize("name", default(MODELS, "depthwise"))
def test_the_c_simulation_is_the_function(name, tmp_path):
    fn, params, x, recipe = MODELS[name]
    fn, params = compressed(fn, params, x, recipe)
    want = np.asarray(jax.jit(fn)(params, x))
    assert len(np.unique(want)) > 10
    hardware = jc.export.hls4ml(fn, params, x, path=tmp_path / "project")
    np.testing.assert_array_equal(hardware.run(x), want)
    assert (tmp_path / "project" / "firmware").is_dir()
    model = jc.export.qonnx(fn, params, x, path=tmp_path / "m.onnx")
    np.testing.assert_array_equal(model.run(x[:50]), want[:50])
    found = jc.export.verify(jc.export.load(model.path), fn, params, [x[:20]])
    assert found.equal and found.rows[0].values == want[:20].size
    kinds = collections.Counter(node.op_type for node in model.model.graph.node)
    assert kinds["BipolarQuant" if name == "binary" else "Quant"] >= 4 and not kinds["Gemm"]


def test_what_is_written(tmp_path):
    """Scales 2^k, zero points 0, widths and narrow ranges as QONNX has them."""
    fn, params = compressed(*MODELS["mlp"])
    model = jc.export.qonnx(fn, params, X, path=tmp_path / "m.onnx")
    from onnx import numpy_helper

    arrays = {t.name: numpy_helper.to_array(t) for t in model.model.graph.initializer}
    widths = []
    for node in model.model.graph.node:
        if node.op_type == "Quant":
            scale, zero, bits = (arrays[n] for n in node.input[1:])
            assert np.frexp(scale)[0] == 0.5 and zero == 0
            set_ = {a.name: (a.i or a.s.decode()) for a in node.attribute}
            assert set_["signed"] == 1 and set_["rounding_mode"] == "ROUND"
            widths.append((float(bits), set_["narrow"]))
    assert widths.count((6.0, 1)) == 4
    assert {(v.key, v.value) for v in model.model.metadata_props} and model.target == "qonnx"
    imports = {o.domain: o.version for o in model.model.opset_import}
    assert imports == {"": 13, "qonnx.custom_op.general": 2} and model.model.ir_version == 8
    weights = [row for row in model.report.rows if row.site in ("w1", "w2")]
    assert all(row.bytes_after for row in weights)


def test_biases(tmp_path):
    """Exact where 32 bits are enough; else rounded as asked, or refused."""
    odd = {
        **DENSE,
        "b1": DENSE["b1"] + 1e-6 * jnp.arange(12),
        "b2": DENSE["b2"] * np.float32(np.pi),
    }
    fn, params = compressed(mlp, {**odd, "b1": odd["b1"].at[0].set(1e-12)}, X, "fpga-w6a6-static")
    with pytest.raises(jc.ArtifactError, match="`?w1`? takes .* bits .*bias_digits=8"):
        jc.export.qonnx(fn, params, X, path=tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    model = jc.export.qonnx(fn, params, X, path=tmp_path / "m.onnx", bias_digits=8)
    rounded = {k: jnp.round(v * 256) / 256 if k[0] == "b" else v for k, v in params.weights.items()}
    want = jax.jit(fn)(jc.QuantParams(rounded, params.learned, params.statistics), X[:30])
    np.testing.assert_array_equal(model.run(X[:30]), np.asarray(want))


BAD = {
    "another scale": ("w8a8-static", r"a scale of `w1` is .* powers of two"),
    "dynamic": ("fpga-w6a6", "rule '\\*' of recipe `fpga-w6a6` finds the range .* in each call"),
    "zero point": (
        Recipe(
            [Rule("*", Quantizer("int6", "tensor", power_of_two="ceil"),
                  Quantizer("uint6", "tensor", range="static", power_of_two="ceil"))],
            "affine",
        ),
        "`w1` has a zero point, which FPGA tools get wrong",
    ),
    "floats": (
        Recipe([Rule("*", Quantizer("float8_e4m3fn", "tensor", power_of_two="ceil"), STATIC)], "f"),
        "`w1` is in float8_e4m3fn, and FPGA tools take integers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_recipes_that_hardware_cannot_hold(name, tmp_path):
    recipe, message = BAD[name]
    fn, params = compressed(mlp, DENSE, X - 0.5, recipe)
    for export in (jc.export.qonnx, jc.export.hls4ml):
        with pytest.raises(jc.ArtifactError, match=message):
            export(fn, params, X, path=tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_operations_that_hardware_does_not_have(tmp_path):
    fn, params = compressed(lambda p, x: jnp.sort(mlp(p, x), -1), DENSE, X, "fpga-w6a6-static")
    with pytest.raises(jc.ArtifactError, match="needs TopK, which FPGA tools do not read"):
        jc.export.qonnx(fn, params, X, path=tmp_path / "m.onnx")
    with pytest.raises(jc.ArtifactError, match="a leading axis"):
        jc.export.qonnx(lambda p, x: x, {}, np.float32(1), path=tmp_path / "m.onnx")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(jc.ArtifactError, match="is not an empty directory"):
        jc.export.hls4ml(mlp, DENSE, X, path=tmp_path / "full")


def test_stored_scales_that_are_powers_of_two():
    """The least power of two that holds the range; trained with it, and served with it."""
    fn, params = compressed(*MODELS["mlp"])
    x = X[:8]
    high = np.abs(X[:200]).max()
    scale = 2.0 ** np.ceil(np.log2(high / 31))
    first = np.clip(np.rint(x / scale), -31, 31) * scale

    def of(w):
        s = 2.0 ** np.ceil(np.log2(np.abs(w).max() / 31))
        return np.clip(np.rint(np.asarray(w) / s), -31, 31) * s

    hidden = np.maximum(first @ of(DENSE["w1"]) + np.asarray(DENSE["b1"]), 0)
    seen = np.abs(np.asarray(jax.nn.relu(X[:200] @ DENSE["w1"] + DENSE["b1"][None]))).max()
    middle = 2.0 ** np.ceil(np.log2(seen / 31))
    second = np.clip(np.rint(hidden / middle), -31, 31) * middle
    want = second @ of(DENSE["w2"]) + np.asarray(DENSE["b2"])
    np.testing.assert_array_equal(np.asarray(fn(params, x)), want.astype(np.float32))
