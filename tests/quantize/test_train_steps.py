# SPDX-License-Identifier: Apache-2.0
"""Whole train steps with state: an unchanged step against explicit threading, value by value."""

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax import lax
from jax.sharding import PartitionSpec as P
from twins import assert_same, normal

import jaxcompress as jc

STEPS = 1e-6  # relative: 20 steps of the same arithmetic, compiled as two programs
SUMS = 1e-5  # gradients that are added in another order
PARAMS = {"w1": normal(4, 8, seed=1), "w2": normal(8, 4, seed=2)}
X = normal(8, 4, seed=4)
ADAM = optax.adam(1e-2)
EMA = jc.Recipe(
    [jc.Rule("*", "int8", jc.Quantizer("int8", "tensor", range="ema", momentum=0.9))], "ema"
)
LSQ = jc.recipes.get("lsq-w4a4")
recipes = pytest.mark.parametrize("recipe", [EMA, LSQ], ids=["ema", "lsq"])


def mlp(p, x):
    return jnp.tanh(x @ p["w1"]) @ p["w2"]


def scanned(p, x):
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]


def rematerialized(p, x):
    return lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), x, p["w"])[0]


def branching(p, x):
    positive = jnp.sum(x) > 0
    return lax.cond(positive, lambda: x @ p["w1"], lambda: jnp.tanh(x @ p["w1"][:, ::-1]))


def looping(p, x):
    return lax.fori_loop(0, 3, lambda _, c: jnp.tanh(c @ p["w1"]) @ p["w2"], x)


STACK = {"w": 0.5 * normal(3, 4, 4, seed=3)}
MODELS = {
    "plain": (mlp, PARAMS),
    "scan": (scanned, STACK),
    "remat": (rematerialized, STACK),
    "cond": (branching, PARAMS),
    "loop": (looping, PARAMS),
}


def loss_of(f):
    return lambda p, x: jnp.mean(f(p, x) ** 2)


def step_of(loss, tx):
    def step(p, opt, x):
        value, g = jax.value_and_grad(loss)(p, x)
        updates, opt = tx.update(g, opt, p)
        return optax.apply_updates(p, updates), opt, value

    return step


def carried(state, weights=None):
    return jc.QuantParams(PARAMS if weights is None else weights, state.learned, state.statistics)


def explicit_gradient(loss, recipe):
    """f(weights, state, x) -> loss, new state, gradients of (weights, learned)."""
    _, apply = jc.quantize_aware_with_state(loss, recipe)

    def f(weights, state, x):
        def both(trained):
            inner = type(state)(trained[1], state.statistics)
            return apply(inner, trained[0], x)

        grad = jax.value_and_grad(both, has_aux=True)
        (value, state), g = grad((weights, state.learned))
        return value, state, g

    return f


def explicit_step(gradient, tx):
    def step(weights, state, opt, x):
        value, new, g = gradient(weights, state, x)
        updates, opt = tx.update(g, opt, (weights, state.learned))
        weights, learned = optax.apply_updates((weights, state.learned), updates)
        return weights, type(state)(learned, new.statistics), opt, value

    return step


def averaged(states):
    """Microbatches and devices start from one state; what they make of it is averaged."""
    return jax.tree.map(lambda *x: sum(x) / len(x), *states)


def assert_threaded(step, explicit, state, tx, *, plain=ADAM, n=5, weights=None, tolerance=STEPS):
    """`n` steps of both give the same losses, weights, step sizes and statistics."""
    weights = PARAMS if weights is None else weights
    params = carried(state, weights)
    a, b = (params, tx.init(params)), (weights, state, plain.init((weights, state.learned)))
    explicit = jax.jit(explicit)
    for i in range(n):
        x = X * (1 + 0.2 * i)
        *a, got = step(*a, x)
        *b, want = explicit(*b, x)
        assert_same(got, want, tolerance)
    assert_same((a[0].weights, a[0].learned), (b[0], b[1].learned), tolerance)
    assert_same(a[0].statistics, b[1].statistics, tolerance)
    moved = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), a[0].statistics, state.statistics)
    assert any(jax.tree.leaves(moved)) == bool(state.statistics["ranges"])


# ---------------------------------------------------------------------- an unchanged step


@pytest.mark.cover
@recipes
@pytest.mark.parametrize("kind", MODELS)
def test_twenty_steps(recipe, kind):
    f, weights = MODELS[kind]
    loss, tx = loss_of(f), jc.quant_tx(ADAM)
    state = jc.calibrate(loss, weights, [X, -X, jnp.abs(X), -jnp.abs(X)], recipe)
    step = jc.quantize_aware(jax.jit(step_of(loss, tx)), recipe)
    explicit = explicit_step(explicit_gradient(loss, recipe), ADAM)
    assert_threaded(step, explicit, state, tx, n=20, weights=weights)


@recipes
def test_a_loss_that_is_differentiated_outside(recipe):
    loss, tx = loss_of(mlp), jc.quant_tx(ADAM)
    state = jc.calibrate(loss, PARAMS, [X], recipe)
    step = jax.jit(step_of(jc.quantize_aware(loss, recipe), tx))
    assert_threaded(step, explicit_step(explicit_gradient(loss, recipe), ADAM), state, tx)
    forward = jc.quantize_aware(mlp, recipe)  # a forward pass within a loss
    step = jax.jit(step_of(lambda p, x: jnp.mean(forward(p, x) ** 2), tx))
    assert_threaded(step, explicit_step(explicit_gradient(loss, recipe), ADAM), state, tx)


@recipes
def test_evaluation_leaves_the_statistics(recipe):
    params = jc.quant_params(mlp, recipe)(PARAMS, X)
    _, apply = jc.quantize_aware_with_state(mlp, recipe)
    state = jc.calibrate(mlp, PARAMS, [X], recipe)
    got = jax.jit(jc.quantize_aware(mlp, recipe))(params, 2 * X)
    assert_same(got, jax.jit(apply)(state, PARAMS, 2 * X)[0])


def test_static_reads_what_ema_wrote():
    params = jc.quant_params(mlp, EMA)(PARAMS, X)
    static = jc.Recipe([jc.Rule("*", "int8", jc.Quantizer("int8", "tensor", range="static"))])
    f = jc.quantize_aware(mlp, static)
    whole = f(params, X)
    assert_same(jnp.concatenate([f(params, X[:4]), f(params, X[4:])]), whole, STEPS)


@recipes
def test_what_was_traced_before(recipe):
    """A layer, a loss, its gradient and the step; the plain step keeps its bits."""
    layer = jax.jit(lambda x, w: jnp.tanh(x @ w))
    loss = jax.jit(lambda p, x: jnp.mean((layer(x, p["w1"]) @ p["w2"]) ** 2))
    gradient, tx = jax.jit(jax.value_and_grad(loss)), jc.quant_tx(ADAM)

    @jax.jit
    def step(p, opt, x):
        value, g = gradient(p, x)
        updates, opt = tx.update(g, opt, p)
        return optax.apply_updates(p, updates), opt, value

    layer(X, PARAMS["w1"]), loss(PARAMS, X), gradient(PARAMS, X)
    before = step(PARAMS, tx.init(PARAMS), X)
    state = jc.calibrate(loss, PARAMS, [X], recipe)
    explicit = explicit_step(explicit_gradient(loss_of(mlp), recipe), ADAM)
    assert_threaded(jc.quantize_aware(step, recipe), explicit, state, tx)
    assert_same(step(PARAMS, tx.init(PARAMS), X), before)


@recipes
def test_a_float_teacher_stays_in_float(recipe):
    teacher = jax.tree.map(lambda w: 2 * w, PARAMS)
    target = mlp(teacher, X)

    def distilling(student, target):
        return lambda p, x: jnp.mean((student(p, x) - target(x)) ** 2)

    loss, tx = distilling(mlp, lambda x: mlp(teacher, x)), jc.quant_tx(ADAM)
    state = jc.calibrate(mlp, PARAMS, [X], recipe)
    # The state has nothing for a teacher, and its output is that of the float function.
    params = carried(state)
    got = jc.quantize_aware(jax.jit(step_of(loss, tx)), recipe)(params, tx.init(params), X)
    fixed = distilling(mlp, lambda x: target)
    explicit = jax.jit(explicit_step(explicit_gradient(fixed, recipe), ADAM))
    weights, new, _, value = explicit(PARAMS, state, ADAM.init((PARAMS, state.learned)), X)
    assert_same(got[2], value, STEPS)
    assert_same((got[0].weights, got[0].learned), (weights, new.learned), STEPS)
    assert_same(got[0].statistics, new.statistics, STEPS)


def muon():
    """Matrices are made orthogonal by three Newton-Schulz rounds; step sizes descend."""

    def direction(g):
        if min(g.shape) == 1:
            return -0.05 * g
        g = g / jnp.linalg.norm(g)
        for _ in range(3):
            g = 1.5 * g - 0.5 * g @ g.T @ g
        return -0.05 * g

    return optax.stateless(lambda g, p: jax.tree.map(direction, g))


@recipes
def test_matmuls_of_the_optimizer_are_not_touched(recipe):
    loss, plain, tx = loss_of(mlp), muon(), jc.quant_tx(muon())
    state = jc.calibrate(loss, PARAMS, [X], recipe)
    step = jc.quantize_aware(step_of(loss, tx), recipe)
    explicit = explicit_step(explicit_gradient(loss, recipe), plain)
    assert_threaded(jax.jit(step), explicit, state, tx, plain=plain, tolerance=SUMS)
    params = carried(state)
    text = str(jax.make_jaxpr(step)(params, tx.init(params), X))
    one = str(jax.make_jaxpr(jax.grad(jc.quantize_aware(loss, recipe)))(params, X))
    assert text.count(" round[") == one.count(" round[") > 0
    assert text.count("dot_general[") == one.count("dot_general[") + 2 * 3 * 2


# ---------------------------------------------------------------------- what happens to gradients


@recipes
def test_vmap_in_the_loss(recipe):
    """One range per example, from the same old one; their mean is kept."""
    per_example = loss_of(lambda p, x: mlp(p, x[None]))
    state = jc.calibrate(per_example, PARAMS, [X[0]], recipe)
    quantized, tx = jc.quantize_aware(per_example, recipe), jc.quant_tx(ADAM)
    loss = lambda p, x: jnp.mean(jax.vmap(quantized, (None, 0))(p, x))  # noqa: E731
    one = explicit_gradient(per_example, recipe)

    def explicit(weights, state, x):
        values, states, g = zip(*(one(weights, state, row) for row in x))
        return averaged(values), averaged(states), averaged(g)

    step = jax.jit(step_of(loss, tx))
    assert_threaded(step, explicit_step(explicit, ADAM), state, tx, tolerance=SUMS)


@pytest.mark.cover
@recipes
@pytest.mark.parametrize("total", ["sum", "mean"])
def test_microbatches_by_hand(recipe, total):
    loss, tx = loss_of(mlp), jc.quant_tx(ADAM)
    state = jc.calibrate(loss, PARAMS, [X], recipe)
    scale = 1.0 if total == "sum" else 0.25

    def step(p, opt, x):
        def body(c, x):
            value, g = jax.value_and_grad(loss)(p, x)
            return jax.tree.map(jnp.add, c, (value, g)), None

        zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), p))
        (value, g), _ = lax.scan(body, zero, x.reshape(4, 2, 4))
        g = jax.tree.map(lambda g: g * scale, g)
        updates, opt = tx.update(g, opt, p)
        return optax.apply_updates(p, updates), opt, value

    one = explicit_gradient(loss, recipe)

    def explicit(weights, state, x):
        values, states, g = zip(*(one(weights, state, part) for part in x.reshape(4, 2, 4)))
        g = jax.tree.map(lambda *g: sum(g) * scale, *g)
        return sum(values), averaged(states), g

    step = jc.quantize_aware(jax.jit(step), recipe)
    assert_threaded(step, explicit_step(explicit, ADAM), state, tx, tolerance=SUMS)


@pytest.mark.cover
@recipes
@pytest.mark.parametrize("outermost", [True, False])
def test_multi_steps(recipe, outermost):
    """Outermost: statistics move at every call. Inside: at every second one, by the mean."""
    loss = loss_of(mlp)
    state = jc.calibrate(loss, PARAMS, [X], recipe)
    inner = optax.MultiSteps(ADAM, 2)
    tx = jc.quant_tx(inner) if outermost else optax.MultiSteps(jc.quant_tx(ADAM), 2)
    step = jc.quantize_aware(jax.jit(step_of(loss, tx)), recipe)
    gradient = explicit_gradient(loss, recipe)
    if outermost:
        assert_threaded(step, explicit_step(gradient, inner), state, tx, plain=inner, n=6)
        return
    params, weights = carried(state), PARAMS
    opt, plain = tx.init(params), ADAM.init((PARAMS, state.learned))
    for i in range(3):
        first, second = X * (1 + i), X * (1.5 + i)
        params, opt, _ = step(params, opt, first)
        params, opt, _ = step(params, opt, second)
        results = [gradient(weights, state, x) for x in (first, second)]
        g = averaged([g for _, _, g in results])
        updates, plain = ADAM.update(g, plain, (weights, state.learned))
        weights, learned = optax.apply_updates((weights, state.learned), updates)
        new = averaged([s.statistics for _, s, _ in results])
        state = type(state)(learned, new)
    assert_same((params.weights, params.learned), (weights, state.learned), SUMS)
    assert_same(params.statistics, state.statistics, SUMS)


@pytest.mark.cover
@recipes
@pytest.mark.parametrize("check", [True, False])
def test_data_parallel(recipe, check):
    """Eight devices. With checked types ranges are those of the whole batch; else their mean."""
    loss, tx = loss_of(mlp), jc.quant_tx(ADAM)
    state = jc.calibrate(loss, PARAMS, [X], recipe)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(p, opt, x):
        if check:  # gradients of replicated parameters come out summed
            value, g = jax.value_and_grad(lambda p, x: lax.pmean(loss(p, x), "d"))(p, x)
        else:
            value, g = lax.pmean(jax.value_and_grad(loss)(p, x), "d")
        updates, opt = tx.update(g, opt, p)
        return optax.apply_updates(p, updates), opt, value

    specs = {"in_specs": (P(), P(), P("d")), "out_specs": P()}
    step = jax.jit(jax.shard_map(local, mesh=mesh, check_vma=check, **specs))
    one = explicit_gradient(loss, recipe)

    def explicit(weights, state, x):
        values, states, g = zip(*(one(weights, state, row[None]) for row in x))
        return averaged(values), averaged(states), averaged(g)

    if check:
        explicit = one
    assert_threaded(
        jc.quantize_aware(step, recipe), explicit_step(explicit, ADAM), state, tx, tolerance=SUMS
    )


@pytest.mark.cover
@recipes
@pytest.mark.parametrize("where", ["inside", "by hand"])
def test_clipping_by_global_norm(recipe, where):
    loss, limit = loss_of(mlp), 0.05
    state = jc.calibrate(loss, PARAMS, [X], recipe)
    clipping = optax.chain(optax.clip_by_global_norm(limit), ADAM)
    tx = jc.quant_tx(clipping if where == "inside" else ADAM)

    def step(p, opt, x):
        value, g = jax.value_and_grad(loss)(p, x)
        if where == "by hand":
            norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(g)))
            g = jax.tree.map(lambda g: g * jnp.minimum(1.0, limit / norm), g)
        updates, opt = tx.update(g, opt, p)
        return optax.apply_updates(p, updates), opt, value

    explicit = explicit_step(explicit_gradient(loss, recipe), clipping)
    step = jc.quantize_aware(jax.jit(step), recipe)
    assert_threaded(step, explicit, state, tx, plain=clipping, tolerance=SUMS)


@pytest.mark.cover
@recipes
@pytest.mark.parametrize("scale", [2.0**15, 2.0**-20])
def test_loss_scaling(recipe, scale):
    loss, tx = loss_of(mlp), jc.quant_tx(ADAM)
    state = jc.calibrate(loss, PARAMS, [X], recipe)

    def step(p, opt, x):
        value, g = jax.value_and_grad(lambda p: loss(p, x) * scale)(p)
        g = jax.tree.map(lambda g: g / scale, g)
        updates, opt = tx.update(g, opt, p)
        return optax.apply_updates(p, updates), opt, value / scale

    explicit = explicit_step(explicit_gradient(loss, recipe), ADAM)
    assert_threaded(jc.quantize_aware(step, recipe), explicit, state, tx)


def test_a_gradient_without_statistics_keeps_them():
    params = jc.quant_params(mlp, EMA)(PARAMS, X)
    tx = jc.quant_tx(optax.sgd(0.1))
    for bad in (0.0, jnp.nan):
        g = jax.tree.map(lambda x, bad=bad: jnp.full_like(x, bad), params)
        updates, _ = tx.update(g, tx.init(params), params)
        assert_same(optax.apply_updates(params, updates).statistics, params.statistics)


def normalized(g):
    """Leaf by leaf, as LARS, LAMB and normalized gradient descent do."""
    return jax.tree.map(lambda g: g / jnp.linalg.norm(g), g)


def large(g):
    return jax.tree.map(lambda g: g * jnp.where(jnp.linalg.norm(g) < 1e-9, 2.0**64, 1.0), g)


@pytest.mark.cover
@pytest.mark.parametrize("rescale", [normalized, large])
@recipes
def test_leaf_by_leaf_rescaling_outside_of_quant_tx_raises(recipe, rescale):
    tx = jc.quant_tx(ADAM)

    def step(p, opt, x):
        g = rescale(jax.grad(loss_of(mlp))(p, x))
        updates, opt = tx.update(g, opt, p)
        return optax.apply_updates(p, updates), opt

    params = jc.quant_params(mlp, recipe)(PARAMS, X)
    step = jc.quantize_aware(jax.jit(step), recipe)
    params, opt = step(params, tx.init(params), X)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(params.statistics))
    with pytest.raises(jc.RecipeError, match="rescaled leaf by leaf.*Rescale inside of it"):
        step(params, opt, X)


def test_gradients_in_half_precision():
    params = jc.quant_params(mlp, EMA)(PARAMS, X)
    tx = jc.quant_tx(optax.sgd(0.1))

    def step(dtype, p, x):
        g = jax.tree.map(lambda g: g.astype(dtype), jax.grad(loss_of(mlp))(p, x))
        updates, _ = tx.update(g, tx.init(p), p)
        return optax.apply_updates(p, updates)

    with pytest.raises(jc.JaxCompressError, match="cast to float16.*or to bfloat16"):
        jc.quantize_aware(step, EMA, argnums=1)(jnp.float16, params, X)
    got = jc.quantize_aware(step, EMA, argnums=1)(jnp.bfloat16, params, X).statistics
    want = jc.quantize_aware(step, EMA, argnums=1)(jnp.float32, params, X).statistics
    assert_same(got, want, 2.0**-7)  # a quotient of two bfloat16


# ---------------------------------------------------------------------- frameworks


@recipes
def test_linen_train_state(recipe):
    model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(4)])
    weights = model.init(jax.random.key(0), X)
    loss = lambda p, x: jnp.mean(model.apply(p, x) ** 2)  # noqa: E731
    state = jc.calibrate(loss, weights, [X], recipe)

    @jax.jit
    def train_step(ts, x):
        value, g = jax.value_and_grad(loss)(ts.params, x)
        return ts.apply_gradients(grads=g), value

    step = jc.quantize_aware(train_step, recipe)
    ts = TrainState.create(
        apply_fn=model.apply, params=carried(state, weights), tx=jc.quant_tx(ADAM)
    )
    explicit = jax.jit(explicit_step(explicit_gradient(loss, recipe), ADAM))
    b = (weights, state, ADAM.init((weights, state.learned)))
    for i in range(10):
        ts, got = step(ts, X * (1 + i))
        *b, want = explicit(*b, X * (1 + i))
        assert_same(got, want, STEPS)
    assert_same((ts.params.weights, ts.params.learned), (b[0], b[1].learned), STEPS)
    assert_same(ts.params.statistics, b[1].statistics, STEPS)


@recipes
def test_equinox(recipe):
    """`eqx.filter_grad` takes the module apart: the loss is wrapped, inside of it."""
    model = eqx.nn.MLP(4, 4, 8, 2, key=jax.random.key(0))  # with an activation function as leaf
    loss = lambda model, x: jnp.mean(jax.vmap(model)(x) ** 2)  # noqa: E731
    state, tx = jc.calibrate(loss, model, [X], recipe), jc.quant_tx(ADAM)

    def step_with(loss):
        @eqx.filter_jit
        def step(model, opt, x):
            value, g = eqx.filter_value_and_grad(loss)(model, x)
            updates, opt = tx.update(g, opt, eqx.filter(model, eqx.is_inexact_array))
            return eqx.apply_updates(model, updates), opt, value

        return step

    params = carried(state, model)
    opt = tx.init(eqx.filter(params, eqx.is_inexact_array))
    with pytest.raises(jc.RecipeError, match="in two parts.*wrap the loss"):
        jc.quantize_aware(step_with(loss), recipe)(params, opt, X)
    step = step_with(jc.quantize_aware(loss, recipe))
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    of_arrays = lambda a, x: loss(eqx.combine(a, rest), x)  # noqa: E731
    explicit = jax.jit(explicit_step(explicit_gradient(of_arrays, recipe), ADAM))
    b = (arrays, state, ADAM.init((arrays, state.learned)))
    for i in range(10):
        params, opt, got = step(params, opt, X * (1 + i))
        *b, want = explicit(*b, X * (1 + i))
        assert_same(got, want, STEPS)
    trained = eqx.filter(params.weights, eqx.is_inexact_array)
    assert_same(jax.tree.leaves(trained), jax.tree.leaves(b[0]), STEPS)
    assert_same((params.learned, params.statistics), (b[1].learned, b[1].statistics), STEPS)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.relu(self.a(x)))


@pytest.mark.parametrize("wrap", [nnx.jit, lambda step: step], ids=["jit", "eager"])
def test_nnx_step_that_mutates(wrap):
    """Model and optimizer change in place; the loss closes over the batch."""

    def train_step(model, optimizer, x):
        value, g = nnx.value_and_grad(lambda model: jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, g)
        return value

    step = jc.quantize_aware(wrap(train_step), "w8a8")
    model, plain = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
    graph, weights = nnx.split(plain)
    loss = lambda p, x: jnp.mean(nnx.merge(graph, p)(x) ** 2)  # noqa: E731
    want_step = jax.jit(step_of(jc.quantize_aware(loss, "w8a8"), ADAM))
    opt = ADAM.init(weights)
    for i in range(10):
        got = step(model, optimizer, X * (1 + i))
        weights, opt, want = want_step(weights, opt, X * (1 + i))
        assert_same(got, want, STEPS)
    assert_same(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(weights), STEPS)
    assert int(optimizer.step[...]) == 10
    only = jc.Recipe([jc.Rule("a/*", "int8")])  # names are those of the module
    jc.quantize_aware(wrap(train_step), only)(model, optimizer, X)
    with pytest.raises(jc.RecipeError, match="'head' matches nothing.*`a/kernel/value`"):
        wrong = jc.Recipe([jc.Rule("head", "int8")])
        jc.quantize_aware(wrap(train_step), wrong)(model, optimizer, X)


def nnx_loss(graph):
    return lambda p, x: jnp.mean(nnx.merge(graph, p)(x) ** 2)


@pytest.mark.cover
@recipes
@pytest.mark.parametrize(
    ("wrap", "n"), [(nnx.jit, 20), (lambda step: step, 3)], ids=["jit", "eager"]
)
def test_nnx_step_that_mutates_with_state(recipe, wrap, n):
    """The state is a parameter of the model, and changes in place as the others do."""

    def train_step(model, optimizer, x):
        value, g = nnx.value_and_grad(lambda model: jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, g)
        return value

    plain = Net(nnx.Rngs(0))
    graph, weights = nnx.split(plain)
    loss = nnx_loss(graph)
    state = jc.calibrate(loss, weights, [X], recipe)
    model = jc.quant_params(lambda model, x: model(x), recipe)(plain, X)
    assert not hasattr(plain, "quantization")
    optimizer = nnx.Optimizer(model, jc.quant_tx(ADAM), wrt=nnx.Param)
    step = jc.quantize_aware(wrap(train_step), recipe)
    explicit = jax.jit(explicit_step(explicit_gradient(loss, recipe), ADAM))
    b = (weights, state, ADAM.init((weights, state.learned)))
    for i in range(n):
        got = step(model, optimizer, X * (1 + 0.2 * i))
        *b, want = explicit(*b, X * (1 + 0.2 * i))
        assert_same(got, want, STEPS)
    held = model.quantization.get_value()
    assert_same((held.learned, held.statistics), (b[1].learned, b[1].statistics), STEPS)
    predict = jc.quantize_aware(lambda model, x: model(x), recipe)
    _, apply = jc.quantize_aware_with_state(lambda p, x: nnx.merge(graph, p)(x), recipe)
    assert_same(predict(model, X), apply(b[1], b[0], X)[0], STEPS)
    assert_same(model.quantization.get_value().statistics, held.statistics)
    del model.quantization
    assert_same(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(b[0]), STEPS)


@recipes
def test_nnx_state_in_a_functional_step(recipe):
    """`nnx.split` and optax: the state lies among the parameters."""
    plain = Net(nnx.Rngs(0))
    loss, tx = nnx_loss(nnx.graphdef(plain)), jc.quant_tx(ADAM)
    state, weights = jc.calibrate(loss, nnx.state(plain), [X], recipe), nnx.state(plain)
    graph, params = nnx.split(jc.quant_params(lambda model, x: model(x), recipe)(plain, X))
    step = jc.quantize_aware(jax.jit(step_of(nnx_loss(graph), tx)), recipe)
    explicit = jax.jit(explicit_step(explicit_gradient(loss, recipe), ADAM))
    a, b = (params, tx.init(params)), (weights, state, ADAM.init((weights, state.learned)))
    for i in range(5):
        *a, got = step(*a, X * (1 + i))
        *b, want = explicit(*b, X * (1 + i))
        assert_same(got, want, STEPS)
    held = a[0]["quantization"].get_value()
    assert_same((held.learned, held.statistics), (b[1].learned, b[1].statistics), STEPS)


def test_nnx_microbatches_and_batch_norm():
    """Statistics of both kinds: of batch norm by mutation, of ranges with the gradient."""

    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(4, 8, use_bias=False, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.b = nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            return self.b(jnp.tanh(self.norm(self.a(x))))

    @nnx.jit
    def train_step(model, optimizer, x):
        def loss(model, x):
            return jnp.mean(model(x) ** 2)

        parts = [nnx.value_and_grad(loss)(model, part) for part in (x[:4], x[4:])]
        values, gradients = zip(*parts)
        optimizer.update(model, jax.tree.map(jnp.add, *gradients))
        return sum(values)

    plain = Normed(nnx.Rngs(0))
    model = jc.quant_params(lambda model, x: model(x), EMA)(plain, X)
    optimizer = nnx.Optimizer(model, jc.quant_tx(optax.sgd(0.1)), wrt=nnx.Param)
    graph, weights, rest = nnx.split(plain, nnx.Param, ...)

    def loss(weights, rest, x):
        model = nnx.merge(graph, weights, rest)
        return jnp.mean(model(x) ** 2), nnx.state(model, nnx.Not(nnx.Param))

    init, apply = jc.quantize_aware_with_state(loss, EMA)
    state, want = init(weights, rest, X), []
    for part in (X[:4], X[4:]):

        def one(weights, state=state, rest=rest, part=part):
            (value, rest), new = apply(state, weights, rest, part)
            return value, (rest, new)

        (_, (rest, new)), g = jax.value_and_grad(one, has_aux=True)(weights)
        want.append((new.statistics, g))
    jc.quantize_aware(train_step, EMA)(model, optimizer, X)
    statistics = averaged([statistics for statistics, _ in want])
    assert_same(model.quantization.get_value().statistics, statistics, SUMS)
    assert_same(model.norm.mean.get_value(), rest["norm"]["mean"].get_value(), SUMS)
    moved = jax.tree.map(lambda w, a, b: w - 0.1 * (a + b), weights, want[0][1], want[1][1])
    del model.quantization
    assert_same(jax.tree.leaves(nnx.state(model, nnx.Param)), jax.tree.leaves(moved), SUMS)


def test_nnx_errors_of_a_recipe_with_state():
    def train_step(model, optimizer, x):
        g = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, g)

    step, plain = jc.quantize_aware(nnx.jit(train_step), EMA), Net(nnx.Rngs(0))
    with pytest.raises(jc.RecipeError, match=r"keeps a range \(ema\) for `a/kernel.*quant_params"):
        step(plain, nnx.Optimizer(plain, jc.quant_tx(ADAM), wrt=nnx.Param), X)
    model = jc.quant_params(lambda model, x: model(x), EMA)(plain, X)
    before = jax.tree.leaves(nnx.state(model))
    with pytest.raises(jc.RecipeError, match="train_step updates .*not wrapped.*quant_tx"):
        step(model, nnx.Optimizer(model, ADAM, wrt=nnx.Param), X)
    assert_same(jax.tree.leaves(nnx.state(model)), before)
    other = jc.quant_params(lambda model, x: model(x), LSQ)(plain, X)
    with pytest.raises(jc.RecipeError, match="belongs to another model.*`a/kernel"):
        step(other, nnx.Optimizer(other, jc.quant_tx(ADAM), wrt=nnx.Param), X)
    wrong = jc.Recipe([jc.Rule("head", None, jc.Quantizer("int8", "tensor", range="ema"))])
    optimizer = nnx.Optimizer(model, jc.quant_tx(ADAM), wrt=nnx.Param)
    with pytest.raises(jc.RecipeError, match="'head' matches nothing.*Nearest sites: `a/kernel"):
        jc.quantize_aware(nnx.jit(train_step), wrong)(model, optimizer, X)


def test_nnx_rescaling_leaf_by_leaf_raises():
    def train_step(model, optimizer, x):
        g = normalized(nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model))
        optimizer.update(model, g)

    model = jc.quant_params(lambda model, x: model(x), EMA)(Net(nnx.Rngs(0)), X)
    step = jc.quantize_aware(nnx.jit(train_step), EMA)
    optimizer = nnx.Optimizer(model, jc.quant_tx(ADAM), wrt=nnx.Param)
    step(model, optimizer, X)
    with pytest.raises(jc.RecipeError, match="rescaled leaf by leaf.*Rescale inside of it"):
        step(model, optimizer, X)


def test_nnx_state_and_random_gradients():
    """A key with stored ranges: the same key gives the same bits, another one others."""
    gradient = jc.Quantizer("int8", "token", rounding="stochastic")
    activation = jc.Quantizer("int8", "tensor", range="ema")
    recipe = jc.Recipe([jc.Rule("*", "int8", activation, gradient=gradient)])

    def train_step(model, optimizer, x):
        g = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, g)

    step = jc.quantize_aware(train_step, recipe)

    def after(seed):
        model = jc.quant_params(lambda model, x: model(x), recipe)(Net(nnx.Rngs(0)), X)
        optimizer = nnx.Optimizer(model, jc.quant_tx(optax.sgd(0.1)), wrt=nnx.Param)
        step(model, optimizer, 2 * X, quantize_key=jax.random.key(seed))
        return model.a.kernel.get_value(), model.quantization.get_value().statistics["ranges"]

    (a, ranges), (b, _), (c, _) = after(0), after(0), after(1)
    assert_same(a, b)
    assert np.any(a != c)
    high = 0.99 * jnp.max(jnp.abs(X)) + 0.01 * jnp.max(jnp.abs(2 * X))
    found = ranges["a/kernel/value"]["activation"]
    np.testing.assert_allclose(found["high"].item(), high, rtol=1e-6)
    assert found["count"] == 2


@pytest.mark.parametrize("recipe", ["w8a8", EMA], ids=["w8a8", "ema"])
def test_nnx_step_compiles_once(recipe):
    traced = []

    @nnx.jit
    def train_step(model, optimizer, x):
        traced.append(x)
        g = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, g)

    step = jc.quantize_aware(train_step, recipe)
    model = jc.quant_params(lambda model, x: model(x), recipe)(Net(nnx.Rngs(0)), X)
    optimizer = nnx.Optimizer(model, jc.quant_tx(ADAM), wrt=nnx.Param)
    step(model, optimizer, X)
    step(model, optimizer, X)
    first = len(traced)
    for _ in range(3):
        step(model, optimizer, X)
    assert len(traced) == first


def test_nnx_forward_is_quantized_as_a_whole():
    model = Net(nnx.Rngs(0))
    graph, weights = nnx.split(model)
    want = jc.quantize_aware(lambda p, x: nnx.merge(graph, p)(x), "w8a8")(weights, X)
    assert_same(jc.quantize_aware(lambda m, x: m(x), "w8a8")(model, X), want)


# ---------------------------------------------------------------------- bad input


@pytest.mark.cover
@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("tx", [optax.sgd(0.1), optax.adam(0.1)], ids=["sgd", "adam"])
def test_an_optimizer_without_quant_tx(tx, jit):
    params = jc.quant_params(mlp, EMA)(PARAMS, X)
    step = jc.quantize_aware(step_of(loss_of(mlp), tx), EMA)
    with pytest.raises(jc.RecipeError, match="an optimizer that was not wrapped.*quant_tx"):
        (jax.jit(step) if jit else step)(params, tx.init(params), X)


def test_an_optimizer_without_quant_tx_outside_of_the_wrapper():
    params = jc.quant_params(mlp, EMA)(PARAMS, X)
    loss, tx = jc.quantize_aware(loss_of(mlp), EMA), optax.sgd(0.1)
    updates, _ = tx.update(jax.grad(loss)(params, X), tx.init(params), params)
    params = optax.apply_updates(params, updates)
    with pytest.raises(jc.RecipeError, match="descended along their statistics"):
        loss(params, X)


def test_a_step_that_only_returns_gradients_needs_no_optimizer():
    params = jc.quant_params(mlp, EMA)(PARAMS, X)
    g, same = jc.quantize_aware(lambda p, x: (jax.grad(loss_of(mlp))(p, x), p), EMA)(params, X)
    want = jax.grad(jc.quantize_aware(loss_of(mlp), EMA))(params, X)
    assert_same(g, want, STEPS)
    assert_same(same, params)


def test_plain_parameters_in_a_step():
    step = jc.quantize_aware(step_of(loss_of(mlp), ADAM), LSQ)
    with pytest.raises(jc.RecipeError, match=r"keeps a range \(learned\) for `w1`.*quant_params"):
        step(PARAMS, ADAM.init(PARAMS), X)


def test_parameters_of_another_model():
    params = jc.quant_params(mlp, LSQ)(PARAMS, X)
    tx = jc.quant_tx(ADAM)
    other = lambda p, x: jnp.mean((x @ p["w1"]) ** 2 * jnp.sum(x @ p["w2"].T))  # noqa: E731
    wrong = jc.QuantParams({"v": PARAMS["w1"]}, params.learned, params.statistics)
    step = jc.quantize_aware(step_of(lambda p, x: jnp.mean((x @ p["v"]) ** 2), tx), LSQ)
    with pytest.raises(jc.RecipeError, match="belongs to another model.*of `v` needs"):
        step(wrong, tx.init(wrong), X)
    jc.quantize_aware(step_of(other, tx), LSQ)(params, tx.init(params), X)  # same names: fits


def test_a_rule_that_matches_in_no_derivative():
    params, tx = jc.quant_params(mlp, EMA)(PARAMS, X), jc.quant_tx(ADAM)
    rule = jc.Rule("head", None, jc.Quantizer("int8", "tensor", range="ema"))
    step = jc.quantize_aware(step_of(loss_of(mlp), tx), jc.Recipe([rule]))
    with pytest.raises(jc.RecipeError, match="'head' matches nothing.*Nearest sites: `w1`, `w2`"):
        step(params, tx.init(params), X)


def test_a_step_compiles_once():
    params, tx = jc.quant_params(mlp, EMA)(PARAMS, X), jc.quant_tx(ADAM)
    step = jax.jit(chex.assert_max_traces(jc.quantize_aware(step_of(loss_of(mlp), tx), EMA), 1))
    opt = tx.init(params)
    for _ in range(3):
        params, opt, _ = step(params, opt, X)
    assert np.isfinite(jax.tree.leaves(params)[0]).all()
