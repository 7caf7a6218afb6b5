# SPDX-License-Identifier: Apache-2.0
"""A quantized function under everything that JAX can do to a function from outside.

Twins written by hand are the oracle. The tolerance is 0 wherever both sides run the same
arithmetic; where XLA may order a sum differently it is `SUM`, a few float32 roundings.
"""

import functools
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from twins import assert_same, assert_twins, token, weight
from twins import draw as normal

import jaxcompress as jc

SUM = 1e-5  # relative to the largest value: sums of a few hundred terms in another order


PARAMS = {"w1": normal(1, 4, 8), "w2": normal(2, 8, 4)}
X = normal(3, 6, 4)


def mlp(p, x):
    return jnp.tanh(x @ p["w1"]) @ p["w2"]


def twin(p, x):
    return token(jnp.tanh(token(x) @ weight(p["w1"]))) @ weight(p["w2"])


def weight_only(p, x):
    return jnp.tanh(x @ weight(p["w1"])) @ weight(p["w2"])


TWINS = {"w8a8": twin, "w8a16": weight_only}
named = pytest.mark.parametrize("recipe", TWINS)


def squares(f):
    return lambda p, *args: jnp.sum(f(p, *args) ** 2)


def both(recipe, wrap):
    """`wrap` of the quantized function and of its twin."""
    return wrap(jc.quantize_aware(mlp, recipe)), wrap(TWINS[recipe])


def differ(a, b):
    return any(np.any(np.asarray(x) != y) for x, y in zip(*map(jax.tree.leaves, (a, b))))


# ---------------------------------------------------------------------- transformations of JAX


@named
def test_jit_and_grad(recipe):
    q, t = both(recipe, lambda f: f)
    assert_twins(q, t, PARAMS, X)
    assert differ(jax.jit(q)(PARAMS, X), jax.jit(mlp)(PARAMS, X))
    assert_same(jax.jit(jax.jit(q))(PARAMS, X), jax.jit(t)(PARAMS, X))
    # eager calls run the quantized function as one compiled function
    assert_same(q(PARAMS, X), jax.jit(t)(PARAMS, X))


@named
def test_value_and_grad_with_aux(recipe):
    def with_aux(f):
        def loss(p, x):
            y = f(p, x)
            return jnp.sum(y**2), {"y": y, "n": x.shape[0]}

        return jax.value_and_grad(loss, has_aux=True)

    q, t = both(recipe, with_aux)
    assert_same(jax.jit(q)(PARAMS, X), jax.jit(t)(PARAMS, X))
    loss = lambda p, x: (jnp.sum(mlp(p, x) ** 2), {"y": mlp(p, x), "n": x.shape[0]})  # noqa: E731
    whole = jax.value_and_grad(jc.quantize_aware(loss, recipe), has_aux=True)
    assert_same(jax.jit(whole)(PARAMS, X), jax.jit(t)(PARAMS, X))


@named
def test_forward_mode(recipe):
    q, t = both(recipe, lambda f: f)
    args, dots = (PARAMS, X), (jax.tree.map(jnp.cos, PARAMS), jnp.sin(X))
    run = lambda f: jax.jit(lambda a, d: jax.jvp(f, a, d))(args, dots)  # noqa: E731
    assert_same(run(q), run(t))
    assert_same(jax.jit(jax.jacfwd(q))(PARAMS, X), jax.jit(jax.jacfwd(t))(PARAMS, X), SUM)
    assert_same(jax.jit(jax.jacrev(q))(PARAMS, X), jax.jit(jax.jacrev(t))(PARAMS, X), SUM)


@named
def test_linearize(recipe):
    q, t = both(recipe, lambda f: f)
    dots = (jax.tree.map(jnp.cos, PARAMS), jnp.sin(X))
    run = jax.jit(lambda dots: jax.linearize(t, PARAMS, X)[1](*dots))
    y, lin = jax.linearize(q, PARAMS, X)
    assert_same(y, jax.jit(t)(PARAMS, X))
    assert_same(lin(*dots), run(dots), SUM)  # what does not depend on the tangents is done before
    pull = lambda f: jax.jit(lambda y: jax.vjp(f, PARAMS, X)[1](jnp.cos(y)))  # noqa: E731
    assert_same(pull(q)(y), pull(t)(y), SUM)


def test_hessian():
    q, t = both("w8a8", squares)
    run = lambda f: jax.jit(jax.hessian(f))(PARAMS, X)  # noqa: E731
    assert_same(run(q), run(t), SUM)
    hvp = lambda f: jax.jit(jax.grad(lambda p: optax.tree.vdot(jax.grad(f)(p, X), p)))  # noqa: E731
    assert_same(hvp(q)(PARAMS), hvp(t)(PARAMS), SUM)


@named
def test_checkpoint(recipe):
    q, t = both(recipe, lambda f: squares(jax.checkpoint(f)))
    run = lambda f: jax.jit(jax.value_and_grad(f))(PARAMS, X)  # noqa: E731
    assert_same(run(q), run(t))


@named
def test_scan_and_map(recipe):
    xs = normal(4, 3, 6, 4)
    chain = lambda f: lambda p: lax.scan(lambda c, x: (f(p, c + x), c), X, xs)  # noqa: E731
    q, t = both(recipe, chain)
    assert_same(jax.jit(q)(PARAMS), jax.jit(t)(PARAMS))
    q, t = both(recipe, lambda f: lambda p: jnp.sum(chain(f)(p)[0] ** 2))
    assert_same(jax.jit(jax.grad(q))(PARAMS), jax.jit(jax.grad(t))(PARAMS), SUM)
    q, t = both(recipe, lambda f: lambda p: lax.map(functools.partial(f, p), xs))
    assert_same(jax.jit(q)(PARAMS), jax.jit(t)(PARAMS))


def test_shard_map_outside():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    wrap = lambda f: jax.shard_map(  # noqa: E731
        f, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d")
    )
    q, t = both("w8a8", wrap)
    assert_twins(q, t, PARAMS, X, tolerance=SUM)  # gradients of weights are summed over devices


# ---------------------------------------------------------------------- vmap and microbatches

IMAGES = normal(5, 4, 2, 6, 6, 3)
KERNEL = {"k": normal(6, 3, 3, 3, 5)}


def conv(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=numbers)


def per_example(format="int8"):
    q = jc.Quantizer(format, "example")
    return jc.Recipe([jc.Rule("*", jc.Quantizer("int8", "channel"), q)])


BATCHED = {
    "weight-only": (mlp, "w8a16", PARAMS, normal(7, 5, 6, 4)),
    "token": (mlp, "w8a8", PARAMS, normal(7, 5, 6, 4)),
    "group": (
        mlp,
        jc.Recipe([jc.Rule("*", jc.Quantizer("int4", "group:4"))]),
        PARAMS,
        normal(7, 5, 6, 4),
    ),
    "example": (mlp, per_example(), PARAMS, normal(7, 5, 6, 4)),
    "conv-token": (conv, "w8a8", KERNEL, IMAGES),
    "conv-example": (conv, per_example(), KERNEL, IMAGES),
}
batched = pytest.mark.parametrize("f, recipe, params, xs", BATCHED.values(), ids=BATCHED)


@batched
def test_vmap_over_data_equals_a_loop(f, recipe, params, xs):
    q = jc.quantize_aware(f, recipe)
    loop = jnp.stack([q(params, x) for x in xs])
    mapped = jax.jit(jax.vmap(q, (None, 0)))(params, xs)
    # one batched matmul against several small ones: the sums may run in another order
    assert_same(mapped, loop, SUM)
    inside = jc.quantize_aware(jax.vmap(f, (None, 0)), recipe)(params, xs)
    if recipe in ("w8a16", "w8a8"):  # the leading index of a vmapped operation is another one
        assert_same(inside, loop, SUM)
    grad = jax.jit(jax.grad(squares(q)))
    grads = jax.jit(jax.vmap(grad, (None, 0)))(params, xs)
    loop = [grad(params, x) for x in xs]
    assert_same(grads, jax.tree.map(lambda *g: jnp.stack(g), *loop), SUM)


@batched
def test_vmap_over_parameters_equals_a_loop(f, recipe, params, xs):
    q = jc.quantize_aware(f, recipe)
    scales = [1.0, -3.0, 0.1]
    several = jax.tree.map(lambda w: jnp.stack([s * w for s in scales]), params)
    each = [jax.tree.map(lambda w, i=i: w[i], several) for i in range(3)]
    loop = jnp.stack([q(p, xs[0]) for p in each])
    assert_same(jax.jit(jax.vmap(q, (0, None)))(several, xs[0]), loop, SUM)
    grad = jax.jit(jax.grad(squares(q)))
    grads = jax.jit(jax.vmap(grad, (0, None)))(several, xs[0])
    loop = [grad(p, xs[0]) for p in each]
    assert_same(grads, jax.tree.map(lambda *g: jnp.stack(g), *loop), SUM)


@batched
def test_microbatches_change_nothing(f, recipe, params, xs):
    loss = lambda p, x: jnp.mean(f(p, x) ** 2)  # noqa: E731
    q = jc.quantize_aware(loss, recipe)
    whole = jax.jit(jax.grad(q))(params, xs.reshape(-1, *xs.shape[2:]))

    def accumulate(loss):
        def step(p, xs):
            def body(total, x):
                return jax.tree.map(jnp.add, total, jax.grad(loss)(p, x)), None

            total, _ = lax.scan(body, jax.tree.map(jnp.zeros_like, p), xs)
            return jax.tree.map(lambda g: g / len(xs), total)

        return step

    assert_same(jax.jit(accumulate(q))(params, xs), whole, SUM)
    # the same with the transform around the whole accumulation
    assert_same(jax.jit(jc.quantize_aware(accumulate(loss), recipe))(params, xs), whole, SUM)


# ---------------------------------------------------------------------- arguments and results


def test_donated_arguments():
    q = jax.jit(jc.quantize_aware(mlp, "w8a8"), donate_argnums=(1,))
    want = jax.jit(twin)(PARAMS, X)
    x = X + 0
    assert_same(q(PARAMS, x), want)
    assert x.is_deleted()
    step = jc.quantize_aware(
        lambda p, x: jax.tree.map(lambda w, g: w - g, p, jax.grad(squares(mlp))(p, x)), "w8a8"
    )
    p = jax.tree.map(lambda w: w + 0, PARAMS)
    jax.jit(step, donate_argnums=0)(p, X)
    assert all(w.is_deleted() for w in jax.tree.leaves(p))


def configurable(p, x, mode="train", *, act=jnp.tanh, rate=0.5, key=None, layers=("w1", "w2")):
    if mode == "train" and rate > 0:
        x = jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x, 0.0)
    for i, name in enumerate(layers):
        x = x @ p[name] if i == 0 else act(x) @ p[name]
    return {"y": x, "mode": mode, "act": act, "n": len(layers), "none": None}


def test_flags_strings_and_functions():
    q, key = jc.quantize_aware(configurable, "w8a8"), jax.random.key(0)
    out = q(PARAMS, X, "eval", act=jnp.tanh)
    assert_same(out["y"], jax.jit(twin)(PARAMS, X))
    assert (out["mode"], out["act"], out["n"], out["none"]) == ("eval", jnp.tanh, 2, None)
    kept = jnp.where(jax.random.bernoulli(key, 0.75, X.shape), X, 0.0)
    out = q(PARAMS, x=X, mode="train", rate=0.25, key=key)
    assert_same(out["y"], jax.jit(twin)(PARAMS, kept))
    assert_same(q(PARAMS, x=X, mode="train", rate=0.0)["y"], jax.jit(twin)(PARAMS, X))


def test_static_argnames():
    f = lambda *args, **kw: configurable(*args, **kw)["y"]  # noqa: E731
    q = jc.quantize_aware(functools.wraps(configurable)(f), "w8a8")
    jitted = jax.jit(q, static_argnames=("mode", "act", "rate", "layers"))
    want = jax.jit(twin)(PARAMS, X)
    assert_same(jitted(PARAMS, X, "eval"), want)
    assert_same(jitted(PARAMS, x=X, mode="eval", rate=0.1, act=jnp.tanh), want)
    assert_same(jitted(PARAMS, X, mode="train", rate=0.0), want)
    relu = jax.jit(lambda p, x: token(jax.nn.relu(token(x) @ weight(p["w1"]))) @ weight(p["w2"]))
    assert_same(jitted(PARAMS, X, "eval", act=jax.nn.relu), relu(PARAMS, X))


def test_a_python_float_is_an_ordinary_argument():
    q = jc.quantize_aware(lambda p, x, scale: scale * mlp(p, x), "w8a8")
    with_twin = jax.jit(lambda p, x, scale: scale * twin(p, x))
    assert_same(q(PARAMS, X, 0.5), with_twin(PARAMS, X, 0.5))
    assert q(PARAMS, X.astype(jnp.bfloat16), 0.5).dtype == jnp.result_type(jnp.float32)

    traced = []

    def f(p, x, scale):
        traced.append(scale)
        return scale * mlp(p, x)

    q = jc.quantize_aware(f, "w8a8")
    for i in range(4):
        q(PARAMS, X, 0.1 * i)
    assert len(traced) == 1  # another learning rate is not another program


def test_a_python_float_that_must_be_known_is_traced_once_per_value():
    traced = []

    def f(p, x, rate):
        traced.append(rate)
        return mlp(p, x) if rate > 0 else x

    q = jc.quantize_aware(f, "w8a8")
    for rate in (0.5, 0.5, 0.25, 0.5):
        assert_same(q(PARAMS, X, rate), jax.jit(twin)(PARAMS, X))
    assert [r for r in traced if isinstance(r, float)] == [0.5, 0.25]
    assert len(traced) == 3  # the first attempt took the rate for an array


def test_results_that_are_no_arrays():
    q = jc.quantize_aware(lambda p, x: (mlp(p, x), "label", 3, [None, {"k": True}]), "w8a8")
    y, *rest = q(PARAMS, X)
    assert rest == ["label", 3, [None, {"k": True}]]
    assert_same(y, jax.jit(twin)(PARAMS, X))
    nothing = jc.quantize_aware(lambda p, x: jax.debug.callback(lambda _: None, x @ p), "w8a8")
    assert nothing(X.T, X) is None


def test_signature_name_and_doc_are_kept():
    import inspect

    q = jc.quantize_aware(configurable, "w8a8")
    assert inspect.signature(q) == inspect.signature(configurable)
    assert q.__name__ == "configurable"


def test_partial_methods_and_callable_objects():
    class Model:
        def __init__(self, act):
            self.act = act

        def __call__(self, p, x):
            return self.act(x @ p["w1"]) @ p["w2"]

        def apply(self, p, x):
            return self(p, x)

    model, want = Model(jnp.tanh), jax.jit(twin)(PARAMS, X)
    for f in (model, model.apply, functools.partial(mlp), functools.partial(Model.apply, model)):
        assert_same(jc.quantize_aware(f, "w8a8")(PARAMS, X), want)


# ---------------------------------------------------------------------- compilation


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_arguments(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    x = normal(8, 8, 4)
    with jax.set_mesh(mesh):
        put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))  # noqa: E731
        params = {"w1": put(PARAMS["w1"], None, "model"), "w2": put(PARAMS["w2"], "model", None)}
        x = put(x, "data", None)

        def last(h, w):
            if kind is AxisType.Explicit:
                return jnp.einsum("bh,hd->bd", h, w, out_sharding=P("data", None))
            return h @ w

        f = lambda p, x: last(jnp.tanh(x @ p["w1"]), p["w2"])  # noqa: E731
        t = lambda p, x: last(  # noqa: E731
            token(jnp.tanh(token(x) @ weight(p["w1"]))), weight(p["w2"])
        )
        q = jc.quantize_aware(f, "w8a8")
        out, want = jax.jit(q)(params, x), jax.jit(t)(params, x)
        out_q = out
        assert_same(jax.device_get(out), jax.device_get(want), SUM)
        assert out.sharding == want.sharding
        g, want = (jax.jit(jax.grad(squares(f)))(params, x) for f in (q, t))
        assert_same(jax.device_get(g), jax.device_get(want), SUM)
        assert jax.tree.map(lambda a: a.sharding, g) == jax.tree.map(lambda a: a.sharding, want)
        step = lambda p, x: jax.tree.map(  # noqa: E731
            lambda w, g: w - g, p, jax.grad(squares(f))(p, x)
        )
        out = jax.jit(jc.quantize_aware(step, "w8a8"))(params, x)
        got = jax.tree.map(lambda w, v: w - v, params, out)
        assert_same(jax.device_get(got), jax.device_get(want), 1e-4)  # w - (w - g) cancels
    if kind is AxisType.Auto:
        assert_same(
            jax.device_get(out_q), jax.device_get(jax.jit(twin)(PARAMS, normal(8, 8, 4))), SUM
        )


@named
def test_export_with_a_symbolic_batch(recipe):
    q = jc.quantize_aware(mlp, recipe)
    (b,) = jax.export.symbolic_shape("b")
    spec = jax.ShapeDtypeStruct((b, 4), jnp.float32)
    exported = jax.export.export(jax.jit(q), platforms=["cpu", "cuda", "tpu"])(PARAMS, spec)
    again = jax.export.deserialize(bytearray(exported.serialize()))
    for n in (1, 6, 9):
        x = normal(n, n, 4)
        assert_same(again.call(PARAMS, x), jax.jit(q)(PARAMS, x), SUM)
    fixed = jax.export.export(jax.jit(jax.grad(squares(q))))(PARAMS, X)
    again = jax.export.deserialize(bytearray(fixed.serialize(vjp_order=0)))
    assert_same(again.call(PARAMS, X), jax.jit(jax.grad(squares(q)))(PARAMS, X), SUM)


def test_export_with_a_derivative():
    q = jc.quantize_aware(mlp, "w8a8")
    data = jax.export.export(jax.jit(q))(PARAMS, X).serialize(vjp_order=1)
    again = jax.export.deserialize(bytearray(data))
    assert_same(jax.grad(squares(again.call))(PARAMS, X), jax.grad(squares(q))(PARAMS, X), SUM)


def test_ahead_of_time():
    q = jc.quantize_aware(mlp, "w8a8")
    specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (PARAMS, X))
    compiled = jax.jit(q).lower(*specs).compile()
    assert_same(compiled(PARAMS, X), jax.jit(twin)(PARAMS, X))
    assert jax.eval_shape(q, *specs) == jax.eval_shape(mlp, *specs)
    assert jax.eval_shape(jax.grad(squares(q)), *specs) == specs[0]


def test_compiles_once():
    @chex.assert_max_traces(n=1)
    def f(p, x):
        return mlp(p, x)

    jitted = jax.jit(jc.quantize_aware(f, "w8a8"))
    for i in range(4):
        jitted(PARAMS, X + i)

    chex.clear_trace_counter()
    q = jc.quantize_aware(chex.assert_max_traces(n=1)(mlp), "w8a8")
    step = jax.jit(jax.value_and_grad(squares(q)))
    for i in range(4):
        step(PARAMS, X + i)


def test_eager_calls_do_not_retrace():
    count = []

    def f(p, x):
        count.append(1)
        return mlp(p, x)

    q = jc.quantize_aware(f, "w8a8")
    for _ in range(4):
        q(PARAMS, X)
    assert len(count) == 1
    grad = jax.grad(squares(q))
    grad(PARAMS, X)
    first = len(count)
    for _ in range(4):
        grad(PARAMS, X)
    assert len(count) == first <= 2


@named
@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: jax.value_and_grad(squares(f))])
def test_costs_no_more_than_the_twin(recipe, wrap):
    def cost(f):
        found = jax.jit(f).lower(PARAMS, X).compile().cost_analysis()
        return found["flops"], found["bytes accessed"]

    q, t = both(recipe, wrap)
    (flops, traffic), (flops_t, traffic_t) = cost(q), cost(t)
    assert flops <= flops_t
    assert traffic <= traffic_t


# ---------------------------------------------------------------------- whole train steps

TX = optax.adam(1e-2)


def step_of(value_and_grad):
    def step(p, opt, x):
        loss, g = value_and_grad(p, x)
        updates, opt = TX.update(g, opt, p)
        return optax.apply_updates(p, updates), opt, loss

    return step


def run(step, n=3):
    state, losses = (PARAMS, TX.init(PARAMS)), []
    for i in range(n):
        *state, loss = step(*state, X * (i + 1))
        losses.append(loss)
    return state, losses


def quantized_step():
    return jax.jit(step_of(jax.value_and_grad(jc.quantize_aware(squares(mlp), "w8a8"))))


def test_whole_step():
    loss = squares(mlp)
    want = run(quantized_step())
    assert_same(run(jax.jit(jc.quantize_aware(step_of(jax.value_and_grad(loss)), "w8a8"))), want)
    assert_same(run(jax.jit(step_of(jax.value_and_grad(squares(twin))))), want)
    assert differ(run(jax.jit(step_of(jax.value_and_grad(loss)))), want)
    # eagerly, and around a jitted step
    assert_same(run(jc.quantize_aware(step_of(jax.value_and_grad(loss)), "w8a8")), want)
    assert_same(run(jc.quantize_aware(jax.jit(step_of(jax.value_and_grad(loss))), "w8a8")), want)


def test_whole_step_of_functions_that_were_jitted_before():
    loss = jax.jit(squares(mlp))
    vg = jax.jit(jax.value_and_grad(loss))
    plain = jax.jit(step_of(vg))
    before = run(plain)  # everything is in the caches of jit now
    loss(PARAMS, X), vg(PARAMS, X)
    want = run(quantized_step())
    assert_same(run(jax.jit(jc.quantize_aware(plain, "w8a8"))), want)
    assert_same(run(plain), before)  # and nothing leaks
    assert_same(vg(PARAMS, X), jax.jit(jax.value_and_grad(squares(mlp)))(PARAMS, X))


def test_whole_step_with_aux_and_rng_and_argnums():
    def loss(scale, p, x, key):
        x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0.0)
        y = mlp(p, x)
        return jnp.sum(y**2) * scale, (y, key)

    def step_with(loss):
        def step(p, x, key):
            (value, aux), g = jax.value_and_grad(loss, argnums=1, has_aux=True)(2.0, p, x, key)
            return value, aux[0], jax.tree.map(lambda w, d: w - 0.1 * d, p, g)

        return step

    want = jax.jit(step_with(jc.quantize_aware(loss, "w8a8", argnums=1)))
    got = jax.jit(jc.quantize_aware(step_with(loss), "w8a8"))
    key = jax.random.key(5)
    assert_same(got(PARAMS, X, key), want(PARAMS, X, key))


def test_whole_step_with_other_derivatives():
    loss = squares(mlp)
    quant = jc.quantize_aware(loss, "w8a8")
    steps = {
        "jacfwd": lambda f: jax.jacfwd(f),
        "jacrev": lambda f: jax.jacrev(f),
        "vjp": lambda f: lambda p, x: jax.vjp(f, p, x)[1](1.0),
        "jvp": lambda f: lambda p, x: jax.jvp(lambda p: f(p, x), (p,), (p,)),
        "linearize": lambda f: lambda p, x: jax.linearize(lambda p: f(p, x), p)[1](p),
        "hvp": lambda f: lambda p, x: jax.jvp(lambda p: jax.grad(f)(p, x), (p,), (p,)),
        "per-example": lambda f: lambda p, x: jax.vmap(jax.grad(f), (None, 0))(p, x[:, None]),
        "remat": lambda f: jax.grad(jax.checkpoint(f)),
        "closure": lambda f: (
            lambda p, x: jax.grad(lambda s: f(jax.tree.map(lambda w: w * s, p), x))(1.0)
        ),
    }
    for name, make in steps.items():
        got = jax.jit(jc.quantize_aware(make(loss), "w8a8"))(PARAMS, X)
        want = jax.jit(make(quant))(PARAMS, X)
        assert_same(got, want, SUM)
        assert any(map(jnp.any, jax.tree.leaves(got))), name


def test_whole_step_inside_scan_and_vmap():
    loss, xs = squares(mlp), normal(9, 3, 6, 4)

    def many(vg):
        def f(p, opt, xs):
            def body(c, x):
                p, opt, value = step_of(vg)(*c, x)
                return (p, opt), value

            return lax.scan(body, (p, opt), xs)

        return f

    opt = TX.init(PARAMS)
    got = jax.jit(jc.quantize_aware(many(jax.value_and_grad(loss)), "w8a8"))(PARAMS, opt, xs)
    vg = jax.value_and_grad(jc.quantize_aware(loss, "w8a8"))
    assert_same(got, jax.jit(many(vg))(PARAMS, opt, xs))

    several = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), (PARAMS, TX.init(PARAMS)))
    step = jax.vmap(step_of(jax.value_and_grad(loss)), (0, 0, None))
    want = jax.vmap(step_of(vg), (0, 0, None))
    assert_same(
        jax.jit(jc.quantize_aware(step, "w8a8"))(*several, X), jax.jit(want)(*several, X), SUM
    )
    outside = jax.vmap(jc.quantize_aware(step_of(jax.value_and_grad(loss)), "w8a8"), (0, 0, None))
    assert_same(jax.jit(outside)(*several, X), jax.jit(want)(*several, X), SUM)


def adversarial(w, a, updated=False):
    """A step of a generator and a discriminator, quantized by hand with `w` and `a`."""

    def gen(g, z):
        return jnp.tanh(a(z) @ w(g["w"]))

    def dis(d, x):
        return a(jnp.tanh(a(x) @ w(d["w"]))) @ w(d["v"])

    def loss_d(d, g, z, real):
        real, fake = dis(d, real), dis(d, gen(g, z))
        return jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))

    def loss_g(g, d, z):
        return jnp.mean(jax.nn.softplus(-dis(d, gen(g, z))))

    def step(p, z, real):
        descend = lambda p, g: jax.tree.map(lambda w, g: w - 0.1 * g, p, g)  # noqa: E731
        vd, gd = jax.value_and_grad(loss_d)(p["d"], p["g"], z, real)
        d = descend(p["d"], gd)
        vg, gg = jax.value_and_grad(loss_g)(p["g"], d if updated else p["d"], z)
        return {"g": descend(p["g"], gg), "d": d}, vd, vg

    return step


def same(x):
    return x


GAN = {"g": {"w": normal(10, 4, 4)}, "d": {"w": normal(11, 4, 8), "v": normal(12, 8, 1)}}
Z, REAL = normal(13, 6, 4), normal(14, 6, 4)


def test_two_derivatives_in_one_step():
    """The generator and the discriminator are quantized in both losses."""
    step = adversarial(same, same)
    want = jax.jit(adversarial(weight, token))(GAN, Z, REAL)
    assert_same(jax.jit(jc.quantize_aware(step, "w8a8"))(GAN, Z, REAL), want, SUM)
    names = [s.name for s in jc.sites(step)(GAN, Z, REAL)]
    assert set(names) == {"g/w", "d/w", "d/v", "d/w#1", "d/v#1"}


def test_a_rule_that_matches_in_one_of_two_derivatives():
    def loss_a(p, q, x):
        return jnp.sum((x @ p) ** 2)

    def step_with(loss_a, loss_b):
        return lambda p, x: (jax.grad(loss_a)(p["a"], p["b"], x), jax.grad(loss_b)(p["b"], x))

    loss_b = lambda q, x: jnp.sum(jnp.tanh(x @ q) ** 2)  # noqa: E731
    params = {"a": GAN["g"]["w"], "b": GAN["d"]["w"]}
    only = jc.Recipe([jc.Rule("b", weight="int8")])
    want = step_with(loss_a, lambda q, x: loss_b(weight(q), x))
    got = jc.quantize_aware(step_with(loss_a, loss_b), only)
    assert_same(jax.jit(got)(params, Z), jax.jit(want)(params, Z))
    with pytest.raises(jc.RecipeError, match=r"'h/\*' matches nothing"):
        wrong = jc.Recipe([jc.Rule("h/*", weight="int8")])
        jc.quantize_aware(step_with(loss_a, loss_b), wrong)(params, Z)


def test_parameters_that_were_updated_within_the_step():
    """The second loss reads the discriminator after its update: it is still a weight."""
    step = adversarial(same, same, updated=True)
    want = jax.jit(adversarial(weight, token, updated=True))(GAN, Z, REAL)
    assert_same(jax.jit(jc.quantize_aware(step, "w8a8"))(GAN, Z, REAL), want, SUM)


def test_matmuls_on_gradients_are_left_alone():
    """Muon and Shampoo multiply gradients: no parameter is read there."""

    def step(p, x):
        g = jax.grad(squares(mlp))(p, x)
        return jax.tree.map(lambda w, g: w - g @ g.T @ g, p, g)

    def want(p, x):
        g = jax.grad(squares(twin))(p, x)
        return jax.tree.map(lambda w, g: w - g @ g.T @ g, p, g)

    assert_same(jax.jit(jc.quantize_aware(step, "w8a8"))(PARAMS, X), jax.jit(want)(PARAMS, X), SUM)


# ---------------------------------------------------------------------- composition


def test_idempotent():
    q = jc.quantize_aware(mlp, "w8a8")
    assert_twins(jc.quantize_aware(q, "w8a8"), twin, PARAMS, X)
    assert_twins(jc.quantize_aware(jax.jit(q), "w8a8"), twin, PARAMS, X)
    want = jax.jit(jax.grad(squares(twin)))(PARAMS, X)
    assert_same(jc.quantize_aware(jax.grad(squares(q)), "w8a8")(PARAMS, X), want)
    loss = jc.quantize_aware(squares(mlp), "w8a8")
    step = jc.quantize_aware(step_of(jax.value_and_grad(loss)), "w8a8")
    want = run(quantized_step())
    assert_same(run(jax.jit(step)), want)
    assert_same(run(jax.jit(jc.quantize_aware(step, "w8a8"))), want)
    # only a part was quantized before
    f = lambda p, x: jc.quantize_aware(lambda w, x: x @ w, "w8a8")(p["w1"], x)  # noqa: E731
    g = lambda p, x: jnp.tanh(f(p, x)) @ p["w2"]  # noqa: E731
    assert_twins(jc.quantize_aware(g, "w8a8"), twin, PARAMS, X)


def test_same_recipe_on_other_arguments_is_not_skipped():
    f = lambda a, b, x: jnp.tanh(x @ a) @ b  # noqa: E731
    q = jc.quantize_aware(jc.quantize_aware(f, "w8a8", argnums=0), "w8a8", argnums=1)
    want = jax.jit(twin)(PARAMS, X)
    assert_same(q(PARAMS["w1"], PARAMS["w2"], X), want)
    both = jc.quantize_aware(f, "w8a8", argnums=(0, 1))
    assert_same(both(PARAMS["w1"], PARAMS["w2"], X), want)


def test_two_recipes_on_one_site_are_an_error():
    q = jc.quantize_aware(mlp, "w8a8")
    for f in (q, jax.jit(q)):
        with pytest.raises(jc.SiteError, match="`w1` is already quantized by another recipe"):
            jc.quantize_aware(f, "w4a16-g32")(PARAMS, X)
    with pytest.raises(jc.SiteError, match="already quantized by another recipe"):
        jc.quantize_aware(step_of(jax.value_and_grad(squares(q))), "w8a16")(
            PARAMS, TX.init(PARAMS), X
        )


def test_disjoint_recipes_compose():
    first = jc.Recipe([jc.Rule("w1", weight="int8", activation="int8")])
    second = jc.Recipe([jc.Rule("w2", weight="int8", activation="int8")])
    q = jc.quantize_aware(jc.quantize_aware(mlp, first), second)
    assert_twins(q, twin, PARAMS, X)
    # the way out that the message of the error above names
    rest = jc.recipes.get("w8a8").skip("w1")
    assert_twins(jc.quantize_aware(jc.quantize_aware(mlp, first), rest), twin, PARAMS, X)


def test_disjoint_recipes_compose_around_a_step():
    first = jc.Recipe([jc.Rule("w1", weight="int8", activation="int8")])
    second = jc.Recipe([jc.Rule("w2", weight="int8", activation="int8")])
    want = run(quantized_step())
    loss = jc.quantize_aware(squares(mlp), first)
    step = jc.quantize_aware(step_of(jax.value_and_grad(loss)), second)
    assert_same(run(jax.jit(step)), want)
    step = step_of(jax.value_and_grad(squares(mlp)))
    twice = jc.quantize_aware(jc.quantize_aware(step, first), second)
    assert_same(run(jax.jit(twice)), want)


def test_names_of_a_quantized_step_survive():
    step = step_of(jax.value_and_grad(squares(mlp)))
    args = (PARAMS, TX.init(PARAMS), X)
    names = [s.name for s in jc.sites(step)(*args)]
    assert names == ["w1", "w2"]
    quantized = jc.quantize_aware(step, "w8a8")
    assert [s.name for s in jc.sites(quantized)(*args)] == names
    assert all("quantize" in o.owners for s in jc.sites(quantized)(*args) for o in s.operands)


def test_names_survive_quantization():
    q = jc.quantize_aware(mlp, "w8a8")
    names = [s.name for s in jc.sites(mlp)(PARAMS, X)]
    assert [s.name for s in jc.sites(q)(PARAMS, X)] == names == ["w1", "w2"]
    out, seen = jc.tap(q, "*")(PARAMS, X)
    assert_same(out, jax.jit(twin)(PARAMS, X), SUM)
    assert list(seen) == names
    assert_same(seen["w1"], jax.jit(token)(X))


def test_an_empty_recipe_changes_no_bit():
    q = jc.quantize_aware(mlp, jc.Recipe([]))
    assert_twins(q, mlp, PARAMS, X)
    step = step_of(jax.value_and_grad(squares(mlp)))
    assert_same(run(jax.jit(jc.quantize_aware(step, jc.Recipe([])))), run(jax.jit(step)))


def test_another_thread_is_not_affected():
    """While one thread traces a step under a scope, another differentiates as always."""
    entered, finished = threading.Event(), threading.Event()
    results = {}

    def slow(p, x):
        if not entered.is_set():
            entered.set()
            assert finished.wait(60)
        return jnp.sum(mlp(p, x) ** 2)

    def quantizing():
        results["step"] = jc.quantize_aware(jax.grad(slow), "w8a8")(PARAMS, X)

    thread = threading.Thread(target=quantizing)
    thread.start()
    assert entered.wait(60)
    results["plain"] = jax.jit(jax.grad(squares(mlp)))(PARAMS, X)
    results["own"] = jax.jit(jax.grad(jc.quantize_aware(squares(mlp), "w8a16")))(PARAMS, X)
    finished.set()
    thread.join(60)
    want = {
        "plain": jax.jit(jax.grad(lambda p, x: jnp.sum(mlp(p, x) ** 2)))(PARAMS, X),
        "own": jax.jit(jax.grad(squares(weight_only)))(PARAMS, X),
        "step": jax.jit(jax.grad(squares(twin)))(PARAMS, X),
    }
    assert_same(results, want)
