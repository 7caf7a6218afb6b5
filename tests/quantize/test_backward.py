# SPDX-License-Identifier: Apache-2.0
"""`Rule(gradient=...)` against NumPy that rounds the operands of both backward products by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax import lax
from jax.sharding import PartitionSpec as P
from twins import assert_same, fake, normal, token, weight

import jaxcompress as jc
from jaxcompress import Quantizer, Recipe, Rule

ROUNDING = 2e-6  # sums of float32 in another order
STEPS = 1e-6  # the same arithmetic, compiled as two programs
STOCHASTIC = Quantizer("int8", "token", rounding="stochastic")
KEY = jax.random.key(7)


def recipe(gradient, weight="int8", activation="int8"):
    return Recipe([Rule("*", weight, activation, gradient=gradient)])


# ---------------------------------------------------------------------- by hand


def round_int8(a, axis):
    s = np.max(np.abs(a), axis, keepdims=True) / np.float32(127)
    return np.round(a / s) * s


def round_fp8(a, axis, dtype, top):
    s = np.max(np.abs(a), axis, keepdims=True) / np.float32(top)
    return np.clip(a / s, -top, top).astype(dtype).astype(np.float32) * s


def round_e5m2(a, axis):
    return round_fp8(a, axis, ml_dtypes.float8_e5m2, 57344)


def round_e4m3(a, axis):
    return round_fp8(a, axis, ml_dtypes.float8_e4m3fn, 448)


# format of the rule: (of the gradient, of what it is multiplied with)
BY_HAND = {"int8": (round_int8, round_int8), "float8_e5m2": (round_e5m2, round_e4m3)}


def along(text, letters):
    return tuple(i for i, c in enumerate(text) if c in letters)


def einsum_backward(spec, x, w, g, fmt):
    """(dx, dw) of `y = einsum(spec, x, w)`: each product rounds along what it sums over."""
    of_gradient, of_other = BY_HAND[fmt]
    lhs, rhs, out = spec.replace("->", ",").split(",")
    grads = []
    for mine, other, value in ((lhs, rhs, w), (rhs, lhs, x)):
        summed = set(out) & set(other) - set(mine)
        a = of_gradient(g, along(out, summed))
        b = of_other(value, along(other, summed))
        grads.append(np.einsum(f"{out},{other}->{mine}", a, b))
    return grads


def arrays(*shapes):
    return [np.asarray(normal(*shape, seed=i)) for i, shape in enumerate(shapes, 1)]


def gradients(f, rule_recipe, w, x, g, **key):
    """(dx, dw) of sum(f(w, x) g), whose cotangent at the site is g."""
    loss = lambda w, x: jnp.sum(f(w, x) * g)  # noqa: E731
    dw, dx = jax.jit(jax.grad(jc.quantize_aware(loss, rule_recipe), (0, 1)))(w, x, **key)
    return [dx, dw]


EINSUMS = {
    "plain": ("ti,io->to", (6, 16), (16, 8)),
    "several free axes": ("abi,iop->abop", (2, 3, 16), (16, 4, 5)),
    "several summed axes": ("tij,ijo->to", (6, 4, 5), (4, 5, 8)),
    "batched": ("eti,eio->eto", (3, 6, 16), (3, 16, 8)),
    "transposed": ("it,oi->ot", (16, 6), (8, 16)),
}


@pytest.mark.parametrize(
    "case, fmt", [*((case, "int8") for case in EINSUMS), ("plain", "float8_e5m2")]
)
def test_matmul(case, fmt):
    spec, x_shape, w_shape = EINSUMS[case]
    x, w = arrays(x_shape, w_shape)
    (g,) = arrays(np.einsum(spec, x, w).shape)
    f = lambda w, x: jnp.einsum(spec, x, w)  # noqa: E731
    got = gradients(f, recipe(fmt, None, None), w, x, g)
    assert_same(got, [jnp.asarray(a) for a in einsum_backward(spec, x, w, g, fmt)], ROUNDING)
    if case == "plain":  # a forward format changes what is read, and lets the gradient through
        got = gradients(f, recipe(fmt), w, x, g)
        want = einsum_backward(spec, round_int8(x, 1), round_int8(w, 0), g, fmt)
        assert_same(got, [jnp.asarray(a) for a in want], ROUNDING)


CONVS = {
    "plain": ({"padding": "SAME"}, (2, 6, 6, 4), (3, 3, 4, 8)),
    "strides": (
        {"window_strides": (2, 1), "padding": ((1, 0), (0, 2))},
        (2, 7, 6, 4),
        (3, 2, 4, 8),
    ),
    "dilations": (
        {"lhs_dilation": (2, 1), "rhs_dilation": (1, 2), "padding": ((1, 1), (0, 1))},
        (2, 5, 6, 4),
        (3, 2, 4, 8),
    ),
    "groups": ({"feature_group_count": 2}, (2, 6, 6, 4), (3, 3, 2, 8)),
    "depthwise": ({"feature_group_count": 4}, (2, 6, 6, 4), (3, 3, 1, 4)),
    "batch groups": ({"batch_group_count": 2}, (4, 6, 6, 4), (3, 3, 4, 8)),
}


@pytest.mark.parametrize(
    "case, fmt", [*((case, "int8") for case in CONVS), ("strides", "float8_e5m2")]
)
def test_convolution(case, fmt):
    settings, x_shape, w_shape = CONVS[case]
    names = ("NCHW", "OIHW", "NHWC") if case == "strides" else ("NHWC", "HWIO", "NHWC")
    x, w = arrays(x_shape, w_shape)
    x = x.transpose([("NHWC").index(c) for c in names[0]])
    w = w.transpose([("HWIO").index(c) for c in names[1]])
    settings = {"window_strides": (1, 1), "padding": "VALID", **settings}
    conv = lambda x, w: lax.conv_general_dilated(x, w, dimension_numbers=names, **settings)  # noqa: E731
    (g,) = arrays(conv(x, w).shape)
    of_gradient, of_other = BY_HAND[fmt]
    # dx sums over output channels and the window: what is kept is the example and the input channel
    by_example = of_gradient(g, along(names[2], "CHW"))
    (dx,) = jax.vjp(lambda x: conv(x, of_other(w, along(names[1], "OHW"))), x)[1](by_example)
    # dw sums over examples and positions: what is kept are both channels
    by_channel = of_gradient(g, along(names[2], "NHW"))
    (dw,) = jax.vjp(lambda w: conv(of_other(x, along(names[0], "NHW")), w), w)[1](by_channel)
    got = gradients(lambda w, x: conv(x, w), recipe(fmt, None, None), w, x, g)
    assert_same(got, [dx, dw], ROUNDING)


def test_ragged_matmul():
    x, w, g = arrays((8, 4), (3, 4, 6), (8, 6))
    sizes = [3, 0, 5]
    f = lambda w, x: lax.ragged_dot(x, w, jnp.array(sizes, jnp.int32))  # noqa: E731
    of_gradient = of_other = round_int8
    expert = np.repeat(np.arange(3), sizes)
    dx = np.einsum("to,tio->ti", of_gradient(g, 1), of_other(w, 2)[expert])
    one = np.eye(3, dtype=np.float32)[expert]
    dw = np.einsum("te,ti,to->eio", one, of_other(x, 0), of_gradient(g, 0))
    got = gradients(f, recipe("int8", None, None), w, x, g)
    assert_same(got, [jnp.asarray(dx), jnp.asarray(dw)], ROUNDING)


def test_an_outer_product_shares_one_scale():
    """A vector and a matrix: dw sums over nothing, and is rounded all the same."""
    x, w, g = arrays((16,), (16, 8), (8,))
    dx = np.einsum("o,io->i", round_int8(g, 0), round_int8(w, 1))
    dw = np.einsum("i,o->io", round_int8(x, 0), round_int8(g, 0))
    got = gradients(lambda w, x: x @ w, recipe("int8", None, None), w, x, g)
    assert_same(got, [jnp.asarray(dx), jnp.asarray(dw)], ROUNDING)


def test_products_of_two_activations_and_a_granularity():
    q, k, g = arrays((2, 6, 16), (2, 6, 16), (2, 6, 6))
    rules = [Rule("*", op="dot_general", gradient=Quantizer("int8", "tensor"))]
    loss = lambda q, k: jnp.sum(jnp.einsum("bti,bsi->bts", q, k) * g)  # noqa: E731
    got = jax.grad(jc.quantize_aware(loss, Recipe(rules)), (0, 1))(q, k)
    a, b, c = (round_int8(v, None) for v in (q, k, g))
    want = [np.einsum("bts,bsi->bti", c, b), np.einsum("bts,bti->bsi", c, a)]
    assert_same(list(got), [jnp.asarray(v) for v in want], ROUNDING)


def test_dtypes_are_kept():
    x, w = normal(6, 16).astype(jnp.bfloat16), normal(16, 8, seed=2).astype(jnp.bfloat16)
    f = lambda w, x: jnp.dot(x, w, preferred_element_type=jnp.float32)  # noqa: E731
    dx, dw = gradients(f, recipe("int8"), w, x, normal(6, 8, seed=3))
    assert dx.dtype == dw.dtype == jnp.bfloat16
    assert jc.quantize_aware(f, recipe("int8"))(w, x).dtype == jnp.float32


def test_the_forward_pass_is_untouched():
    x, w = normal(6, 16), normal(16, 8, seed=2)
    f = lambda w, x: x @ w  # noqa: E731
    want = jc.quantize_aware(f, recipe(None))(w, x)
    assert_same(jc.quantize_aware(f, recipe(STOCHASTIC))(w, x), want)  # and needs no key


# ---------------------------------------------------------------------- stochastic rounding


@pytest.mark.parametrize("fmt", ["int8", "int4", "float8_e5m2"])
def test_stochastic_rounding_is_unbiased(fmt):
    """The mean over keys is the gradient with a g that is not rounded, up to six deviations."""
    x, w, g = arrays((6, 16), (16, 8), (6, 8))
    n, quantizer = 2000, Quantizer(fmt, "token", rounding="stochastic")
    keys = jax.random.split(KEY, n)
    one = lambda key: gradients(lambda w, x: x @ w, rule, w, x, g, quantize_key=key)  # noqa: E731
    rule = recipe(quantizer, None, None)
    means = [np.mean(np.asarray(v, np.float64), 0) for v in jax.jit(jax.vmap(one))(keys)]
    nearest = gradients(lambda w, x: x @ w, recipe(fmt, None, None), w, x, g)
    if fmt == "int4":
        other = lambda a, axis: np.asarray(Quantizer(fmt).fake_quantize(a, axis))  # noqa: E731
    else:
        other = BY_HAND[fmt][1]
    w_q, x_q = other(w, 1), other(x, 0)
    wants = [g @ w_q.T, x_q.T @ g]
    # One value is rounded by less than the step around it: variance at most step^2 / 4.
    if fmt == "float8_e5m2":  # two bits of mantissa: a step is at most a quarter of the value
        steps = [np.abs(g) / 4, np.abs(g) / 4]
    else:
        top = {"int8": 127, "int4": 7}[fmt]
        steps = [np.max(np.abs(g), axis, keepdims=True) / top + 0 * g for axis in (1, 0)]
    deviations = [
        np.sqrt((steps[0] ** 2 / 4) @ (w_q.T**2) / n),
        np.sqrt((x_q.T**2) @ (steps[1] ** 2 / 4) / n),
    ]
    for mean, want, deviation, rounded in zip(means, wants, deviations, nearest, strict=True):
        assert np.all(np.abs(mean - want) < 6 * deviation)
        assert np.any(np.abs(np.asarray(rounded) - want) > 6 * deviation)  # nearest is biased


def test_the_same_key_makes_the_same_bits():
    x, w, g = arrays((6, 16), (16, 8), (6, 8))
    run = lambda key: gradients(lambda w, x: x @ w, recipe(STOCHASTIC), w, x, g, quantize_key=key)  # noqa: E731
    first = run(KEY)
    assert_same(run(KEY), first)
    assert_same(run(jax.random.key_data(KEY)), first)  # the old spelling of the same key
    assert all(np.any(a != b) for a, b in zip(run(jax.random.key(8)), first, strict=True))
    assert all(
        np.any(a != b)
        for a, b in zip(gradients(lambda w, x: x @ w, recipe("int8"), w, x, g), first)
    )


def test_layers_of_a_scan_draw_differently():
    """Equal layers with equal cotangents differ by their keys alone."""
    x, w, g = normal(6, 16), normal(16, 8, seed=2), normal(6, 8, seed=3)
    f = lambda w, x: lax.scan(lambda c, w: (c + x @ w, None), jnp.zeros((6, 8)), w)[0]  # noqa: E731
    nested = lambda w, x: lax.scan(lambda c, w: (c + f(w, x), None), jnp.zeros((6, 8)), w)[0]  # noqa: E731
    _, same = gradients(f, recipe("int8"), jnp.stack([w] * 3), x, g)
    assert_same(same[1], same[0])
    _, dw = gradients(f, recipe(STOCHASTIC), jnp.stack([w] * 3), x, g, quantize_key=KEY)
    _, twice = gradients(
        nested, recipe(STOCHASTIC), jnp.stack([jnp.stack([w] * 2)] * 2), x, g, quantize_key=KEY
    )
    for layers in (dw, twice.reshape(4, 16, 8)):
        distinct = {np.asarray(layer).tobytes() for layer in layers}
        assert len(distinct) == len(layers)


def scaled_batches():
    """Batches whose cotangents are powers of two of each other: with the same noise, so are the
    gradients, exactly."""
    x, w, g = normal(6, 16), normal(16, 8, seed=2), normal(6, 8, seed=3)
    return w, jnp.stack([x] * 4), jnp.stack([g, 2 * g, 4 * g, 8 * g])


def assert_draws_differ(scaled_gradients):
    first, *others = (np.asarray(a) / 2**i for i, a in enumerate(scaled_gradients))
    assert all(np.any(a != first) for a in others)


@pytest.mark.parametrize("around", ["scan", "vmap", "calls", "shards"])
def test_runs_of_one_site_draw_differently(around):
    w, xs, gs = scaled_batches()
    one = lambda w, x, g: jnp.sum((x @ w) * g)  # noqa: E731

    def microbatches(w, xs, gs):
        if around == "vmap":
            return jax.vmap(jax.grad(one), (None, 0, 0))(w, xs, gs)
        if around == "scan":
            return lax.scan(lambda c, xg: (c, jax.grad(one)(w, *xg)), 0, (xs, gs))[1]
        if around == "calls":
            return jnp.stack([jax.grad(one)(w, x, g) for x, g in zip(xs, gs, strict=True)])
        mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        specs = {"in_specs": (P(), P("d"), P("d")), "out_specs": P("d")}
        return jax.shard_map(
            lambda w, x, g: jax.grad(one)(w, x[0], g[0])[None], mesh=mesh, check_vma=False, **specs
        )(w, xs, gs)

    nearest = jc.quantize_aware(microbatches, recipe("int8"))(w, xs, gs)
    assert_same(nearest[3], nearest[0] * 8)
    quantized = jc.quantize_aware(microbatches, recipe(STOCHASTIC))
    assert_draws_differ(quantized(w, xs, gs, quantize_key=KEY))


def test_permuted_values_draw_differently():
    """A sum of bits would be the same for both."""
    x, w, g = normal(6, 16), normal(16, 8, seed=2), normal(6, 8, seed=3)
    run = lambda x, g: gradients(  # noqa: E731
        lambda w, x: x @ w, recipe(STOCHASTIC), w, x, g, quantize_key=KEY
    )[0]
    turn = lambda a: jnp.roll(a, 1, 0)  # noqa: E731
    noise = jax.random.uniform(KEY, (2,))
    assert noise[0] != noise[1]
    a, b = run(jnp.stack([x[0]] * 2), g[:2]), run(jnp.stack([x[0]] * 2), turn(g[:2]))
    assert np.any(np.asarray(turn(b)) != np.asarray(a))


# ---------------------------------------------------------------------- composition

STACK = 0.4 * normal(3, 8, 8, seed=5)
X = normal(16, 8, seed=6)
LAYER = lambda c, w: (jnp.tanh(c @ w), None)  # noqa: E731
MODELS = {
    "scan": lambda w, x: lax.scan(LAYER, x, w)[0],
    "remat": lambda w, x: lax.scan(jax.checkpoint(LAYER), x, w)[0],
    "loop": lambda w, x: lax.fori_loop(0, 3, lambda _, c: jnp.tanh(c @ w[0]), x),
    "cond": lambda w, x: lax.cond(x.sum() < 1e9, lambda: x @ w[0], lambda: x @ w[1]),
    "jit": lambda w, x: jax.jit(lambda x, w: x @ w)(jax.jit(lambda x, w: x @ w)(x, w[0]), w[1]),
    "vmap": lambda w, x: jax.vmap(lambda x: jnp.tanh(x @ w[0]) @ w[1])(x),
}


def unrolled(w, x):
    for layer in w:
        x = jnp.tanh(x @ layer)
    return x


def loss_of(f):
    return lambda w, x: jnp.mean(jnp.sin(f(w, x)) ** 2)


@pytest.mark.parametrize("kind", MODELS)
def test_compositions(kind):
    """jit or not, a step or its loss: the same; another transform around changes nothing."""
    loss, rule = loss_of(MODELS[kind]), recipe(STOCHASTIC)
    quantized = jc.quantize_aware(loss, rule)
    key = {"quantize_key": KEY}
    want = jax.jit(jax.grad(quantized))(STACK, X, **key)
    forward_only = jax.grad(jc.quantize_aware(loss, recipe(None)))(STACK, X)
    error = np.max(np.abs(want - forward_only)) / np.max(np.abs(forward_only))
    assert 1e-4 < error < 0.05  # eight bits
    step = jc.quantize_aware(lambda w, x: jax.grad(jax.jit(loss))(w, x), rule)
    assert_same(step(STACK, X, **key), want, STEPS)
    if kind != "scan":
        return
    tapped = lambda w, x: jc.tap(lambda w, x: quantized(w, x, **key), "*")(w, x)[0]  # noqa: E731
    assert_same(jax.grad(tapped)(STACK, X), want, STEPS)


def test_scan_equals_unrolled():
    got = jax.grad(jc.quantize_aware(loss_of(MODELS["scan"]), recipe("int8")))(STACK, X)
    want = jax.grad(jc.quantize_aware(loss_of(unrolled), recipe("int8")))(STACK, X)
    assert_same(got, want, ROUNDING)


@pytest.mark.cover
@pytest.mark.parametrize("split", ["batch", "summed", "outputs"])
@pytest.mark.parametrize("check", [True, False])
def test_shard_map(split, check):
    """Scales are those of the whole arrays, wherever they are split."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    ins = {
        "batch": (P(), P("d")),
        "summed": (P("d"), P(None, "d")),
        "outputs": (P(None, "d"), P()),
    }[split]
    out = {"batch": P("d"), "summed": P(), "outputs": P(None, "d")}[split]

    def body(w, x):
        y = x @ w
        return lax.psum(y, "d") if split == "summed" else y

    sharded = jax.shard_map(body, mesh=mesh, in_specs=ins, out_specs=out, check_vma=check)
    loss = lambda f: jc.quantize_aware(loss_of(f), recipe("int8"))  # noqa: E731
    got = jax.jit(jax.grad(loss(sharded), (0, 1)))(STACK[0], X)
    want = jax.jit(jax.grad(loss(lambda w, x: x @ w), (0, 1)))(STACK[0], X)
    assert_same(got, want, ROUNDING)
    random = jc.quantize_aware(loss_of(sharded), recipe(STOCHASTIC))
    drawn = jax.jit(jax.grad(random, (0, 1)))(STACK[0], X, quantize_key=KEY)
    for a, b in zip(drawn, want, strict=True):
        assert 0 < np.max(np.abs(a - b)) < 0.05 * np.max(np.abs(b))


def test_a_gradient_of_a_gradient():
    """A gradient penalty: reverse over reverse, straight through the rounding of both passes."""
    w, x, g = normal(8, 8), normal(16, 8, seed=2), normal(16, 8, seed=3)
    loss = jc.quantize_aware(lambda w, x: jnp.sum(jnp.sin(x @ w) * g), recipe("int8"))

    def by_hand(w):  # its own backward pass is not rounded, which is all that differs
        arriving = jnp.cos(token(x) @ weight(w)) * g
        return fake(token(x), 0).T @ fake(arriving, 0)

    got = jax.grad(lambda w: jnp.sum(jax.grad(loss)(w, x) ** 2))(w)
    want = jax.grad(lambda w: jnp.sum(by_hand(w) ** 2))(w)
    assert_same(jax.grad(loss)(w, x), by_hand(w), ROUNDING)
    assert 0 < np.max(np.abs(got - want)) < 0.03 * np.max(np.abs(want))


# ---------------------------------------------------------------------- forward mode


def test_forward_mode_without_a_gradient_rule():
    p = {"a": normal(8, 8), "b": normal(8, 4, seed=2)}
    f = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    rules = [Rule("a", "int8", "int8", gradient="int8"), Rule("b", "int8", "int8")]
    plain = jc.quantize_aware(f, recipe(None))
    tangent = {"a": jnp.zeros_like(p["a"]), "b": p["b"]}
    _, want = jax.jvp(lambda p: plain(p, X), (p,), (tangent,))
    mixed = jc.quantize_aware(f, Recipe(rules))
    _, got = jax.jvp(lambda b: mixed({**p, "b": b}, X), (p["b"],), (p["b"],))  # of b alone
    assert_same(got, want, STEPS)
    with pytest.raises(TypeError, match="forward-mode.*custom_vjp"):
        jax.jvp(lambda p: mixed(p, X), (p,), (p,))


# ---------------------------------------------------------------------- whole steps

ADAM = optax.adam(1e-2)
PARAMS = {"w1": normal(8, 16, seed=1), "w2": normal(16, 4, seed=2)}


def mlp(p, x):
    return jnp.tanh(x @ p["w1"]) @ p["w2"]


def step_of(loss, tx):
    def step(p, opt, x, **key):
        value, g = jax.value_and_grad(loss)(p, x, **key)
        updates, opt = tx.update(g, opt, p)
        return optax.apply_updates(p, updates), opt, value

    return step


@pytest.mark.parametrize("forward", ["int8", "lsq"])
def test_ten_adam_steps(forward):
    """An unchanged step against the same step on a loss that is quantized by itself."""
    loss = loss_of(mlp)
    if forward == "lsq":
        int4 = Quantizer("int4", "tensor", range="learned")
        rule, tx = recipe(STOCHASTIC, int4, int4), jc.quant_tx(ADAM)
        params = jc.quant_params(mlp, rule)(PARAMS, X)
    else:
        rule, tx, params = recipe(STOCHASTIC), ADAM, PARAMS
    step = jc.quantize_aware(jax.jit(step_of(loss, tx)), rule)
    by_hand = jax.jit(step_of(jc.quantize_aware(loss, rule), tx))
    a = b = (params, tx.init(params))
    for i in range(10):
        key = {"quantize_key": jax.random.fold_in(KEY, i)}
        *a, got = step(*a, X * (1 + i), **key)
        *b, want = by_hand(*b, X * (1 + i), **key)
        assert_same(got, want, STEPS)
    assert_same(a[0], b[0], STEPS)
    moved = step(*a, X, quantize_key=KEY)[0], step(*a, X, quantize_key=jax.random.key(1))[0]
    assert jax.tree.leaves(moved[0])[0].shape and any(
        bool(jnp.any(x != y)) for x, y in zip(*map(jax.tree.leaves, moved), strict=True)
    )


def test_linen_train_state():
    model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(4)])
    weights = model.init(jax.random.key(0), X)
    loss = lambda p, x: jnp.mean(model.apply(p, x) ** 2)  # noqa: E731

    @jax.jit
    def train_step(ts, x):
        value, g = jax.value_and_grad(loss)(ts.params, x)
        return ts.apply_gradients(grads=g), value

    step = jc.quantize_aware(train_step, recipe(STOCHASTIC))
    by_hand = jax.jit(step_of(jc.quantize_aware(loss, recipe(STOCHASTIC)), ADAM))
    ts = TrainState.create(apply_fn=model.apply, params=weights, tx=ADAM)
    opt = ADAM.init(weights)
    for i in range(10):
        key = {"quantize_key": jax.random.fold_in(KEY, i)}
        ts, got = step(ts, X, **key)
        weights, opt, want = by_hand(weights, opt, X, **key)
        assert_same(got, want, STEPS)
    assert_same(ts.params, weights, STEPS)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.relu(self.a(x)))


@pytest.mark.parametrize("wrap", [nnx.jit, lambda step: step], ids=["jit", "eager"])
def test_nnx_step_that_mutates(wrap):
    """The key is an input of what is compiled: each step has its own."""
    traced = []

    def train_step(model, optimizer, x, scale=1.0, *, flag=None):
        traced.append(flag)
        value, g = nnx.value_and_grad(lambda model: jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, g)
        return value * scale

    step = jc.quantize_aware(wrap(train_step), recipe(STOCHASTIC))
    model, plain = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
    graph, weights = nnx.split(plain)
    loss = lambda p, x: jnp.mean(nnx.merge(graph, p)(x) ** 2)  # noqa: E731
    by_hand = jax.jit(step_of(jc.quantize_aware(loss, recipe(STOCHASTIC)), ADAM))
    opt = ADAM.init(weights)
    for i in range(10):
        key = {"quantize_key": jax.random.fold_in(KEY, i)}
        got = step(model, optimizer, X, **key)
        weights, opt, want = by_hand(weights, opt, X, **key)
        assert_same(got, want, STEPS)
        if i == 0:
            first = len(traced)
    assert len(traced) == first  # compiled once
    assert_same(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(weights), STEPS)
    assert int(optimizer.step[...]) == 10
    with pytest.raises(jc.RecipeError, match=r"is rounded at random, and there is no key"):
        step(model, optimizer, X)


def test_learned_steps_get_their_gradient():
    """LSQ by hand: the step of the weight descends along what the rounded backward pass made."""
    x, w, g = arrays((6, 16), (16, 8), (6, 8))
    int4 = Quantizer("int4", "tensor", range="learned")
    rule = recipe("int8", int4, None)
    init, apply = jc.quantize_aware_with_state(lambda w, x: jnp.sum((x @ w) * g), rule)
    state = init(w, x)
    (s,) = jax.tree.leaves(state.learned)
    learned, dw = jax.grad(
        lambda learned, w: apply(jc._quantize.stateful.QuantState(learned, state.statistics), w, x)[
            0
        ],
        (0, 1),
    )(state.learned, w)
    v = w / np.asarray(s)
    inside = (v >= -8) & (v <= 7)
    arriving = round_int8(x, 0).T @ round_int8(g, 0)
    slope = np.where(inside, np.round(v) - v, np.clip(v, -8, 7))
    (got,) = jax.tree.leaves(learned)
    want = np.sum(arriving * slope) / np.sqrt(w.size * 7)
    np.testing.assert_allclose(np.ravel(got), [want], rtol=1e-4)
    assert_same(dw, jnp.asarray(np.where(inside, arriving, 0)), ROUNDING)


def test_state_as_a_value_takes_the_key():
    int4 = Quantizer("int4", "tensor", range="learned")
    _, apply = jc.quantize_aware_with_state(loss_of(mlp), recipe(STOCHASTIC, int4, int4))
    init, _ = jc.quantize_aware_with_state(loss_of(mlp), recipe(None, int4, int4))
    state = init(PARAMS, X)
    run = lambda key: jax.grad(lambda p: apply(state, p, X, quantize_key=key)[0])(PARAMS)["w1"]  # noqa: E731
    assert_same(run(KEY), run(KEY))
    assert np.any(run(KEY) != run(jax.random.key(8)))
    with pytest.raises(jc.RecipeError, match="there is no key"):
        jax.grad(lambda p: apply(state, p, X)[0])(PARAMS)


# ---------------------------------------------------------------------- said and asked


def test_report_says_it():
    p = {"e": normal(5, 8), "w": normal(8, 4, seed=2), "v": normal(4, 4, seed=3)}
    f = lambda p, ids: p["e"][ids] @ p["w"] @ p["v"]  # noqa: E731
    rules = [Rule("v", "int8"), Rule("*", "int8", "int8", gradient=STOCHASTIC)]
    report = jc.report(f, Recipe(rules))(p, jnp.arange(3))
    assert {r.site: r.gradient for r in report.rows} == {
        "e": "float, no backward matmul",
        "w": "int8 per token, stochastic",
        "v": None,
    }
    assert "stochastic" in str(report) and "<th>gradient</th>" in report._repr_html_()
    assert '"gradient": "int8 per token, stochastic"' in report.to_json()
    plain = jc.report(f, "w8a8")(p, jnp.arange(3))
    assert "gradient" not in str(plain) and "gradient" not in plain._repr_html_()
    only = jc.report(f, Recipe([Rule("w", gradient="float8_e5m2")]))(p, jnp.arange(3)).rows
    assert [(r.weight, r.gradient, r.reason) for r in only if r.site == "w"] == [
        ("float32", "float8_e5m2 per token", "")
    ]


@pytest.mark.parametrize("gradient", ["int8", "float8_e5m2", STOCHASTIC])
def test_json(gradient):
    rules = recipe(gradient)
    assert Recipe.from_json(rules.to_json()) == rules
    assert rules.rules[0].to_dict()["gradient"]["format"] == rules.rules[0].gradient.format.name
    text = '{"rules": [{"pattern": "*", "gradient": "int8"}]}'
    assert Recipe.from_json(text) == Recipe([Rule("*", gradient=Quantizer("int8", "token"))])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Rule("w", gradient="uint8"), "uint8 is no format for gradients.*signed"),
        (lambda: Rule("w", gradient="nf4"), "nf4 is no format for gradients"),
        (
            lambda: Rule("w", gradient=Quantizer("int8", "tensor", range="ema")),
            r"gradient of rule 'w': range='ema' is kept.*absmax",
        ),
        (lambda: Rule("w", STOCHASTIC), "weight of rule 'w': only a gradient may be rounded at"),
        (lambda: Rule("w", "int8", STOCHASTIC), "activation of rule 'w': only a gradient may"),
    ],
)
def test_rules_that_make_no_sense(make, message):
    with pytest.raises(jc.RecipeError, match=message):
        make()


@pytest.mark.parametrize(
    "rules, error, message",
    [
        (
            [Rule("e", "int8", gradient="int8"), Rule("*", "int8")],
            jc.RecipeError,
            "rule 'e' has gradient='int8', and all that it decides are lookups.*`e`.*Leave",
        ),
        (
            [Rule("e", gradient="int8"), Rule("*", "int8")],
            jc.RecipeError,
            r"rule 'e' matches nothing.*`e` \(gather\) is left alone: a lookup has no backward",
        ),
        (
            [Rule("w", gradient=Quantizer("int8", "group:3"))],
            jc.SiteError,
            r"gradient int8 per group:3 does not fit `w` \(dot_general \[\[3, 8\], \[8, 4\]\]\)",
        ),
    ],
)
def test_rules_that_do_not_fit(rules, error, message):
    p, f = {"e": normal(5, 8), "w": normal(8, 4)}, lambda p, ids: p["e"][ids] @ p["w"]
    with pytest.raises(error, match=message):
        jc.quantize_aware(f, Recipe(rules))(p, jnp.arange(3))


def test_keys_that_are_missing_or_wrong():
    w, loss = normal(8, 4), lambda w, x: jnp.sum(x @ w)
    quantized = jc.quantize_aware(loss, recipe(STOCHASTIC))
    with pytest.raises(jc.RecipeError, match="gradient of `arg0` is rounded.*quantize_key=jax"):
        jax.grad(quantized)(w, X)
    with pytest.raises(jc.RecipeError, match="there is no key"):
        jc.quantize_aware(lambda w, x: jax.grad(loss)(w, x), recipe(STOCHASTIC))(w, X)
    for bad in (3, jax.random.split(KEY, 2), jnp.ones(2)):
        with pytest.raises(jc.RecipeError, match="quantize_key= takes one random key"):
            quantized(w, X, quantize_key=bad)
    for without in ("w8a8", recipe("int8")):
        with pytest.raises(jc.RecipeError, match="quantize_key= was given to <lambda>.*Leave it"):
            jc.quantize_aware(loss, without)(w, X, quantize_key=KEY)
    takes = lambda w, x, quantize_key: loss(w, x) + jax.random.uniform(quantize_key)  # noqa: E731
    jc.quantize_aware(takes, "w8a8")(w, X, quantize_key=KEY)  # the function's own
