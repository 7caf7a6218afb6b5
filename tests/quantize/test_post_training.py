# SPDX-License-Identifier: Apache-2.0
"""`jc.quantize`: what is served equals what was trained, packed, whatever the model looks like."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import draw

import jaxcompress as jc
from tests.twins import ROUNDING, assert_same

L, D, F, VOCAB = 3, 32, 64, 50


def layer(x, p):
    h = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * p["g"]
    return x + jax.nn.relu(h @ p["mix"] @ p["up"]) @ p["down"]


def scanned(params, ids):
    x, _ = jax.lax.scan(lambda x, p: (layer(x, p), None), params["emb"][ids], params["layers"])
    return x @ params["head"]


def unrolled(params, ids):
    x = params["emb"][ids]
    for p in params["layers"]:
        x = layer(x, p)
    return x @ params["head"]


def make(seed=0):
    """Parameters with stacked layers, and the same with a list of layers."""
    layers = {
        "mix": draw(seed + 1, L, D, D) / 6,
        "up": draw(seed + 2, L, D, F) / 6,
        "down": draw(seed + 3, L, F, D) / 8,
        "g": jnp.ones((L, 1, 1, D)),
    }
    emb, head = draw(seed, VOCAB, D), draw(seed + 4, D, 10)
    params = {"emb": emb, "layers": layers, "head": head}
    return params, params | {
        "layers": [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(L)]
    }


DATA = [jax.random.randint(jax.random.key(i), (4, 32), 0, VOCAB) for i in range(3)]
MLP = {"a": draw(3, 16, 32), "b": jnp.ones((1, 32))}
X = draw(4, 6, 16)


def mlp(params, x):
    return jax.nn.relu(x @ params["a"] + params["b"])


def distance(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@pytest.mark.parametrize("recipe", ["w8a8", "w4a16-g32", "mxfp4"])
def test_rounding_to_nearest_serves_what_training_computes(recipe):
    params, _ = make()
    small = jc.quantize(scanned, params, recipe, example_inputs=DATA[0])
    trained = jax.jit(jc.quantize_aware(scanned, recipe))(params, DATA[0])
    np.testing.assert_array_equal(jax.jit(small.fn)(small.params, DATA[0]), trained)
    kinds = jax.tree.map(lambda x: isinstance(x, jc.QTensor), small.params, is_leaf=is_qtensor)
    assert kinds["emb"] and kinds["head"] and kinds["layers"]["up"] and not kinds["layers"]["g"]
    assert small.report.bytes_after == jc.nbytes(small.params)


def is_qtensor(x):
    return isinstance(x, jc.QTensor)


@pytest.mark.parametrize("recipe", ["w8a8-static", "lsq-w4a4"])
def test_trained_ranges_are_served(recipe):
    held = jc.quant_params(mlp, recipe)(MLP, X)
    held = jc.QuantParams(
        held.weights, jax.tree.map(lambda s: 0.9 * s, held.learned), held.statistics
    )
    small = jc.quantize(mlp, held, recipe, example_inputs=X)
    assert is_qtensor(small.params.weights["a"])
    want = jax.jit(jc.quantize_aware(mlp, recipe))(held, X)
    np.testing.assert_array_equal(jax.jit(small.fn)(small.params, X), want)


def test_averaged_ranges_stop_following_the_data():
    ema = jc.Quantizer("int8", "tensor", range="ema")
    recipe = jc.Recipe([jc.Rule("*", "int8", ema)])
    held = jc.quant_params(mlp, recipe)(MLP, X)
    small = jc.quantize(mlp, held, recipe, example_inputs=X)
    rows = jnp.concatenate([X, 100 * X])
    np.testing.assert_array_equal(
        small.fn(small.params, rows)[:6], small.fn(small.params, X)
    )  # another batch changes nothing


def test_calibrated_ranges_are_those_of_calibrate():
    params, _ = make()
    small = jc.quantize(scanned, params, "w8a8-static", calibration=DATA)
    state = jc.calibrate(scanned, params, DATA, "w8a8-static")
    assert_same(small.params.statistics, state.statistics)
    given = jc.quantize(scanned, params, "w8a8-static", example_inputs=DATA[0], state=state)
    assert_same(given.fn(given.params, DATA[1]), small.fn(small.params, DATA[1]))


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_scanned_layers_equal_layers_in_a_list(method):
    stacked, listed = make()
    a = jc.quantize(scanned, stacked, "w4a16-g32", example_inputs=DATA[0], method=method)
    b = jc.quantize(unrolled, listed, "w4a16-g32", example_inputs=DATA[0], method=method)
    assert_same(
        a.fn(a.params, DATA[1]), b.fn(b.params, DATA[1]), 4 * ROUNDING
    )  # float sums in another order


def test_clip_search_errs_less_than_every_factor_tried_by_hand():
    """Brute force over a grid of factors, one scale per channel of 3 bits."""
    w = np.asarray(jax.random.t(jax.random.key(5), 3.0, (64, 8)), np.float32)
    recipe = jc.Recipe([jc.Rule("*", "int3")])
    fn = lambda params, x: x @ params["w"]  # noqa: E731
    small = jc.quantize(fn, {"w": w}, recipe, example_inputs=jnp.ones((1, 64)), method="mse")
    got = np.sum((np.asarray(small.params["w"].dequantize()) - w) ** 2, 0)
    for factor in np.arange(16, 81) / 80:
        scale = np.abs(w).max(0) * np.float32(factor) / 3
        q = np.clip(np.round(w / scale), -3, 3) * scale
        assert (got <= np.sum((q - w) ** 2, 0) * (1 + 1e-5)).all(), factor
    plain = jc.quantize(fn, {"w": w}, recipe, example_inputs=jnp.ones((1, 64)))
    assert got.sum() < np.sum((np.asarray(plain.params["w"].dequantize()) - w) ** 2)


def test_the_report_measures_weights_and_results():
    params, _ = make()
    start = time.perf_counter()
    small = jc.quantize(scanned, params, "w4a16-g32", calibration=DATA)
    wall = time.perf_counter() - start
    rows = {row.site: row for row in small.report.rows}
    w, q = params["head"], small.params["head"].dequantize()
    snr = 10 * np.log10(float(jnp.sum(w**2) / jnp.sum((w - q) ** 2)))
    assert rows["head"].weight_snr_db == pytest.approx(snr, abs=1e-3)
    clean, noisy = scanned(params, DATA[0]), small.fn(small.params, DATA[0])
    snr = 10 * np.log10(float(jnp.sum(clean**2) / jnp.sum((clean - noisy) ** 2)))
    assert rows["head"].snr_db == pytest.approx(snr, abs=1e-2)  # what the function returns
    assert rows["layers/g"].reason.startswith("read by no matmul")
    took = [row.seconds for row in small.report.rows if row.weight_snr_db is not None]
    assert took and all(t > 0 for t in took) and sum(took) < wall
    assert rows["layers/g"].seconds is None and "seconds" in str(small.report)
    assert "weight SNR dB" in str(small.report) and '"weight_snr_db"' in small.report.to_json()


def test_a_weight_read_in_parts_stays_and_is_named():
    params = {"w": draw(0, 8, 6)}
    fn = lambda p, x: x @ p["w"][:, :3] + x @ p["w"][:, 3:]  # noqa: E731
    small = jc.quantize(fn, params, "w8a8", example_inputs=jnp.ones((2, 8)))
    assert not is_qtensor(small.params["w"])
    assert "rounded where it is used" in small.report.rows[0].reason
    want = jc.quantize_aware(fn, "w8a8")(params, jnp.ones((2, 8)))
    np.testing.assert_array_equal(small.fn(small.params, jnp.ones((2, 8))), want)


def nan_at(params, path):
    return params | {path: params[path].at[0].set(jnp.nan)}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"example_inputs": None}, jc.JaxCompressError, "example_inputs= .* or calibration="),
        ({"params": nan_at(MLP, "a")}, jc.JaxCompressError, "`a` has 32 NaNs"),
        ({"method": "gptqq"}, jc.RecipeError, "unknown method 'gptqq'"),
        ({"method": []}, jc.RecipeError, "names no method"),
        ({"method": ["rtn", "mse"]}, jc.RecipeError, "rtn and mse both round"),
        ({"method": 3}, jc.RecipeError, "expected the name of a method"),
        ({"recipe": "w8a8-static"}, jc.JaxCompressError, "pass calibration="),
        ({"example_inputs": None, "calibration": []}, jc.JaxCompressError, "no batches"),
        ({"example_inputs": None, "calibration": 3}, jc.JaxCompressError, "iterable of batches"),
        ({"example_inputs": jnp.ones((0, 16))}, jc.JaxCompressError, "empty array"),
    ],
)
def test_bad_input_is_named(change, error, words):
    given = {"params": MLP, "recipe": "w8a8", "example_inputs": X} | change
    with pytest.raises(error, match=words):
        jc.quantize(mlp, given.pop("params"), given.pop("recipe"), **given)


def test_shapes_are_enough_to_pack():
    small = jc.quantize(mlp, MLP, "w8a8", example_inputs=jax.ShapeDtypeStruct((6, 16), "float32"))
    want = jc.quantize(mlp, MLP, "w8a8", example_inputs=X)
    assert_same(small.params["a"].dequantize(), want.params["a"].dequantize())
    assert small.report.rows[0].snr_db is None and want.report.rows[0].snr_db > 30


def test_packed_parameters_are_not_packed_again():
    small = jc.quantize(mlp, MLP, "w8a8", example_inputs=X)
    with pytest.raises(jc.JaxCompressError, match="QTensors already"):
        jc.quantize(mlp, small.params, "w8a8", example_inputs=X)
