# SPDX-License-Identifier: Apache-2.0
"""`jc.sites`, `jc.tap` and the stored weights: looking at a function without changing it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from twins import assert_same
from twins import draw as normal

import jaxcompress as jc
from jaxcompress._quantize.storage import compressed_weights

SUM = 1e-5  # compiled in one piece against operation by operation


PARAMS = {"w1": normal(1, 4, 8), "w2": normal(2, 8, 4)}
STACK = {"w": normal(3, 3, 4, 4) * 0.5}
X = normal(4, 6, 4)


def mlp(p, x):
    return jnp.tanh(x @ p["w1"]) @ p["w2"]


def layers(p, x):
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]


def inputs_of_layers(p, x):
    seen = []
    for w in p["w"]:
        seen.append(x)
        x = jnp.tanh(x @ w)
    return jnp.stack(seen)


# ---------------------------------------------------------------------- sites


def test_sites():
    first, second = jc.sites(mlp)(PARAMS, X)
    assert (first.name, first.op, first.stack) == ("w1", "dot_general", ())
    assert [(o.role, o.path, o.shape) for o in first.operands] == [
        ("activation", "", (6, 4)),
        ("weight", "w1", (4, 8)),
    ]
    assert first.source.split("/")[-1].startswith("test_observe.py:")
    assert second.name == "w2"
    specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (PARAMS, X))
    assert [s.name for s in jc.sites(mlp)(*specs)] == ["w1", "w2"]
    (site,) = jc.sites(layers)(STACK, X)
    assert (site.name, site.stack) == ("w", (3,))


def test_sites_of_a_function_that_differentiates():
    loss = lambda p, x: jnp.sum(mlp(p, x) ** 2)  # noqa: E731
    for step in (jax.grad(loss), jax.value_and_grad(jax.jit(loss)), jax.hessian(loss)):
        assert [s.name for s in jc.sites(step)(PARAMS, X)] == ["w1", "w2"]
    scanned = lambda p, xs: lax.scan(  # noqa: E731
        lambda p, x: (jax.tree.map(jnp.subtract, p, jax.grad(loss)(p, x)), 0.0), p, xs
    )
    assert {s.name for s in jc.sites(scanned)(PARAMS, X[None])} >= {"w1", "w2"}
    assert len(jc.sites(scanned)(PARAMS, X[None])) == 2


# ---------------------------------------------------------------------- tap


def test_tap_inputs_and_outputs():
    h = jnp.tanh(X @ PARAMS["w1"])
    out, seen = jc.tap(mlp, "*")(PARAMS, X)
    assert_same(out, jax.jit(mlp)(PARAMS, X))
    assert_same(seen, {"w1": X, "w2": h}, SUM)
    _, seen = jc.tap(mlp, "w?", output=True)(PARAMS, X)
    assert_same(seen, {"w1": X @ PARAMS["w1"], "w2": h @ PARAMS["w2"]}, SUM)
    _, seen = jc.tap(mlp, "re:.*2")(PARAMS, X)
    assert list(seen) == ["w2"]
    _, seen = jc.tap(lambda x, p: mlp(p, x), "w1", argnums=1)(X, PARAMS)
    assert list(seen) == ["w1"]


def test_tap_of_an_unknown_name():
    with pytest.raises(jc.SiteError, match=r"tap: pattern 'w3' matches no site. Nearest: `w"):
        jc.tap(mlp, "w3")(PARAMS, X)


def test_tap_under_jit_and_grad():
    tapped = jc.tap(mlp, "w2")
    h = jnp.tanh(X @ PARAMS["w1"])
    assert_same(jax.jit(tapped)(PARAMS, X)[1], {"w2": h}, SUM)

    def loss(p):  # features as part of a loss
        out, seen = tapped(p, X)
        return jnp.sum(out) + jnp.sum(seen["w2"] ** 2)

    want = lambda p: jnp.sum(mlp(p, X)) + jnp.sum(jnp.tanh(X @ p["w1"]) ** 2)  # noqa: E731
    assert_same(jax.jit(jax.grad(loss))(PARAMS), jax.jit(jax.grad(want))(PARAMS), SUM)
    xs = jnp.stack([X, 2 * X])
    seen = jax.vmap(lambda x: tapped(PARAMS, x)[1])(xs)
    assert_same(seen, {"w2": jnp.tanh(xs @ PARAMS["w1"])}, SUM)


def test_tap_in_scans():
    # over stacked layers
    _, seen = jc.tap(layers, "w")(STACK, X)
    assert_same(seen, {"w": inputs_of_layers(STACK, X)}, SUM)
    # over time: one weight, a value for every step
    rnn = lambda p, xs: lax.scan(lambda c, x: (jnp.tanh((c + x) @ p["w"]), None), X, xs)[0]  # noqa
    xs, p = normal(5, 4, 6, 4), {"w": STACK["w"][0]}
    want, c = [], X
    for x in xs:
        want.append(c + x)
        c = jnp.tanh((c + x) @ p["w"])
    _, seen = jc.tap(rnn, "w")(p, xs)
    assert_same(seen, {"w": jnp.stack(want)}, SUM)
    # layers inside time, with remat
    both = lambda p, xs: lax.scan(lambda c, x: (jax.checkpoint(layers)(p, c + x), None), X, xs)[0]  # noqa
    want, c = [], X
    for x in xs:
        want.append(inputs_of_layers(STACK, c + x))
        c = layers(STACK, c + x)
    out, seen = jc.tap(both, "w")(STACK, xs)
    assert seen["w"].shape == (4, 3, 6, 4)
    assert_same(seen, {"w": jnp.stack(want)}, SUM)
    assert_same(out, jax.jit(both)(STACK, xs), SUM)
    # backwards
    back = lambda p, x: lax.scan(lambda c, w: (c @ w, None), x, p["w"], reverse=True)[0]  # noqa
    _, seen = jc.tap(back, "w")(STACK, X)
    assert_same(seen["w"][2], X)


def test_tap_in_while_keeps_the_last_value():
    def f(p, x):
        return lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w1"] @ p["w2"])), (0, x)
        )[1]

    x = X
    for _ in range(2):
        x = jnp.tanh(x @ PARAMS["w1"] @ PARAMS["w2"])
    _, seen = jc.tap(f, "w1")(PARAMS, X)
    assert_same(seen, {"w1": x}, SUM)
    fori = lambda p, x: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p["w1"] @ p["w2"]), x)  # noqa
    assert jc.tap(fori, "w1")(PARAMS, X)[1]["w1"].shape[-2:] == (6, 4)


def test_tap_in_cond():
    def f(p, x):
        yes = lambda x: jnp.sin(x) @ p["w1"] @ p["w2"]  # noqa: E731
        return lax.cond(x.sum() > 0, yes, lambda x: x @ p["w3"], x)

    params = {**PARAMS, "w3": normal(6, 4, 4)}
    positive = jnp.abs(X)
    _, seen = jax.jit(jc.tap(f, "*"))(params, positive)
    assert_same(seen["w1"], jnp.sin(positive), SUM)
    assert_same(seen["w3"], jnp.zeros_like(X))
    _, seen = jax.jit(jc.tap(f, "*"))(params, -positive)
    assert_same(seen["w3"], -positive)
    assert_same(seen["w1"], jnp.zeros_like(X))


@pytest.mark.parametrize("output", [False, True])
def test_tap_in_shard_map_returns_the_global_array(output):
    mesh = jax.make_mesh((4, 2), ("d", "t"), axis_types=(AxisType.Auto,) * 2)
    x = normal(7, 8, 4)

    def body(x, w1, w2):
        return lax.psum(jnp.tanh(x @ w1) @ w2, "t")

    def f(p, x):
        specs = (P("d"), P(None, "t"), P("t", None))
        call = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P("d"))
        return call(x, p["w1"], p["w2"])

    out, seen = jc.tap(f, "w1", output=output)(PARAMS, x)
    assert_same(out, jax.jit(f)(PARAMS, x), SUM)
    assert_same(seen, {"w1": x @ PARAMS["w1"] if output else x}, SUM)
    # here the sum itself is split over devices
    _, seen = jax.jit(jc.tap(f, "w2", output=output))(PARAMS, x)
    h = jnp.tanh(x @ PARAMS["w1"])
    assert_same(seen, {"w2": h @ PARAMS["w2"] if output else h}, SUM)


def test_tap_in_custom_rules():
    @jax.custom_vjp
    def f(x, w):
        return x @ w

    f.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T * 2, r[0].T @ g * 3))
    model = lambda p, x: f(jnp.sin(x), p["w1"]) @ p["w2"]  # noqa: E731
    _, seen = jc.tap(model, "w1")(PARAMS, X)
    assert_same(seen, {"w1": jnp.sin(X)}, SUM)
    loss = lambda run: lambda p: jnp.sum(run(p) ** 2)  # noqa: E731
    tapped = lambda p: jc.tap(model, "*")(p, X)[0]  # noqa: E731
    got = jax.jit(jax.grad(loss(tapped)))(PARAMS)
    assert_same(got, jax.jit(jax.grad(loss(lambda p: model(p, X))))(PARAMS), SUM)
    value, seen = jax.value_and_grad(
        lambda p: (lambda out, seen: (jnp.sum(out), seen))(*jc.tap(model, "w1")(p, X)), has_aux=True
    )(PARAMS)[0]
    assert_same(seen, {"w1": jnp.sin(X)}, SUM)

    @jax.custom_jvp
    def g(x, w):
        return x @ w

    g.defjvp(lambda primals, dots: (g(*primals), dots[0] @ primals[1]))
    _, seen = jc.tap(lambda p, x: g(x, p["w1"]), "w1")(PARAMS, X)
    assert_same(seen, {"w1": X})


def test_tap_of_ragged_and_embedding():
    params = {"e": normal(8, 10, 4), "w": normal(9, 2, 4, 8)}
    ids, sizes = jnp.array([1, 2, 3]), jnp.array([1, 2], jnp.int32)
    f = lambda p, ids: lax.ragged_dot(p["e"][ids], p["w"], sizes)  # noqa: E731
    out, seen = jc.tap(f, "*", output=True)(params, ids)
    assert_same(seen["e"], params["e"][ids])
    assert_same(seen["w"], out)


def test_gradient_through_a_tap_in_shard_map():
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(AxisType.Auto,) * 2)

    def f(p, x):  # x is equal along t, and so are its taps
        specs = (P("d"), P(None, "t"))
        return jax.shard_map(
            lambda x, w: jnp.sin(x) @ w, mesh=mesh, in_specs=specs, out_specs=P("d", "t")
        )(x, p["w1"])

    got = jax.jit(jax.grad(lambda x: jnp.sum(jc.tap(f, "w1")(PARAMS, x)[1]["w1"] ** 2)))(X)
    assert_same(got, jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(x) ** 2)))(X), SUM)
    report = jc.report(f, "w8a8")(PARAMS, X)
    alone = jc.report(lambda p, x: jnp.sin(x) @ p["w1"], "w8a8")(PARAMS, X)
    assert abs(report.rows[0].snr_db - alone.rows[0].snr_db) < 0.01  # the scales are global


# ---------------------------------------------------------------------- stored weights


def conv(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=numbers)
    return y.mean((1, 2)) @ p["w"] + p["b"][None]


MODELS = {
    "mlp": (mlp, PARAMS, X),
    "layers": (layers, STACK, X),
    "conv": (
        conv,
        {"k": normal(1, 3, 3, 2, 4), "w": normal(2, 4, 3), "b": normal(3, 3)},
        normal(4, 2, 5, 5, 2),
    ),
    "tied": (
        lambda p, ids: p["e"][ids] @ p["e"].T + p["b"][None],
        {"e": normal(1, 10, 6), "b": normal(2, 10)},
        jnp.array([1, 2]),
    ),
    "bfloat16": (mlp, jax.tree.map(lambda a: a.astype(jnp.bfloat16), PARAMS), X),
    "index": (
        lambda p, x: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p["w"][i]), x),
        STACK,
        X,
    ),
}


@pytest.mark.cover
@pytest.mark.parametrize("recipe", ["w8a8", "w4a16-g32", "w2a16-g32", "fp8"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "index"])
def test_stored_bytes_are_those_of_the_report(name, recipe):
    f, params, x = MODELS[name]
    stored = compressed_weights(f, recipe)(params, x)
    report = jc.report(f, recipe)(params, x)
    assert jc.nbytes(stored) == report.bytes_after
    assert report.bytes_before == jc.nbytes(params)
    # and what is stored stands for what the function computes with
    for key, value in stored.items():
        if isinstance(value, jc.QTensor):
            assert value.nbytes == next(r.bytes_after for r in report.rows if r.site == key)


def test_stored_weights_are_the_quantized_ones():
    stored = compressed_weights(mlp, "w8a16")(PARAMS, X)
    assert set(stored) == {"w1", "w2"}
    plain = {k: v.dequantize() for k, v in stored.items()}
    want = jc.quantize_aware(mlp, "w8a16")(PARAMS, X)
    assert_same(jax.jit(mlp)(plain, X), want)
    stacked = compressed_weights(layers, "w8a16")(STACK, X)["w"]
    assert stacked.shape == (3, 4, 4)
    per_layer = jax.vmap(lambda q: q.dequantize())(stacked)
    assert_same(jax.jit(layers)({"w": per_layer}, X), jc.quantize_aware(layers, "w8a16")(STACK, X))
    assert functools.reduce(np.multiply, stacked.scale.shape) == 12
