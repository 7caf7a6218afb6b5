# SPDX-License-Identifier: Apache-2.0
"""What is kept: counts, budgets, importances against NumPy; repair; and what is refused."""

import itertools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

shrink, importance = jc.prune.shrink, jc.prune.importance


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def mlp(p, x):
    h = jax.nn.relu(x @ p["up"] + p["bias"][None])
    return jnp.tanh(h @ p["mid"]) @ p["down"] + p["last"][None]


PARAMS = {
    "up": draw(4, 12),
    "bias": draw(12),
    "mid": draw(12, 8),
    "down": draw(8, 3),
    "last": draw(3),
}
X = draw(64, 4, seed=1)
BATCHES = [X[:32], X[32:]]
HIDDEN = "up:1"  # 12 units: columns of up, bias, rows of mid


def kept_of(small, name):
    return next(row.indices for row in small.report.rows if name in row.members)


def stacked(p, x):
    body = lambda h, q: (h + jax.nn.relu(h @ q["up"]) @ q["down"], None)  # noqa: E731
    return jax.lax.scan(body, x, p)[0]


STACK = {"up": draw(4, 4, 6), "down": draw(4, 6, 4)}


def top(scores, count):
    return np.sort(np.argsort(-np.asarray(scores), axis=-1, kind="stable")[..., :count], -1)


def hidden():
    """Values of the first hidden layer, transcribed."""
    return np.maximum(X @ PARAMS["up"] + PARAMS["bias"], 0)


def loss(p, x):
    return jnp.sum(jnp.sin(mlp(p, x)))


def taylor_scores():
    total = 0
    for x in BATCHES:
        g = jax.tree.map(np.asarray, jax.grad(loss)(PARAMS, x))
        change = {k: g[k] * PARAMS[k] for k in g}
        total += change["up"].sum(0) ** 2 + change["bias"] ** 2 + change["mid"].sum(1) ** 2
    return total


def distances():
    w = np.concatenate([PARAMS["up"].T, PARAMS["bias"][:, None], PARAMS["mid"]], 1)
    return [sum(np.linalg.norm(a - b) for b in w) for a in w]


UP, BIAS, MID = PARAMS["up"], PARAMS["bias"], PARAMS["mid"]
SCORES = {
    "l1": lambda: np.abs(UP).sum(0) + np.abs(BIAS) + np.abs(MID).sum(1),
    "l2": lambda: np.sqrt((UP**2).sum(0) + BIAS**2 + (MID**2).sum(1)),
    "fpgm": distances,
    "activation": lambda: np.linalg.norm(hidden(), axis=0),
    "wanda": lambda: np.abs(MID).sum(1) * np.linalg.norm(hidden(), axis=0),
    importance.taylor(loss): taylor_scores,
    importance.gamma("bias"): lambda: np.abs(BIAS),
    (lambda group, params: params["bias"] * len(group.members)): lambda: BIAS,
}


@pytest.mark.parametrize(
    "method", SCORES, ids=lambda m: m if isinstance(m, str) else getattr(m, "name", "function")
)
def test_the_importance_is_that_of_its_paper(method):
    small = shrink(mlp, PARAMS, X, keep={HIDDEN: 5}, importance=method, calibration=BATCHES)
    np.testing.assert_array_equal(kept_of(small, HIDDEN), top(SCORES[method](), 5))


def test_scores_of_each_layer_and_of_heads():
    small = shrink(stacked, STACK, X, keep={"up:2": 2})
    scores = np.sqrt((STACK["up"] ** 2).sum(1) + (STACK["down"] ** 2).sum(2))
    np.testing.assert_array_equal(kept_of(small, "up:2"), top(scores, 2))

    def heads(p, x):  # three of width two: head i is v[:, 2 i : 2 i + 2]
        y = jnp.tanh(x @ p["v"]).reshape(-1, 3, 2)
        return jnp.einsum("nhk,hkd->nd", y / (1 + jnp.sum(y * y, 2, keepdims=True)), p["o"])

    p = {"v": draw(4, 6), "o": draw(3, 2, 5)}
    small = shrink(heads, p, X, keep={"o:0": 2})
    scores = np.sqrt((p["v"].reshape(4, 3, 2) ** 2).sum((0, 2)) + (p["o"] ** 2).sum((1, 2)))
    np.testing.assert_array_equal(kept_of(small, "v:1[0::2]"), top(scores, 2))


def test_activations_inside_a_scan_are_of_their_layer():
    for method in ("activation", "wanda"):
        small = shrink(stacked, STACK, X, keep={"up:2": 2}, importance=method, calibration=BATCHES)
        h, scores = X, []
        for up, down in zip(STACK["up"], STACK["down"]):
            units = np.maximum(h @ up, 0)
            norm = np.linalg.norm(units, axis=0)
            scores.append(norm if method == "activation" else np.abs(down).sum(1) * norm)
            h = h + units @ down
        np.testing.assert_array_equal(kept_of(small, "up:2"), top(scores, 2))


def test_random_needs_a_key_and_repeats():
    kept = [
        kept_of(shrink(mlp, PARAMS, X, keep={HIDDEN: 6}, importance=importance.random(k)), HIDDEN)
        for k in (0, 0, 1)
    ]
    np.testing.assert_array_equal(kept[0], kept[1])
    assert (kept[0] != kept[2]).any()


def test_the_layer_that_changes_the_output_least_leaves():
    p = {"up": STACK["up"].copy(), "down": STACK["down"].copy()}
    p["down"][2] *= 1e-3
    small = shrink(stacked, p, X, keep={"up:0": 3})
    np.testing.assert_array_equal(kept_of(small, "up:0"), [0, 1, 3])
    np.testing.assert_allclose(small.fn(small.params, X), stacked(small.params, X), rtol=1e-5)
    p["down"][2] = 0  # without it the function is the same
    small = shrink(stacked, p, X, keep={"up:0": 3}, calibration=BATCHES)
    np.testing.assert_allclose(small.fn(small.params, X), stacked(p, X), rtol=1e-5)


def test_fractions_counts_multiples_and_the_first_pattern():
    sizes = lambda **how: shrink(mlp, PARAMS, X, **how).params  # noqa: E731
    assert sizes(keep=0.5)["mid"].shape == (6, 4)
    assert sizes(keep={"up:1": 0.3})["mid"].shape == (4, 8)
    assert sizes(keep={"up:1": 7, "*": 4})["mid"].shape == (7, 4)
    assert sizes(keep={"re:up:.": 9})["mid"].shape == (9, 8)
    assert sizes(keep=0.4, round_to=4)["mid"].shape == (4, 4)
    assert sizes(keep={"up:1": 11}, round_to=8)["mid"].shape == (8, 8)
    assert sizes(keep={"up:1": 1}, round_to=8)["mid"].shape == (8, 8)
    assert sizes(keep=1.0)["mid"].shape == (12, 8)
    one = shrink(mlp, PARAMS, X, keep={"up:1": [7]})
    np.testing.assert_array_equal(one.params["mid"], MID[7:8])


def test_shapes_are_enough():
    shapes = jax.ShapeDtypeStruct(X.shape, X.dtype)
    small = shrink(mlp, PARAMS, shapes, keep=0.5)
    assert small.fn(small.params, X).shape == (64, 3)
    with pytest.raises(jc.RecipeError, match="cosine, of shapes in place of inputs, needs data"):
        shrink(stacked, STACK, shapes, keep={"up:0": 3})


def flops_of(params, rows=64):
    return 2 * rows * sum(math.prod(params[k].shape) for k in ("up", "mid", "down"))


def bytes_of(params):
    return sum(w.nbytes for w in params.values())


@pytest.mark.parametrize(("name", "cost"), [("flops", flops_of), ("bytes", bytes_of)])
def test_a_budget_is_met_and_no_more_is_taken(name, cost):
    """Against the same rule by hand: normalized scores of both groups in one order."""
    full = cost(PARAMS)
    for limit in (0.7, 0.45, int(0.3 * full)):
        target = limit * full if isinstance(limit, float) else limit
        given: dict[str, Any] = {name: limit}
        small = shrink(mlp, PARAMS, X, keep=jc.prune.budget(**given))
        assert cost(small.params) <= target
        scores = {
            "up:1": SCORES["l2"](),
            "mid:1": np.sqrt((MID**2).sum(0) + (PARAMS["down"] ** 2).sum(1)),
        }
        pool = sorted((s, g) for g, v in scores.items() for s in np.sort(v / np.abs(v).mean())[:-1])
        sizes = {"up:1": 12, "mid:1": 8}
        for _, group in pool:
            a, b = sizes["up:1"], sizes["mid:1"]
            shapes = {"up": (4, a), "bias": (a,), "mid": (a, b), "down": (b, 3), "last": (3,)}
            if cost({k: np.zeros(s, np.float32) for k, s in shapes.items()}) <= target:
                break
            sizes[group] -= 1
        assert small.params["mid"].shape == (sizes["up:1"], sizes["mid:1"])
        report = getattr(small.report, name)
        assert report == (full, cost(small.params))


def test_a_budget_of_latency_is_the_users():
    seen = []

    def measure(fn, params):
        assert fn(params, X).shape == (64, 3)
        seen.append(params["mid"].size)
        return seen[-1] / 10

    small = shrink(mlp, PARAMS, X, keep=jc.prune.budget(latency=(measure, 4.0), pattern="up:1"))
    assert small.params["mid"].shape == (5, 8)
    assert len(seen) < 10


def test_what_is_redundant_is_repaired_exactly():
    """Of a linear layer of six units on three inputs any three that span them are enough."""
    x = draw(40, 3, seed=5)
    p = {"up": draw(3, 6, seed=5), "down": draw(6, 2, seed=5)}
    fn = lambda p, x: (x @ p["up"]) @ p["down"]  # noqa: E731
    want, tried = fn(p, x), 0
    for kept in itertools.combinations(range(6), 3):
        if np.linalg.cond(p["up"][:, kept]) > 5:
            continue
        small = shrink(fn, p, x, keep={"up:1": kept}, calibration=[x], repair="least_squares")
        error = np.abs(small.fn(small.params, x) - want).max() / np.abs(want).max()
        plain = shrink(fn, p, x, keep={"up:1": kept})
        assert error < 0.02 < np.abs(plain.fn(plain.params, x) - want).max() / np.abs(want).max()
        tried += 1
    assert tried > 2


def test_least_squares_are_those_of_numpy():
    kept = np.array([0, 2, 3, 7, 8, 11])
    small = shrink(mlp, PARAMS, X, keep={HIDDEN: kept}, calibration=BATCHES, repair="least_squares")
    h = hidden().astype(np.float64)
    want, *_ = np.linalg.lstsq(h[:, kept], h @ MID, rcond=None)  # `mid` has no bias
    np.testing.assert_allclose(small.params["mid"], want, atol=2e-2)  # damped by 1e-4
    np.testing.assert_array_equal(small.params["up"], UP[:, kept])
    plain = shrink(mlp, PARAMS, X, keep={HIDDEN: kept})
    errors = [np.linalg.norm(s.fn(s.params, X) - mlp(PARAMS, X)) for s in (small, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_least_squares_with_a_bias_and_biases_alone():
    kept = np.array([0, 2, 5, 6])
    values = np.tanh(hidden() @ MID).astype(np.float64)
    small = shrink(
        mlp, PARAMS, X, keep={"mid:1": kept}, calibration=BATCHES, repair="least_squares"
    )
    ones = np.ones((64, 1))
    target = values @ PARAMS["down"] + PARAMS["last"]
    want, *_ = np.linalg.lstsq(np.concatenate([values[:, kept], ones], 1), target, rcond=None)
    np.testing.assert_allclose(small.params["down"], want[:-1], atol=2e-3)
    np.testing.assert_allclose(small.params["last"], want[-1], atol=2e-3)
    small = shrink(mlp, PARAMS, X, keep={"mid:1": kept}, calibration=BATCHES, repair="bias")
    gone = np.setdiff1d(np.arange(8), kept)
    shift = values[:, gone].mean(0) @ PARAMS["down"][gone]
    np.testing.assert_allclose(small.params["last"], PARAMS["last"] + shift, atol=1e-5)
    np.testing.assert_array_equal(small.params["down"], PARAMS["down"][kept])


def test_repair_inside_a_scan_is_of_its_layer():
    kept = np.array([[0, 1, 2], [1, 2, 3], [3, 4, 5], [0, 2, 4]])
    small = shrink(stacked, STACK, X, keep={"up:2": kept}, calibration=[X], repair="least_squares")
    h = X.astype(np.float64)
    for i, (up, down) in enumerate(zip(STACK["up"], STACK["down"])):
        units = np.maximum(h @ up, 0)
        want, *_ = np.linalg.lstsq(units[:, kept[i]], units @ down, rcond=None)
        got = np.asarray(small.params["down"][i], np.float64)
        errors = [np.linalg.norm(units[:, kept[i]] @ w - units @ down) for w in (got, want)]
        plain = np.linalg.norm(units[:, kept[i]] @ down[kept[i]] - units @ down)
        assert errors[0] < 1.01 * errors[1] + 1e-3 * plain
        assert errors[0] < 0.9 * plain
        h = h + units @ down


def test_repair_of_a_convolution():
    p = {"a": draw(3, 3, 2, 6), "b": draw(3, 3, 6, 4)}
    x = draw(4, 6, 6, 2)

    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    fn = lambda p, x: conv(jax.nn.relu(conv(x, p["a"])), p["b"])  # noqa: E731
    kept = [0, 1, 4]
    small = shrink(fn, p, x, keep={"a:3": kept}, calibration=[x], repair="least_squares")
    h = np.pad(np.asarray(jax.nn.relu(conv(x, p["a"]))), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(h, (3, 3), (1, 2))  # n, y, x, c, i, j
    rows = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 9, 6)
    target = np.asarray(fn(p, x)).reshape(-1, 4)
    want, *_ = np.linalg.lstsq(rows[..., kept].reshape(len(rows), -1), target, rcond=None)
    np.testing.assert_allclose(small.params["b"].reshape(-1, 4), want, atol=2e-2)
    notes = shrink(fn, p, x, keep={"a:3": kept}, calibration=[x], repair="bias").report.notes
    assert notes == {"b": "no bias of its own"}


def test_what_is_shared_is_not_repaired_and_named():
    def fn(p, x):
        h = jnp.tanh(x @ p["w"])
        return jnp.tanh(h @ p["t"]) @ p["t"].T @ p["o"]

    p = {"w": draw(4, 6), "t": draw(6, 5), "o": draw(6, 3)}
    small = shrink(fn, p, X, keep={"w:1": 4}, calibration=[X], repair="least_squares")
    assert small.report.notes["t"] == "several sites read its weight"
    np.testing.assert_array_equal(small.params["t"], p["t"][kept_of(small, "w:1")])


def test_shrunk_twice_is_the_last_choice_among_the_first():
    first = shrink(mlp, PARAMS, X, keep={HIDDEN: 8})
    second = shrink(first.fn, first.params, X, keep={HIDDEN: 4})
    once = shrink(mlp, PARAMS, X, keep={HIDDEN: 4})
    np.testing.assert_array_equal(second.params["mid"], once.params["mid"])
    np.testing.assert_allclose(second.fn(second.params, X), once.fn(once.params, X), rtol=1e-5)


def test_shrunk_then_int8_then_exported(tmp_path):
    small = shrink(mlp, PARAMS, X, keep=0.5)
    loss8 = jc.quantize_aware(lambda p, x: jnp.sum(small.fn(p, x) ** 2), "w8a8")
    assert jax.grad(loss8)(small.params, X)["mid"].shape == (6, 4)
    packed = jc.quantize(small.fn, small.params, "w8a8", calibration=BATCHES)
    assert {s.name for s in jc.sites(small.fn)(small.params, X)} == {"up", "mid", "down"}
    want = packed.fn(packed.params, X)
    artifact = jc.export.stablehlo(packed.fn, packed.params, X, path=tmp_path / "small.jaxc")
    np.testing.assert_allclose(jc.export.load(artifact.path).run(X), want, atol=1e-5)
    onnx = jc.export.onnx(packed.fn, packed.params, X, path=tmp_path / "small.onnx")
    np.testing.assert_allclose(jc.export.load(onnx.path).run(X), want, atol=1e-5)
    assert all("Integer" in row.runs for row in onnx.audit().rows)
    error = np.abs(want - small.fn(small.params, X)).max()
    assert error < 0.05 * np.abs(want).max()


def test_flags_and_floats_of_a_call_stay_free():
    def fn(p, x, scale, train=False):
        h = x @ p["up"] * scale
        return (jax.nn.relu(h) if train else jnp.tanh(h)) @ p["down"]

    p = {"up": draw(4, 6), "down": draw(6, 3)}
    small = shrink(fn, p, X, 2.0, keep={"up:1": 3})
    for train in (False, True):
        got = small.fn(small.params, X[:7], 0.5, train=train)
        np.testing.assert_allclose(got, fn(small.params, X[:7], 0.5, train), rtol=2e-5)


def test_rebuilt_modules_take_the_parameters():
    linen = pytest.importorskip("flax.linen")

    class Net(linen.Module):
        width: int

        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.Dense(self.width)(x))
            return linen.Dense(3)(x)

    net = Net(10)
    params = net.init(jax.random.key(0), X)
    small = shrink(net.apply, params, X, keep={"*Dense_0/kernel:1": 0.4})
    assert small.report.configuration == (
        "params/Dense_0/bias: [10] -> [4]\n"
        "params/Dense_0/kernel: [4, 10] -> [4, 4]\n"
        "params/Dense_1/kernel: [10, 3] -> [4, 3]"
    )
    again = Net(4)
    loaded = jc.prune.rebuild(again.init(jax.random.key(1), X), small.params)
    np.testing.assert_allclose(again.apply(loaded, X), small.fn(small.params, X), rtol=1e-5)
    with pytest.raises(jc.SiteError, match=r"Dense_0/bias.*\[5\].*\[4\]"):
        jc.prune.rebuild(Net(5).init(jax.random.key(1), X), small.params)
    with pytest.raises(jc.SiteError, match="has no parameter"):
        jc.prune.rebuild({"params": loaded["params"]["Dense_0"]}, small.params)


def test_the_report():
    small = shrink(mlp, PARAMS, X, keep={HIDDEN: 3})
    text = str(small.report)
    assert "12 │    3 │ bias:0, mid:0, up:1" in text
    assert "pinned by an output" in text
    data = json.loads(small.report.to_json())
    assert data["shapes"]["mid"] == [[12, 8], [3, 8]]
    assert data["bytes"] == [bytes_of(PARAMS), bytes_of(small.params)]


def bad_fft(p, x):
    return jnp.fft.fft(x @ p["up"]).real @ p["mid"]


REFUSED = {
    "keep=0.0 for the group of `.*`.*fraction in \\(0, 1\\]": {"keep": 0.0},
    "keep=1.5 for the group": {"keep": 1.5},
    "keep=-2 for the group": {"keep": -2},
    "keep=13 for the group of `bias:0`, which has 12": {"keep": {HIDDEN: 13}},
    "keep=True for the group": {"keep": True},
    "keep=nan for the group": {"keep": float("nan")},
    "keep='half' for the group": {"keep": "half"},
    "keep=\\{\\} removes nothing": {"keep": {}},
    "'upp:1' matches no group. Nearest: `up:1`": {"keep": {"upp:1": 0.5}},
    "'down:1' matches only groups whose.*`down:1` is pinned by an output": {
        "keep": {"down:1": 0.5}
    },
    "indices \\[2\\] do not fit the group of `bias:0`: .* 0 to 11": {"keep": {HIDDEN: [0, 12]}},
    "indices \\[3\\] do not fit": {"keep": {HIDDEN: [1, 1, 2]}},
    "indices \\[0\\] do not fit": {"keep": {HIDDEN: np.zeros(0, int)}},
    "Its layers share their indices": {"keep": {HIDDEN: [[0], [1]]}},
    "round_to=0: expected": {"keep": 0.5, "round_to": 0},
    "mean='rescale': expected": {"keep": 0.5, "mean": "rescale"},
    "repair='best': expected": {"keep": 0.5, "repair": "best"},
    "repair='bias' needs data": {"keep": 0.5, "repair": "bias"},
    "importance='l3': expected one of": {"keep": 0.5, "importance": "l3"},
    "importance activation needs data": {"keep": 0.5, "importance": "activation"},
    "calibration has no batches": {
        "keep": 0.5, "importance": "wanda", "calibration": []
    },
    "no member of the group of `bias:0` matches 'scale'": {
        "keep": {HIDDEN: 0.5}, "importance": importance.gamma("scale")
    },
    "scores of the group of `bias:0` are of shape \\(3,\\)": {
        "keep": {HIDDEN: 0.5}, "importance": lambda group, params: np.ones(3)
    },
    "scores of the group of `bias:0` are NaN or infinite": {
        "keep": {HIDDEN: 0.5}, "importance": lambda group, params: np.full(12, np.nan)
    },
    "flops cannot be met; the least that these groups reach is 1,024": {
        "keep": jc.prune.budget(flops=500)
    },
    "calibration batch 1 makes values that are NaN": {
        "keep": 0.5, "importance": "activation", "calibration": [X, X * np.nan]
    },
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused_says_why(message):
    with pytest.raises(jc.JaxCompressError, match=message):
        shrink(mlp, PARAMS, X, **REFUSED[message])


def test_functions_that_pin_everything_and_bad_parameters():
    with pytest.raises(jc.SiteError, match="nothing of this function can be removed: every group"):
        shrink(bad_fft, {"up": UP, "mid": MID}, X, keep=0.5)
    with pytest.raises(jc.SiteError, match="`up:1` is pinned by primitive fft"):
        shrink(bad_fft, {"up": UP, "mid": MID}, X, keep={"up:1": 0.5})
    with pytest.raises(jc.RecipeError, match="`up` has numbers that are NaN or infinite"):
        shrink(mlp, PARAMS | {"up": UP * np.inf}, X, keep=0.5)
    small = shrink(mlp, PARAMS, X, keep=0.5)
    with pytest.raises(jc.SiteError, match="takes 5 parameters, found 1"):
        small.fn({"up": UP}, X)


BUDGETS: dict[str, dict] = {
    "give one of bytes, flops and latency; got 0": {},
    "got 2": {"bytes": 3, "flops": 4},
    "flops=1.5": {"flops": 1.5},
    "bytes=0": {"bytes": 0},
    "expected \\(measure, limit\\)": {"latency": 3},
    "least=0": {"flops": 0.5, "least": 0},
}


@pytest.mark.parametrize("message", BUDGETS)
def test_budgets_that_are_none(message):
    with pytest.raises(jc.RecipeError, match=message):
        jc.prune.budget(**BUDGETS[message])
