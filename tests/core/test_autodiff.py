# SPDX-License-Identifier: Apache-2.0
"""The autodiff boundary: ten Adam steps of a wrapped step are those of a quantized loss."""

import threading

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState
from jax import lax
from jax.sharding import PartitionSpec as P
from twins import assert_same, normal

import jaxcompress as jc
from jaxcompress._core import _compat, autodiff

STEPS = 1e-6  # relative: ten steps of the same arithmetic, compiled as two programs
SUMS = 1e-5  # gradients that are added in another order
PARAMS = {"w1": normal(4, 8, seed=1), "w2": normal(8, 4, seed=2)}
X = normal(8, 4, seed=4)
ADAM = optax.adam(1e-2)


def mlp(p, x):
    return jnp.tanh(x @ p["w1"]) @ p["w2"]


def loss(p, x):
    return jnp.mean(mlp(p, x) ** 2)


def step_of(loss, tx=ADAM):
    def step(p, opt, x):
        value, g = jax.value_and_grad(loss)(p, x)
        updates, opt = tx.update(g, opt, p)
        return optax.apply_updates(p, updates), opt, value

    return step


def run(step, tx=ADAM, n=10):
    p, opt, values = PARAMS, tx.init(PARAMS), []
    for i in range(n):
        p, opt, value = step(p, opt, X * (1 + 0.1 * i))
        values.append(value)
    return p, values


def assert_steps(step, want, tx=ADAM, tolerance=STEPS):
    """The wrapped step does what the wanted one does, and the plain one stays as it was."""
    plain = jax.jit(step)
    before = run(plain, tx)
    assert_same(run(jc.quantize_aware(plain, "w8a8"), tx), run(jax.jit(want), tx), tolerance)
    after = run(plain, tx)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)
    quantized = jax.tree.leaves(run(jax.jit(want), tx))
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(before), quantized, strict=True))


def test_a_plain_step():
    assert_steps(step_of(loss), step_of(jc.quantize_aware(loss, "w8a8")))


def test_what_was_traced_before():
    layer = jax.jit(lambda x, w: jnp.tanh(x @ w))
    inner = jax.jit(lambda p, x: jnp.mean((layer(x, p["w1"]) @ p["w2"]) ** 2))
    vg = jax.jit(jax.value_and_grad(inner))
    layer(X, PARAMS["w1"]), inner(PARAMS, X), vg(PARAMS, X)

    def step(p, opt, x):
        value, g = vg(p, x)
        updates, opt = ADAM.update(g, opt, p)
        return optax.apply_updates(p, updates), opt, value

    run(jax.jit(step))
    assert_steps(step, step_of(jc.quantize_aware(loss, "w8a8")))


def test_microbatches_by_hand():
    def accumulating(loss):
        def step(p, opt, x):
            def body(c, x):
                return jax.tree.map(jnp.add, c, jax.value_and_grad(loss)(p, x)), None

            zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), p))
            (value, g), _ = lax.scan(body, zero, x.reshape(4, 2, 4))
            updates, opt = ADAM.update(g, opt, p)
            return optax.apply_updates(p, updates), opt, value

        return step

    assert_steps(accumulating(loss), accumulating(jc.quantize_aware(loss, "w8a8")))


def test_multi_steps():
    tx = optax.MultiSteps(ADAM, 2)
    assert_steps(step_of(loss, tx), step_of(jc.quantize_aware(loss, "w8a8"), tx), tx)


def muon():
    """Updates are gradients made orthogonal by three Newton-Schulz rounds."""

    def orthogonal(g):
        g = g / jnp.linalg.norm(g)
        for _ in range(3):
            g = 1.5 * g - 0.5 * g @ g.T @ g
        return -0.05 * g

    return optax.stateless(lambda g, p: jax.tree.map(orthogonal, g))


def shampoo():
    """L^(-1/4) g R^(-1/4) with L = sum g g^T and R = sum g^T g (Gupta et al. 2018, algorithm 1).

    One root is that of the eigenvalues, the other is the inverse square root of a square root by
    coupled Newton-Schulz rounds: matmuls of both kinds that optimizers have.
    """

    def by_eigenvalues(m):
        values, q = jnp.linalg.eigh(m)
        return (q * values[None] ** -0.25) @ q.T

    def inverse_square_root(m):
        norm, eye = jnp.linalg.norm(m), jnp.eye(len(m))
        y, z = m / norm, eye
        for _ in range(8):
            t = 1.5 * eye - 0.5 * z @ y
            y, z = y @ t, t @ z
        return y * norm**0.5, z / norm**0.5

    def init(p):
        return jax.tree.map(lambda w: tuple(0.1 * jnp.eye(n) for n in w.shape), p)

    def update(g, state, p=None):
        sums = jax.tree.map(lambda g, s: (s[0] + g @ g.T, s[1] + g.T @ g), g, state)

        def direction(g, s):
            right = inverse_square_root(inverse_square_root(s[1])[0])[1]
            return -0.05 * by_eigenvalues(s[0]) @ g @ right

        return jax.tree.map(direction, g, sums), sums

    return optax.GradientTransformation(init, update)


def test_the_shampoo_is_what_it_says():
    tx, g = shampoo(), normal(3, 4, seed=7)
    update, sums = tx.update(g, tx.init(g))
    expected = []
    for m in (g @ g.T, g.T @ g):
        values, q = np.linalg.eigh(0.1 * np.eye(len(m)) + np.asarray(m, np.float64))
        expected.append((q * values**-0.25) @ q.T)
    left, right = expected
    np.testing.assert_allclose(update, -0.05 * left @ g @ right, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(sums[1], 0.1 * np.eye(4) + g.T @ g, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "per_weight"), [(muon, 3 * 2), (shampoo, 2 + 1 + 2 * 8 * 3 + 2)], ids=lambda x: x
)
def test_matmuls_of_the_optimizer_are_not_touched(make, per_weight):
    tx = make()
    step = step_of(loss, tx)
    assert_steps(step, step_of(jc.quantize_aware(loss, "w8a8"), tx), tx, SUMS)
    text = str(jax.make_jaxpr(jc.quantize_aware(step, "w8a8"))(PARAMS, tx.init(PARAMS), X))
    one = str(jax.make_jaxpr(jax.grad(jc.quantize_aware(loss, "w8a8")))(PARAMS, X))
    assert text.count("name=jaxcompress_fake_quantize") == one.count(
        "name=jaxcompress_fake_quantize"
    )
    assert text.count("dot_general[") == one.count("dot_general[") + 2 * per_weight


def test_distillation_from_a_float_teacher():
    teacher = jax.tree.map(lambda w: 2 * w, PARAMS)

    def distilling(student):
        return lambda p, x: jnp.mean((student(p, x) - mlp(teacher, x)) ** 2)

    want = step_of(distilling(jc.quantize_aware(mlp, "w8a8")))
    assert_steps(step_of(distilling(mlp)), want)

    def step(p, teacher, x):  # the teacher is an argument of the step
        return jax.grad(lambda p: jnp.mean((mlp(p, x) - mlp(teacher, x)) ** 2))(p)

    got = jc.quantize_aware(step, "w8a8")(PARAMS, teacher, X)
    assert_same(got, jax.grad(distilling(jc.quantize_aware(mlp, "w8a8")))(PARAMS, X), STEPS)


def test_data_parallel_over_eight_devices():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def parallel(loss):
        def local(p, opt, x):
            value, g = jax.value_and_grad(lambda p, x: lax.pmean(loss(p, x), "d"))(p, x)
            updates, opt = ADAM.update(g, opt, p)
            return optax.apply_updates(p, updates), opt, value

        return jax.shard_map(
            local, mesh=mesh, in_specs=(P(), P(), P("d")), out_specs=(P(), P(), P())
        )

    assert_steps(parallel(loss), step_of(jc.quantize_aware(loss, "w8a8")), tolerance=SUMS)


def test_linen_train_state():
    model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(4)])

    def step_with(loss):
        def step(state, x):
            value, g = jax.value_and_grad(loss)(state.params, x)
            return state.apply_gradients(grads=g), value

        return jax.jit(step)

    def apply_loss(p, x):
        return jnp.mean(model.apply({"params": p}, x) ** 2)

    params = model.init(jax.random.key(0), X)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=ADAM)
    a, b = state, state
    step = jc.quantize_aware(step_with(apply_loss), "w8a8")
    want = step_with(jc.quantize_aware(apply_loss, "w8a8"))
    for i in range(10):
        (a, va), (b, vb) = step(a, X * (1 + i)), want(b, X * (1 + i))
        assert_same(va, vb, STEPS)
    assert_same(a.params, b.params, STEPS)


def test_equinox():
    def step_with(loss):
        @eqx.filter_jit
        def step(model, opt, x):
            value, g = eqx.filter_value_and_grad(loss)(model, x)
            updates, opt = ADAM.update(g, opt, eqx.filter(model, eqx.is_inexact_array))
            return eqx.apply_updates(model, updates), opt, value

        return step

    def model_loss(model, x):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    start = eqx.nn.MLP(4, 4, 8, 2, key=jax.random.key(0))

    def train(step):
        model, opt, values = start, ADAM.init(eqx.filter(start, eqx.is_inexact_array)), []
        for i in range(10):
            model, opt, value = step(model, opt, X * (1 + 0.1 * i))
            values.append(value)
        return jax.tree.leaves(eqx.filter(model, eqx.is_array)), values

    plain = step_with(model_loss)
    before = train(plain)
    got = train(jc.quantize_aware(plain, "w8a8"))
    assert_same(got, train(step_with(jc.quantize_aware(model_loss, "w8a8"))), STEPS)
    assert_same(train(plain), before)
    assert any(np.any(a != b) for a, b in zip(before[0], got[0], strict=True))


def test_another_thread_is_not_affected():
    plain = jax.jit(step_of(loss))
    before, results = run(plain), []
    quantized = jc.quantize_aware(plain, "w8a8")
    inside, done = threading.Event(), threading.Event()

    def slow(p, opt, x):
        inside.set()
        done.wait(30)
        return step_of(loss)(p, opt, x)

    worker = threading.Thread(
        target=lambda: jc.quantize_aware(slow, "w8a8")(PARAMS, ADAM.init(PARAMS), X)
    )
    worker.start()
    inside.wait(30)
    results.append(run(jax.jit(step_of(loss))))  # traced while the other thread is in its scope
    done.set()
    worker.join()
    assert_same(results[0], before)
    assert_same(run(quantized), run(jax.jit(step_of(jc.quantize_aware(loss, "w8a8")))), STEPS)


def test_the_canary(monkeypatch):
    """Where the hook does not fire the first use says what to do instead."""
    monkeypatch.setattr(_compat._api, "ad", getattr(_compat._api.ad, "_real", _compat._api.ad))
    monkeypatch.setattr(_compat, "_hooked", lambda original, hook: original)
    with pytest.raises(jc.JaxCompressError, match="Wrap the loss instead: jax.grad"):
        jc.quantize_aware(step_of(lambda p, x: jnp.sum(p["w1"]) * 2.0), "w8a8")(
            PARAMS, ADAM.init(PARAMS), X
        )
    monkeypatch.undo()
    autodiff.install()
    assert_same(
        run(jc.quantize_aware(step_of(loss), "w8a8"), n=2),
        run(jax.jit(step_of(jc.quantize_aware(loss, "w8a8"))), n=2),
        STEPS,
    )


def test_a_rule_that_matches_in_no_derivative():
    wrong = jc.Recipe([jc.Rule("head", weight="int8")])
    with pytest.raises(jc.RecipeError, match="'head' matches nothing.*Nearest sites: `w1`, `w2`"):
        jc.quantize_aware(step_of(loss), wrong)(PARAMS, ADAM.init(PARAMS), X)
