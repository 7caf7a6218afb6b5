# SPDX-License-Identifier: Apache-2.0
"""Stored ranges under explicit state: every value and count against a loop written by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from twins import ROUNDING, assert_same, normal, weight

import jaxcompress as jc
from jaxcompress._quantize import histogram
from jaxcompress._quantize.state import in_range

MOMENTUM = 0.9
PARAMS = {"w1": normal(4, 8, seed=1), "w2": normal(8, 4, seed=2)}
STACK = {"w": 0.5 * normal(3, 4, 4, seed=3)}
X = normal(6, 4, seed=4)


def recipe(range, weight="int8", **settings):
    activation = jc.Quantizer("int8", "tensor", range=range, **settings)
    return jc.Recipe([jc.Rule("*", weight, activation)], range)


EMA = recipe("ema", momentum=MOMENTUM)
STATIC = recipe("static")


def mlp(p, x):
    return jnp.tanh(x @ p["w1"]) @ p["w2"]


def clipped(x, top):
    """x on the int8 grid of [-top, top]; the gradient passes inside, ends included."""

    @jax.custom_jvp
    def f(x, top):
        s = top / 127
        return jnp.clip(jnp.round(x / s), -127, 127) * s

    f.defjvp(lambda p, t: (f(*p), jnp.where(jnp.abs(p[0]) <= p[1], t[0], 0.0)))
    return f(x, lax.stop_gradient(top))


def averaging(x, old, count):
    """(x on the grid of the averaged range, the averaged range)."""
    now = jnp.max(jnp.abs(lax.stop_gradient(x)))
    new = jnp.where(count == 0, now, MOMENTUM * old + (1 - MOMENTUM) * now)
    return clipped(x, new), new


def tops(state, *names):
    ranges = [state.statistics["ranges"][n]["activation"] for n in names]
    return [r["high"].reshape(r["count"].shape) for r in ranges]


def counts(state):
    return {n: np.asarray(r["activation"]["count"]) for n, r in state.statistics["ranges"].items()}


# ---------------------------------------------------------------------- rounding in a range


@pytest.mark.parametrize("top", [0.5, 2.0, 100.0])
def test_a_static_range_clips_with_an_inclusive_mask(top):
    q = jc.Quantizer("int8", "tensor", range="static")
    v = jnp.concatenate([normal(50), jnp.array([top, -top, 2 * top, -2 * top])])
    got = jax.vjp(lambda v: in_range(q, v, jnp.array([-top]), jnp.array([top])), v)
    want = jax.vjp(lambda v: clipped(v, jnp.float32(top)), v)
    assert_same(got[0], want[0], ROUNDING)
    assert_same(got[1](v), want[1](v))
    assert got[1](v)[0][-4] == top and got[1](v)[0][-2] == 0
    tangent = jax.jvp(lambda v: in_range(q, v, jnp.array([-top]), jnp.array([top])), (v,), (v,))
    assert_same(tangent[1], want[1](v)[0])


def test_a_range_with_a_zero_point():
    q = jc.Quantizer("uint4", "tensor", range="static")
    assert q.observer == "minmax"
    v = jnp.linspace(-3.0, 5.0, 41)
    got, back = jax.vjp(lambda v: in_range(q, v, jnp.array([-1.0]), jnp.array([2.0])), v)
    s = 3 / 15
    want = (np.clip(np.round(np.asarray(v) / s) + 5, 0, 15) - 5) * s
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_array_equal(back(jnp.ones(41))[0], (v >= -1) & (v <= 2))


def test_settings():
    q = jc.Quantizer("int8", "tensor", range="ema", momentum=0.5)
    assert jc.Quantizer.from_dict(q.to_dict()) == q
    assert jc.Recipe.from_json(EMA.to_json()) == EMA
    for bad, message in [
        ({"range": "static", "observer": "max"}, "There is no observer 'max'"),
        ({"range": "ema", "observer": "kl"}, "range='ema' averages 'absmax' or 'minmax'"),
        ({"range": "learned", "observer": "absmax"}, "takes no observer"),
        ({"range": "ema", "momentum": 1.0}, "momentum=1.0: expected 0 <= momentum < 1"),
        ({"range": "static", "observer": "minmax", "symmetric": True}, "disagree"),
        ({"observer": "absmax"}, "goes with range='static' or 'ema'"),
    ]:
        with pytest.raises(jc.RecipeError, match=message):
            jc.Quantizer("int8", "tensor", **bad)


def test_an_activation_keeps_one_range():
    for name in ("token", "channel", "group:2"):
        q = jc.Quantizer("int8", name, range="ema")
        init, _ = jc.quantize_aware_with_state(mlp, jc.Recipe([jc.Rule("*", None, q)]))
        with pytest.raises(jc.RecipeError, match='Use Quantizer\\("int8", "tensor", range="ema"'):
            init(PARAMS, X)


# ---------------------------------------------------------------------- explicit threading


def test_ema_over_steps():
    def by_hand(p, tops, x):
        h, first = averaging(x, tops[0], 1)
        h, second = averaging(jnp.tanh(h @ weight(p["w1"])), tops[1], 1)
        return jnp.sum((h @ weight(p["w2"])) ** 2), [first, second]

    loss = lambda p, x: jnp.sum(mlp(p, x) ** 2)  # noqa: E731
    init, apply = jc.quantize_aware_with_state(loss, EMA)
    state = init(PARAMS, X)
    want = [jnp.max(jnp.abs(X)), jnp.max(jnp.abs(jnp.tanh(X @ PARAMS["w1"])))]
    assert_same(tops(state, "w1", "w2"), want, ROUNDING)
    ours = jax.jit(jax.value_and_grad(lambda p, s, x: apply(s, p, x), has_aux=True))
    hand = jax.jit(jax.value_and_grad(by_hand, has_aux=True))
    want = tops(state, "w1", "w2")
    for i in range(4):
        (loss_a, state), grad_a = ours(PARAMS, state, X * (1 + i))
        (loss_b, want), grad_b = hand(PARAMS, want, X * (1 + i))
        assert_same((loss_a, grad_a, tops(state, "w1", "w2")), (loss_b, grad_b, want), ROUNDING)
    assert counts(state) == {"w1": 5, "w2": 5}


def test_static_does_not_move():
    init, apply = jc.quantize_aware_with_state(mlp, STATIC)
    state = init(PARAMS, X)
    out, after = apply(state, PARAMS, 3 * X)
    assert_same(after.statistics, state.statistics)
    a, b = tops(state, "w1", "w2")
    h = jnp.tanh(clipped(3 * X, a) @ weight(PARAMS["w1"]))
    assert_same(out, clipped(h, b) @ weight(PARAMS["w2"]), ROUNDING)


@pytest.mark.parametrize("remat", [False, True])
def test_ema_in_a_scan_over_layers(remat):
    layer = lambda c, w: (jnp.tanh(c @ w), None)  # noqa: E731
    layer = jax.checkpoint(layer) if remat else layer
    init, apply = jc.quantize_aware_with_state(lambda p, x: lax.scan(layer, x, p["w"])[0], EMA)
    state = init(STACK, X)
    assert tops(state, "w")[0].shape == (3,)

    def by_hand(p, old, x):
        new = []
        for w, top in zip(p["w"], old):
            x, top = averaging(x, top, 1)
            x, new = jnp.tanh(x @ weight(w)), [*new, top]
        return jnp.sum(x**2), jnp.stack(new)

    def ours(p, state, x):
        out, state = apply(state, p, x)
        return jnp.sum(out**2), state

    want = tops(state, "w")[0]
    got = jax.jit(jax.value_and_grad(ours, has_aux=True))(STACK, state, 2 * X)
    hand = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(STACK, want, 2 * X)
    (loss_a, state), (loss_b, want) = got[0], hand[0]
    assert_same((loss_a, got[1], tops(state, "w")[0]), (loss_b, hand[1], want), 1e-5)
    np.testing.assert_array_equal(counts(state)["w"], [2, 2, 2])


@pytest.mark.parametrize("kind", ["scan", "while"])
def test_ema_in_a_loop_is_carried(kind):
    """One site that runs four times: its range moves at every turn."""

    def f(p, x):
        if kind == "scan":
            return lax.scan(lambda c, _: (jnp.tanh(c @ p["w1"]) @ p["w2"], None), x, length=4)[0]
        body = lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w1"]) @ p["w2"])  # noqa: E731
        return lax.while_loop(lambda c: c[0] < 4, body, (0, x))[1]

    init, apply = jc.quantize_aware_with_state(f, EMA)
    state = init(PARAMS, X)
    assert counts(state) == {"w1": 4, "w2": 4}
    first, second = tops(state, "w1", "w2")
    got, state = jax.jit(apply)(state, PARAMS, 2 * X)
    x = 2 * X
    for _ in range(4):
        h, first = averaging(x, first, 1)
        h, second = averaging(jnp.tanh(h @ weight(PARAMS["w1"])), second, 1)
        x = h @ weight(PARAMS["w2"])
    assert_same((got, tops(state, "w1", "w2")), (x, [first, second]), ROUNDING)
    assert counts(state) == {"w1": 8, "w2": 8}


def test_a_branch_that_is_not_taken_keeps_its_range():
    def f(p, x):
        return lax.cond(x[0, 0] > 0, lambda: x @ p["w1"], lambda: jnp.tanh(x @ p["w1"][:, ::-1]))

    init, apply = jc.quantize_aware_with_state(f, EMA)
    positive = jnp.abs(X)
    state = init(PARAMS, positive)
    assert sorted(counts(state).values()) == [0, 1]
    _, state = apply(state, PARAMS, 2 * positive)
    assert sorted(counts(state).values()) == [0, 2]
    _, state = apply(state, PARAMS, -3 * positive)
    assert sorted(counts(state).values()) == [1, 2]
    taken, other = sorted(float(t) for t in tops(state, *counts(state)))
    top = float(jnp.max(positive))
    np.testing.assert_allclose([taken, other], [MOMENTUM * top + 0.1 * 2 * top, 3 * top], rtol=1e-6)


def test_a_custom_derivative():
    @jax.custom_vjp
    def f(x, w):
        return x @ w

    f.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    init, apply = jc.quantize_aware_with_state(lambda p, x: f(x, p["w1"]), EMA)
    state = init(PARAMS, X)

    def loss(p, state):
        out, state = apply(state, p, 2 * X)
        return jnp.sum(out**2), state

    (_, state), _ = jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS, state)
    assert counts(state) == {"w1": 2}
    top = jnp.max(jnp.abs(X))
    assert_same(tops(state, "w1"), [MOMENTUM * top + (1 - MOMENTUM) * 2 * top], ROUNDING)


def test_ranges_are_shared_in_a_shard_map():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x = normal(16, 4, seed=7)

    for check in (True, False):
        body = functools.partial(
            jax.shard_map, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"), check_vma=check
        )
        f = body(lambda w, x: jnp.tanh(x @ w))
        init, apply = jc.quantize_aware_with_state(f, EMA)
        state = init(PARAMS["w1"], x)
        got, state = jax.jit(apply)(state, PARAMS["w1"], 2 * x)
        a, top = averaging(2 * x, jnp.max(jnp.abs(x)), 1)
        want = (jnp.tanh(a @ weight(PARAMS["w1"])), [top])
        assert_same((got, tops(state, "arg0")), want, ROUNDING)


def test_lsq_counts_values_over_a_shard_map():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x = normal(16, 4, seed=7)
    plain = lambda p, x: jnp.tanh(x @ p["w1"])  # noqa: E731
    split = jax.shard_map(
        lambda w, x: jnp.tanh(x @ w), mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d")
    )
    results = []
    for f in (plain, lambda p, x: split(p["w1"], x)):
        init, apply = jc.quantize_aware_with_state(f, "lsq-w4a4")
        state = init(PARAMS, x)

        def loss(learned, p, apply=apply, state=state):
            return jnp.sum(apply(type(state)(learned, state.statistics), p, x)[0] ** 2)

        results.append((state, jax.jit(jax.grad(loss, (0, 1)))(state.learned, PARAMS)))
    assert_same(results[1], results[0], 1e-5)


def test_a_weight_with_a_range_per_channel_and_per_group():
    for granularity, shape in (("channel", (1, 8)), ("group:2", (2, 1, 8))):
        rule = jc.Rule("*", jc.Quantizer("int8", granularity, range="ema", momentum=0.0))
        init, apply = jc.quantize_aware_with_state(lambda p, x: x @ p["w1"], jc.Recipe([rule]))
        state = init(PARAMS, X)
        assert state.statistics["ranges"]["w1"]["weight"]["high"].shape == shape
        dynamic = jc.Recipe([jc.Rule("*", jc.Quantizer("int8", granularity))])
        want = jc.quantize_aware(lambda p, x: x @ p["w1"], dynamic)(PARAMS, X)
        assert_same(apply(state, PARAMS, X)[0], want, ROUNDING)


# ---------------------------------------------------------------------- calibration

BATCHES = [normal(6, 4, seed=s) * k for s, k in ((11, 1.0), (12, 3.0), (13, 0.5))]


def test_calibrate_static():
    state = jc.calibrate(mlp, PARAMS, BATCHES, STATIC)
    inputs = jnp.concatenate(BATCHES)
    want = [jnp.max(jnp.abs(inputs)), jnp.max(jnp.abs(jnp.tanh(inputs @ PARAMS["w1"])))]
    assert_same(tops(state, "w1", "w2"), want, ROUNDING)
    assert counts(state) == {"w1": 3, "w2": 3}


def test_calibrate_averages_as_training_does():
    state = jc.calibrate(lambda w, x: x @ w, PARAMS["w1"], BATCHES, EMA)
    top = None
    for x in BATCHES:
        now = float(jnp.max(jnp.abs(x)))
        top = now if top is None else MOMENTUM * top + (1 - MOMENTUM) * now
    np.testing.assert_allclose(tops(state, "arg0"), [top], rtol=1e-6)


def test_calibrate_learned():
    state = jc.calibrate(lambda w, x: x @ w, PARAMS["w1"], BATCHES, "lsq-w4a4")
    mean = np.mean([float(jnp.mean(jnp.abs(x))) for x in BATCHES])
    np.testing.assert_allclose(
        state.learned["arg0"]["activation"]["step"], [[2 * mean / 7**0.5]], rtol=1e-6
    )


def test_a_batch_of_several_arguments():
    f = lambda p, x, *, scale: (x * scale) @ p["w1"]  # noqa: E731
    state = jc.calibrate(f, PARAMS, [jc.Inputs(X, scale=2.0)], STATIC)
    assert_same(tops(state, "w1"), [2 * jnp.max(jnp.abs(X))], ROUNDING)


def test_calibration_compiles_once():
    traces = []

    def f(p, x):
        traces.append(x)
        return x @ p["w1"]

    jc.calibrate(f, PARAMS, BATCHES[:1], STATIC)
    one = len(traces)
    traces.clear()
    jc.calibrate(f, PARAMS, BATCHES * 3, STATIC)
    assert len(traces) == one


def test_histogram_thresholds():
    """Against NumPy on the values themselves, within one bin."""
    v = np.abs(np.concatenate([np.asarray(normal(20000, seed=5)), [12.0, 20.0]])).astype(np.float32)
    f = lambda w, x: x @ w  # noqa: E731
    w = jnp.eye(1)
    batches = [c.reshape(-1, 1) for c in (v[:5000], v[5000:15000], v[15000:])]
    width = 32 / histogram.BINS
    found = {}
    for observer in ("percentile", "mse", "kl"):
        state = jc.calibrate(f, w, batches, recipe("static", observer=observer))
        found[observer] = float(tops(state, "arg0")[0])
    want = np.sort(v)[int(np.ceil(0.9999 * v.size)) - 1]
    assert abs(found["percentile"] - want) <= width

    def error(top):
        s = top / 127
        return np.sum((np.clip(np.round(v / s), -127, 127) * s - v) ** 2)

    best = min(np.linspace(1, 20, 400), key=error)
    assert error(found["mse"]) <= 1.02 * error(best)
    assert 3 < found["kl"] < 12  # the two outliers of 20,002 values are cut off


def test_a_histogram_loses_no_count_when_it_grows():
    top = lambda v: jnp.max(v, keepdims=True)  # noqa: E731
    h = histogram.empty((1,))
    parts = [normal(100, seed=s) * 10.0**e for s, e in ((1, -3), (2, 1), (3, 0))]
    for v in parts:
        h = histogram.add(h, v, top(jnp.abs(v)))
    edge = 2.0 ** float(h["exponent"][0])
    want, _ = np.histogram(np.abs(np.concatenate(parts)), histogram.BINS, (0, edge))
    np.testing.assert_array_equal(h["counts"][0], want)


# ---------------------------------------------------------------------- bad input


def test_calibration_rejects_bad_batches():
    with pytest.raises(jc.JaxCompressError, match="calibrate got no batches"):
        jc.calibrate(mlp, PARAMS, [], STATIC)
    with pytest.raises(jc.JaxCompressError, match=r"batch 1 has an empty array of shape \(0, 4\)"):
        jc.calibrate(mlp, PARAMS, [X, X[:0]], STATIC)
    for r in (STATIC, EMA, "lsq-w4a4", recipe("static", observer="mse")):
        with pytest.raises(jc.JaxCompressError, match="batch 1 makes values that are NaN.*`w1`"):
            jc.calibrate(mlp, PARAMS, [X, X.at[0, 0].set(jnp.nan)], r)
    with pytest.raises(jc.JaxCompressError, match="calibrate with arrays, outside of jit"):
        jax.jit(jc.quantize_aware_with_state(mlp, STATIC)[0])(PARAMS, X)


def test_a_site_that_no_batch_reached():
    f = lambda p, x: lax.cond(x[0, 0] > 0, lambda: x @ p["w1"], lambda: 2 * x @ p["w1"])  # noqa: E731
    with pytest.raises(jc.SiteError, match="was not run by any calibration batch"):
        jc.calibrate(f, PARAMS, [jnp.abs(X)], STATIC)
    jc.calibrate(f, PARAMS, [jnp.abs(X), -jnp.abs(X)], STATIC)


def test_a_state_of_another_model():
    state = jc.calibrate(lambda p, x: x @ p["other"], {"other": PARAMS["w1"]}, [X], STATIC)
    _, apply = jc.quantize_aware_with_state(mlp, STATIC)
    with pytest.raises(jc.RecipeError, match="another model.*`w1` needs.*it has `other`"):
        apply(state, PARAMS, X)
    wider = {"w": normal(5, 4, 4)}
    f = lambda p, x: lax.scan(lambda c, w: (c @ w, None), x, p["w"])[0]  # noqa: E731
    _, apply = jc.quantize_aware_with_state(f, STATIC)
    with pytest.raises(jc.RecipeError, match=r"of shape \(5, 1, 1\), found shape \(3, 1, 1\)"):
        apply(jc.calibrate(f, STACK, [X], STATIC), wider, X)


def test_plain_parameters_under_a_recipe_with_state():
    with pytest.raises(jc.RecipeError, match=r"keeps a range \(static\) for `w1`.*quant_params"):
        jc.quantize_aware(mlp, STATIC)(PARAMS, X)


def test_the_named_recipe():
    state = jc.calibrate(mlp, PARAMS, [X], "w8a8-static")
    _, apply = jc.quantize_aware_with_state(mlp, "w8a8-static")
    a, b = tops(state, "w1", "w2")
    want = clipped(jnp.tanh(clipped(X, a) @ weight(PARAMS["w1"])), b) @ weight(PARAMS["w2"])
    assert_same(apply(state, PARAMS, X)[0], want, ROUNDING)
    report = jc.report(mlp, "w8a8-static")(PARAMS, X)
    assert [row.activation for row in report.rows] == ["int8 per tensor, static"] * 2
