# SPDX-License-Identifier: Apache-2.0
"""Wanda and SparseGPT through whole functions, against the published loops on inputs by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from twins import draw

import jaxcompress as jc
from jaxcompress import prune
from tests.quantize.test_post_training import DATA, make, scanned, unrolled
from tests.quantize.test_post_training_methods import MLP, X, correlated, distance, mlp
from tests.quantize.test_post_training_models import equinox, linen, of_nnx
from tests.solvers.test_sparse_solvers import most, published


def wanda_by_hand(w, x, sparsity=None, nm=None):
    """w [out, in], x [tokens, in]: the mask of the published loop, in float64."""
    scores = np.abs(np.asarray(w, np.float64)) * np.linalg.norm(np.asarray(x, np.float64), axis=0)
    size, keep = (nm[1], nm[0]) if nm else (w.shape[1], w.shape[1] - round(w.shape[1] * sparsity))
    rows = scores.reshape(-1, size)
    return np.stack([most(row, keep) for row in rows]).reshape(w.shape)


def sparsegpt_by_hand(w, x, sparsity=None, nm=None):
    x = np.asarray(x, np.float64)
    return published(w, x.T @ x, sparsity, nm)


def same(got, want):
    """A float32 score may be on the other side of a threshold than its float64 twin."""
    return (np.asarray(got) == want).mean()


@pytest.mark.parametrize("amount", [{"sparsity": 0.4}, {"nm": (2, 4)}], ids=["some", "2:4"])
def test_layers_in_sequence_by_hand(amount):
    x = np.concatenate(X)
    small = prune.wanda(mlp, MLP, X, **amount)
    first = wanda_by_hand(MLP["a"]["w"].T, x, **amount)
    np.testing.assert_array_equal(small.report.masks["a"]["w"], first.T)
    np.testing.assert_array_equal(small.params["a"]["w"], np.where(first.T, MLP["a"]["w"], 0))
    h = jax.nn.relu(x @ small.params["a"]["w"] + MLP["a"]["b"])
    second = wanda_by_hand(MLP["c"]["w"], h, **amount)
    assert same(small.report.masks["c"]["w"], second) > 0.99

    small = prune.sparsegpt(mlp, MLP, X, **amount)
    want, mask = sparsegpt_by_hand(MLP["a"]["w"].T, x, **amount)
    assert same(small.report.masks["a"]["w"], mask.T) > 0.97
    assert np.isclose(small.params["a"]["w"], want.T, 1e-3, 1e-3).mean() > 0.97
    h = jax.nn.relu(x @ small.params["a"]["w"] + MLP["a"]["b"])
    _, mask = sparsegpt_by_hand(MLP["c"]["w"], h, **amount)
    assert same(small.report.masks["c"]["w"], mask) > 0.97
    for kept, w in zip(jax.tree.leaves(small.report.masks), jax.tree.leaves(small.params)):
        assert not np.asarray(w)[~np.broadcast_to(kept, w.shape)].any()


def test_all_at_once_sees_the_float_function():
    small = prune.wanda(mlp, MLP, X, sparsity=0.9, sequential=False)
    h = jax.nn.relu(np.concatenate(X) @ MLP["a"]["w"] + MLP["a"]["b"])
    mask = wanda_by_hand(MLP["c"]["w"], h, 0.9)
    assert same(small.report.masks["c"]["w"], mask) > 0.99
    assert same(prune.wanda(mlp, MLP, X, sparsity=0.9).report.masks["c"]["w"], mask) < 0.99


@pytest.mark.full
def test_scanned_layers_equal_layers_in_a_list():
    stacked, listed = make()
    a = prune.sparsegpt(scanned, stacked, DATA, nm=(2, 4))
    b = prune.sparsegpt(unrolled, listed, DATA, nm=(2, 4))
    for k in range(3):
        for name in ("mix", "up", "down"):
            assert same(a.report.masks["layers"][name][k], b.report.masks["layers"][k][name]) > 0.98
            assert distance(a.params["layers"][name][k], b.params["layers"][k][name]) < 0.05
    assert dict(a.report.notes) == {
        "emb": "left alone: it is read by gather, without rows of inputs",
        "layers/g": "left alone: no matmul or convolution reads it",
    }
    assert "left alone" in str(a.report) and a.report.masks["emb"].shape == ()
    clean = scanned(stacked, DATA[0])
    plain = prune.wanda(scanned, stacked, DATA, nm=(2, 4))
    error = distance(a.fn(a.params, DATA[0]), clean)
    assert error < 0.9 * distance(plain.fn(plain.params, DATA[0]), clean)


@pytest.mark.parametrize("build", [linen, of_nnx, equinox])
def test_models_of_libraries_get_the_masks_of_the_plain_function(build):
    want = prune.wanda(mlp, MLP, X, nm=(2, 4)).report.masks
    fn, params, kernel = build()
    small = prune.wanda(fn, params, X, nm=(2, 4))
    np.testing.assert_array_equal(kernel(small.report.masks, "a"), want["a"]["w"])
    np.testing.assert_array_equal(kernel(small.report.masks, "c"), want["c"]["w"].T)
    assert small.fn(small.params, X[0]).shape == (64, 8)


def test_convolutions_and_experts():
    """Kernels along input channels and window; each expert for itself."""
    params = {
        "k": draw(0, 3, 3, 4, 8),
        "e": draw(1, 2, 8, 4),
    }
    numbers = ("NHWC", "HWIO", "NHWC")

    def fn(p, x):
        y = jax.lax.conv_general_dilated(x, p["k"], (1, 1), "VALID", dimension_numbers=numbers)
        y = jax.nn.relu(y).reshape(2, -1, 8)
        return jnp.einsum("etd,edf->etf", y, p["e"])

    x = np.asarray(draw(2, 4, 6, 6, 4))
    masks = prune.wanda(fn, params, [x], sparsity=0.5).report.masks
    patches = np.stack([x[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3)], -1)
    rows = patches.reshape(-1, 36)  # channel, then window
    w = np.asarray(params["k"]).transpose(3, 2, 0, 1).reshape(8, 36)
    got = np.asarray(masks["k"]).transpose(3, 2, 0, 1).reshape(8, 36)
    assert same(got, wanda_by_hand(w, rows, 0.5)) == 1
    pruned = {**params, "k": np.where(masks["k"], params["k"], 0)}
    y = jax.lax.conv_general_dilated(x, pruned["k"], (1, 1), "VALID", dimension_numbers=numbers)
    y = jax.nn.relu(y).reshape(2, -1, 8)
    for i in range(2):
        want = wanda_by_hand(np.asarray(params["e"][i]).T, y[i], 0.5)
        assert same(np.asarray(masks["e"][i]).T, want) == 1


def test_blocks_by_hand():
    x = np.concatenate(X)
    masks = prune.wanda(mlp, MLP, X, sparsity=0.5, structure=prune.blocks(4, 2)).report.masks
    w = np.asarray(MLP["a"]["w"]).T
    scores = (np.abs(w) * np.linalg.norm(x, axis=0)).reshape(8, 4, 8, 2).mean((1, 3))
    want = np.kron(most(scores, 32), np.ones((4, 2), bool))
    np.testing.assert_array_equal(np.asarray(masks["a"]["w"]).T, want)

    small = prune.sparsegpt(mlp, MLP, X, sparsity=0.5, structure=prune.blocks(4, 2))
    mask = np.asarray(small.report.masks["a"]["w"]).T
    units = mask.reshape(8, 4, 8, 2).transpose(0, 2, 1, 3).reshape(64, 8)
    assert (units.all(1) | ~units.any(1)).all() and units.all(1).sum() == 32
    h = np.float64(x.T @ x)
    h += 0.01 * np.mean(np.diag(h)) * np.eye(16)
    scores = (np.float64(w) ** 2 / np.diag(np.linalg.inv(h))).reshape(8, 4, 8, 2).mean((1, 3))
    assert same(mask, np.kron(most(scores, 32), np.ones((4, 2), bool))) > 0.95
    left, u = np.array(w, np.float64), np.linalg.cholesky(np.linalg.inv(h)).T
    for i in range(16):  # the published loop, with this mask
        e = np.where(mask[:, i], 0, left[:, i]) / u[i, i]
        left[:, i:] -= np.outer(e, u[i, i:])
    np.testing.assert_allclose(small.params["a"]["w"], np.where(mask, left, 0).T, atol=2e-3)


def test_owl_by_its_formula():
    stacked, _ = make()
    stacked["layers"]["up"] = stacked["layers"]["up"].at[1, :, :4].mul(40.0)
    names = ("mix", "up", "down")
    small = prune.wanda(
        scanned, stacked, DATA, sparsity=0.5, profile=prune.owl(m=5, lam=0.1), exclude="head"
    )
    masks = small.report.masks["layers"]
    found = np.array([1 - np.mean([np.mean(masks[n][k]) for n in names]) for k in range(3)])
    shares, x = [], [stacked["emb"][ids] for ids in DATA]
    for k in range(3):
        p = jax.tree.map(lambda a, k=k: a[k], stacked["layers"])
        h = [a / jnp.sqrt(jnp.mean(a**2, -1, keepdims=True) + 1e-6) * p["g"] for a in x]
        mixed = [a @ p["mix"] for a in h]
        up = [jax.nn.relu(a @ p["up"]) for a in mixed]
        norm = lambda a: np.linalg.norm(np.concatenate(a).reshape(-1, a[0].shape[-1]), axis=0)  # noqa: E731
        metric = np.concatenate(
            [
                (np.abs(p[n]) * norm(a)[:, None]).ravel()
                for n, a in zip(names, (h, mixed, up), strict=True)
            ]
        )
        shares.append(np.mean(metric > 5 * metric.mean()))
        x = [a + b @ p["down"] for a, b in zip(x, up, strict=True)]
    shares = np.array(shares)
    ratio = (shares - shares.min()) / (shares.max() - shares.min()) * 0.2
    want = 1 - (ratio - ratio.mean() + 0.5)
    np.testing.assert_allclose(found, want, atol=0.02)  # counts of inputs are whole numbers
    assert np.ptp(found) > 0.15 and abs(found.mean() - 0.5) < 0.01


def test_joint_rounding_and_kept_zeros():
    recipe = jc.Recipe([jc.Rule("*", "int3")])
    x = np.concatenate(X)

    def error(small):
        """Of the first layer, which both round and prune on the same inputs."""
        return distance(x @ small.params["a"]["w"], x @ MLP["a"]["w"])

    pruned = prune.sparsegpt(mlp, MLP, X, nm=(2, 4))
    joint = jc.quantize(mlp, MLP, recipe, calibration=X, method=jc.methods.sparsegpt(nm=(2, 4)))
    after = jc.quantize(mlp, pruned.params, recipe, calibration=X)
    assert error(joint) < error(after)
    for q in (joint.params["a"]["w"], joint.params["c"]["w"].T):
        zeros = np.asarray(q.dequantize() == 0).reshape(-1, 4, q.shape[1]).sum(1)
        assert (zeros >= 2).all()

    solved = jc.methods.gptq(keep_zeros=True)
    kept = jc.quantize(mlp, pruned.params, recipe, calibration=X, method=solved)
    for name in "ac":
        values = np.asarray(kept.params[name]["w"].dequantize())
        assert not values[~np.asarray(pruned.report.masks[name]["w"])].any()
    filled = jc.quantize(mlp, pruned.params, recipe, calibration=X, method="gptq")
    assert np.asarray(filled.params["a"]["w"].dequantize())[~pruned.report.masks["a"]["w"]].any()
    binary = jc.Recipe([jc.Rule("*", "binary")])
    with pytest.raises(jc.RecipeError, match="`binary` has no zero"):
        jc.quantize(mlp, pruned.params, binary, calibration=X, method=solved)


def test_eight_devices_choose_what_one_does():
    devices = Mesh(np.array(jax.devices()), "d")
    split = [jax.device_put(x, NamedSharding(devices, PartitionSpec("d"))) for x in X]
    one, eight = (prune.sparsegpt(mlp, MLP, x, nm=(2, 4)) for x in (X, split))
    for a, b in zip(jax.tree.leaves(one.report.masks), jax.tree.leaves(eight.report.masks)):
        assert same(a, np.asarray(b)) > 0.98
    assert distance(eight.fn(eight.params, X[0]), one.fn(one.params, X[0])) < 0.05


def test_what_comes_after():
    """Masks hold in fine-tuning; parameters are stored sparse; a stopped run goes on."""
    small = prune.wanda(mlp, MLP, X, nm=(2, 4))
    masks = small.report.masks
    tx = optax.chain(optax.adam(0.1), prune.fixed(masks))
    grads = jax.grad(lambda p: jnp.sum(small.fn(p, X[0]) ** 2))(small.params)
    updates, _ = tx.update(grads, tx.init(small.params), small.params)
    trained = optax.apply_updates(small.params, updates)
    assert not np.asarray(trained["a"]["w"])[~masks["a"]["w"]].any()
    assert np.asarray(trained["a"]["w"] != small.params["a"]["w"]).any()
    one = {"a": {"w": True, "b": True}, "c": {"w": masks["c"]["w"], "b": True}}
    stored = prune.sparse(small.params, one, pattern=(2, 4), axis=-1)
    np.testing.assert_array_equal(stored["c"]["w"].dequantize(), small.params["c"]["w"])


def test_a_run_goes_on_where_it_stopped(tmp_path):
    walked = []

    def batches():
        for x in X:
            walked.append(0)
            yield x

    run = lambda n: prune.wanda(mlp, MLP, batches, sparsity=n, checkpoint_dir=tmp_path)  # noqa: E731
    first, before = run(0.5), len(walked)
    second = run(0.5)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert len(walked) - before < before
    with pytest.raises(jc.ArtifactError, match="of another calculation"):
        run(0.4)


NAN = [np.full((4, 16), np.nan, np.float32)]
PACKED = MLP | {
    "a": {"w": jc.Quantizer("int8").quantize(MLP["a"]["w"], axis=0), "b": MLP["a"]["b"]}
}
BAD = {
    "neither": (MLP, X, {}, jc.RecipeError, "say one of both"),
    "all": (MLP, X, {"sparsity": 1.0}, jc.RecipeError, r"a fraction in \[0, 1\)"),
    "N > M": (MLP, X, {"nm": (5, 4)}, jc.RecipeError, "N of every M"),
    "M": (MLP, X, {"nm": (2, 5)}, jc.FormatError, "`a/w`.*groups of 5 do not divide 16"),
    "profile": (MLP, X, {"nm": (2, 4), "profile": prune.owl()}, jc.RecipeError, "profile"),
    "order": (
        MLP, X, {"sparsity": 0.5, "profile": prune.owl(), "sequential": False}, jc.RecipeError,
        "leave out sequential=False",
    ),
    "lam": (
        MLP, X, {"sparsity": 0.02, "profile": prune.owl(lam=0.4)}, jc.RecipeError, "smaller lam",
    ),
    "units": (
        MLP, X, {"sparsity": 0.5, "structure": prune.blocks(3, 1)}, jc.SiteError, "do not divide",
    ),
    "pattern": (MLP, X, {"nm": (2, 4), "pattern": "d/*"}, jc.RecipeError, "matches no parameter"),
    "empty": (MLP, [], {"nm": (2, 4)}, jc.JaxCompressError, "no batches"),
    "NaN": (MLP, NAN, {"nm": (2, 4)}, jc.JaxCompressError, "NaN or infinite"),
    "packed": (PACKED, X, {"nm": (2, 4)}, jc.JaxCompressError, "prune first"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    params, data, settings, error, message = BAD[case]
    for make_small in (prune.wanda, prune.sparsegpt):
        with pytest.raises(error, match=message):
            make_small(mlp, params, data, **settings)


def test_what_cannot_be_pruned_is_an_error_when_it_is_named():
    params, _ = make()
    with pytest.raises(jc.SiteError, match="`emb`, and it cannot be pruned .* gather"):
        prune.wanda(scanned, params, DATA, sparsity=0.5, pattern=["emb", "head"])
    tied = lambda p, x: (x @ p["w"]) @ p["w"].T  # noqa: E731
    with pytest.raises(jc.RecipeError, match="no weight to prune.*2 sites read it"):
        prune.wanda(tied, {"w": jnp.ones((16, 8))}, X, sparsity=0.5)


def test_an_expert_without_tokens_is_named():
    def fn(p, x):
        return jax.lax.ragged_dot(x, p["e"], jnp.array([len(x), 0]))

    params = {"e": jnp.ones((2, 16, 4))}
    with pytest.raises(
        jc.SiteError, match=r"no calibration token reached `e` of its parts \[\[1\]\]"
    ):
        prune.wanda(fn, params, [correlated(8, 16, 0)], sparsity=0.5)


def test_layers_of_a_scan_share_one_program():
    """The function is traced as often for three layers as for two."""
    stacked, _ = make()
    traced = []
    for layers in (2, 3):
        params = stacked | {"layers": jax.tree.map(lambda x, n=layers: x[:n], stacked["layers"])}
        calls = []

        def fn(p, ids, calls=calls):
            calls.append(0)
            return scanned(p, ids)

        prune.wanda(fn, params, DATA, sparsity=0.5)
        traced.append(len(calls))
    assert traced[0] == traced[1]
