# SPDX-License-Identifier: Apache-2.0
"""Methods of `jc.quantize` through the whole driver: float functions unchanged, errors smaller."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import draw

import jaxcompress as jc
from jaxcompress._calibration.stream import Batches, Inputs
from jaxcompress._quantize.job import Job
from jaxcompress._solvers.gptq import gptq as solve
from tests.quantize.test_post_training import DATA, distance, make, scanned, unrolled

W3 = jc.Recipe(
    [jc.Rule("*", "int8", op="gather"), jc.Rule("*", jc.Quantizer("int3", "group:32"))], "w3"
)


def correlated(n, d, seed):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) @ (rng.normal(size=(d, d)) * (rng.random(d) ** 4))).astype("f4")


X = [correlated(64, 16, i) for i in range(2)]
MLP = {
    "a": {"w": draw(0, 16, 32), "b": jnp.ones((1, 32))},
    "c": {"w": draw(1, 8, 32), "b": jnp.zeros((8,))},
}


def mlp(p, x):
    h = jax.nn.relu(x @ p["a"]["w"] + p["a"]["b"])
    return h @ p["c"]["w"].T + p["c"]["b"][None]


def test_gptq_equals_the_solver_on_hessians_by_hand():
    """In sequence: the second layer sees what the first one makes once it is rounded."""
    recipe = jc.Recipe([jc.Rule("*", "int3")])
    plain = jc.methods.gptq(act_order=False, search=False)
    small = jc.quantize(mlp, MLP, recipe, calibration=X, method=plain)
    x = np.concatenate(X)
    first = solve(MLP["a"]["w"].T, x.T @ x, jc.formats.int3).w_q.T
    np.testing.assert_allclose(small.params["a"]["w"].dequantize(), first, atol=1e-6)
    h = jax.nn.relu(x @ first + MLP["a"]["b"])
    second = solve(MLP["c"]["w"], h.T @ h, jc.formats.int3).w_q
    np.testing.assert_allclose(small.params["c"]["w"].dequantize(), second, atol=1e-6)


@pytest.mark.full
def test_gptq_of_scanned_layers_equals_that_of_a_list_and_repeats_its_bits():
    stacked, listed = make()
    a = jc.quantize(scanned, stacked, W3, calibration=DATA, method="gptq")
    b = jc.quantize(unrolled, listed, W3, calibration=DATA, method="gptq")
    for k in range(3):
        for name in ("mix", "up", "down"):
            got = a.params["layers"][name].dequantize()[k]
            want = b.params["layers"][k][name].dequantize()
            assert distance(got, want) < 1e-3, (k, name)  # a tie may be rounded otherwise
    clean = scanned(stacked, DATA[0])
    plain = jc.quantize(scanned, stacked, W3, calibration=DATA)
    error = distance(a.fn(a.params, DATA[0]), clean)
    assert error < 0.8 * distance(plain.fn(plain.params, DATA[0]), clean)
    again = jc.quantize(scanned, stacked, W3, calibration=DATA, method="gptq")
    jax.tree.map(np.testing.assert_array_equal, a.params, again.params)


def test_a_run_goes_on_where_it_stopped(tmp_path):
    seen = []

    def batches():
        for x in X:
            seen.append(len(seen))
            yield x

    recipe = jc.Recipe([jc.Rule("*", "int3")])
    run = lambda p: jc.quantize(  # noqa: E731
        mlp, p, recipe, calibration=batches, method="gptq", checkpoint_dir=tmp_path
    )
    first = run(MLP)
    walked = len(seen)
    (tmp_path / "block_0001.npz").unlink()  # as if it had stopped in the second block
    second = run(MLP)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert len(seen) - walked < walked
    other = MLP | {"a": {"w": MLP["a"]["w"] + 1, "b": MLP["a"]["b"]}}
    with pytest.raises(jc.ArtifactError, match="of another calculation"):
        run(other)
    (tmp_path / "block_0000.npz").write_bytes(b"nothing")
    with pytest.raises(jc.ArtifactError, match="damaged"):
        run(MLP)


def normed(p, x):
    x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * p["g"]
    return mlp(p, x)


@pytest.mark.parametrize("method", ["smoothquant", "awq", "equalization"])
def test_scaling_leaves_the_float_function_unchanged(method):
    params = MLP | {"g": jnp.ones((1, 16))}
    job = Job(normed, params, jc.recipes.get("w8a8"), Inputs(X[0]), Batches(X))
    prepared = jc.methods.get(method).prepare(job)
    moved = [distance(a, b) for a, b in zip(*map(jax.tree.leaves, (prepared.params, params)))]
    assert max(moved) > 0.1  # something was scaled
    assert distance(prepared.fn(prepared.params, X[0]), normed(params, X[0])) < 1e-5


def test_smoothing_by_hand():
    params = {"g": jnp.ones((1, 16)), "w": draw(2, 16, 4)}
    fn = lambda p, x: (x * p["g"]) @ p["w"]  # noqa: E731
    job = Job(fn, params, jc.recipes.get("w8a8"), Inputs(X[0]), Batches(X))
    new = jc.methods.smoothquant(alpha=0.5).prepare(job).params
    x, w = np.abs(np.concatenate(X)).max(0), np.abs(np.asarray(params["w"])).max(1)
    s = np.sqrt(x / w)
    np.testing.assert_allclose(new["w"], np.asarray(params["w"]) * s[:, None], rtol=1e-5)
    np.testing.assert_allclose(new["g"][0], 1 / s, rtol=1e-5)


def test_awq_chooses_as_an_exhaustive_search_does():
    """Float64 losses over all tokens, for each of the 20 exponents."""
    params = {"g": jnp.ones((1, 16)), "w": draw(2, 16, 4)}
    fn = lambda p, x: (x * p["g"]) @ p["w"]  # noqa: E731
    recipe = jc.Recipe([jc.Rule("*", "int3")])
    job = Job(fn, params, recipe, Inputs(X[0]), Batches(X))
    new = jc.methods.get("awq").prepare(job).params
    x, w = np.concatenate(X).astype(np.float64), np.asarray(params["w"], np.float64)
    a = np.abs(x).mean(0)

    def scale(r):
        s = np.maximum(a**r, 1e-4)
        return s / np.sqrt(s.max() * s.min())

    def loss(s):
        v = w * s[:, None]
        step = np.abs(v).max(0) / 3
        q = np.clip(np.round(v / step), -3, 3) * step / s[:, None]
        return np.sum((x @ (q - w)) ** 2)

    best = min((scale(k / 20) for k in range(20)), key=loss)
    np.testing.assert_allclose(new["w"], w * best[:, None], rtol=1e-4)


def test_biases_keep_the_mean_of_the_outputs():
    recipe = jc.Recipe([jc.Rule("*", "int2")])
    only = jc.quantize(mlp, MLP, recipe, calibration=X, method="rtn")
    both = jc.quantize(mlp, MLP, recipe, calibration=X, method=["rtn", "bias_correction"])
    x = np.concatenate(X)
    pre = lambda p, w: x @ w + p["a"]["b"]  # noqa: E731
    want = pre(MLP, MLP["a"]["w"]).mean(0)
    w = only.params["a"]["w"].dequantize()
    assert distance(pre(only.params, w).mean(0), want) > 1e-2
    assert distance(pre(both.params, w).mean(0), want) < 1e-4
    assert float(jnp.abs(both.params["c"]["b"]).max()) > 0  # the bias behind a transposed weight


def test_biases_of_convolutions_and_of_stacked_layers():
    params = {
        "conv": draw(3, 4, 1, 3, 3), "b": jnp.zeros((4,)),
        "w": draw(4, 2, 4, 4), "c": jnp.zeros((2, 1, 4)),
    }  # fmt: skip

    def fn(p, x):
        y = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME") + p["b"][:, None, None][None]
        layer = lambda h, w: (h @ w["w"] + w["c"], None)  # noqa: E731
        return y, jax.lax.scan(layer, y.mean((2, 3)), {"w": p["w"], "c": p["c"]})[0]

    data = [draw(5, 3, 1, 6, 6) + 1]
    recipe = jc.Recipe([jc.Rule("*", "int2")])
    plain = jc.quantize(fn, params, recipe, calibration=data)
    small = jc.quantize(fn, params, recipe, calibration=data, method=["rtn", "bias_correction"])
    want = fn(params, data[0])[0].mean((0, 2, 3))
    got, before = (c.fn(c.params, data[0])[0].mean((0, 2, 3)) for c in (small, plain))
    assert distance(got, want) < 1e-4 < distance(before, want)
    h = fn(params, data[0])[0].mean((2, 3)).mean(0)  # of the float function
    for i in range(2):
        q = small.params["w"].dequantize()[i]
        shift = h @ (params["w"][i] - q)
        np.testing.assert_allclose(small.params["c"][i, 0], shift, atol=1e-4)
        h = h @ params["w"][i]


def test_folded_norms_are_gone_and_the_function_is_the_same():
    params = {
        "w": draw(6, 16, 8), "gamma": jnp.linspace(0.5, 2, 8)[None],
        "beta": jnp.ones((1, 8)), "mean": jnp.ones((1, 8)), "var": jnp.linspace(1, 3, 8)[None],
    }  # fmt: skip

    def fn(p, x):
        y = (x @ p["w"] - p["mean"]) / jnp.sqrt(p["var"] + 1e-5)
        return y * p["gamma"] + p["beta"]

    small = jc.quantize(fn, params, "w8a16", calibration=X, method=["fold_norm", "rtn"])
    assert distance(small.fn(small.params, X[0]), fn(params, X[0])) < 0.01
    factor = params["gamma"] / jnp.sqrt(params["var"] + 1e-5)
    assert distance(small.params["w"].dequantize(), params["w"] * factor) < 0.01


def routed(p, x):
    return jax.lax.cond(jnp.sum(x) > 1e9, lambda x: x @ p["w"], lambda x: x, x)


def test_what_the_data_does_not_tell_is_an_error_or_a_warning():
    recipe = jc.Recipe([jc.Rule("re:w|a/w", "int4")])
    run = lambda fn, p, x, **k: jc.quantize(fn, p, recipe, method="gptq", **k, **x)  # noqa: E731
    with pytest.raises(jc.JaxCompressError, match="gptq needs to see data"):
        run(mlp, MLP, {"example_inputs": X[0]})
    with pytest.raises(jc.SiteError, match="no calibration token reached `w`"):
        run(routed, {"w": jnp.eye(16)}, {"calibration": X})
    with pytest.warns(UserWarning, match="`a/w` saw 3 calibration tokens: .* rank 3 at most of 16"):
        small = run(mlp, MLP, {"calibration": [X[0][:3]]}, sequential=False)
    assert any("rank 3 at most of 16" in row.reason for row in small.report.rows)
    both = jc.Recipe([jc.Rule("*", "int4")])  # two blocks, so two walks
    with pytest.raises(jc.JaxCompressError, match="several times"):
        jc.quantize(mlp, MLP, both, calibration=iter(X), method="gptq")
    run(mlp, MLP, {"calibration": iter(X)}, sequential=False)
    held = jc.quant_params(mlp, "w8a8-static")(MLP, X[0])
    with pytest.raises(jc.RecipeError, match="change what flows through the sites"):
        jc.quantize(mlp, held, "w8a8-static", calibration=X, method="smoothquant")


def test_tables_and_shared_weights_are_rounded_to_nearest_and_named():
    params, _ = make()
    tied = lambda p, ids: p["emb"][ids] @ p["emb"].T  # noqa: E731
    small = jc.quantize(tied, {"emb": params["emb"]}, "w8a16", calibration=DATA, method="gptq")
    assert "it is a table for lookups" in small.report.rows[0].reason
    want = jc.quantize(tied, {"emb": params["emb"]}, "w8a16", calibration=DATA)
    np.testing.assert_array_equal(small.params["emb"].codes, want.params["emb"].codes)
