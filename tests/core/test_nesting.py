# SPDX-License-Identifier: Apache-2.0
"""Sites below control flow, calls, custom derivatives and inner autodiff, against twins."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

import jaxcompress as jc
from jaxcompress import Recipe, Rule, quantize_aware
from jaxcompress._core.analyze import Analyzer
from tests.twins import ROUNDING, assert_same, assert_twins, names, normal, token, weight

X = normal(6, 4, seed=2)
STACK = {"w": normal(3, 4, 4, seed=7) * 0.5}
TWO = {"up": normal(4, 8, seed=1), "down": normal(8, 4, seed=3)}


def dense(x, w):
    """A matmul of the model; `dense_q` is its twin."""
    return x @ w


def dense_q(x, w):
    return token(x) @ weight(w)


def check(model, p=STACK, x=X, *, tolerance=0.0, gradient=None):
    """`model(dense)` is a function of (p, x); quantized it equals `model(dense_q)`."""
    q = quantize_aware(model(dense), "w8a8")
    assert_twins(q, model(dense_q), p, x, tolerance=tolerance, gradient=gradient)


# Values are equal to the last bit; gradients are not quite. In a differentiated loop the quantized
# weights still equal NumPy's bit for bit, but the activations that are kept between the layers
# differ from the twin's in the last bit of float32 (6e-8), since its body is compiled otherwise.
LOOP = {"gradient": ROUNDING}


def mlp(dot):
    return lambda p, x: dot(jnp.tanh(dot(x, p["up"])), p["down"])


# ---------------------------------------------------------------------- jit and loops


def test_jit_and_nested_jit():
    check(lambda dot: jax.jit(mlp(dot)), TWO)
    check(lambda dot: jax.jit(lambda p, x: jax.jit(mlp(jax.jit(dot)))(p, x) + x), TWO)


def test_jit_that_was_traced_before_and_is_used_after():
    inner = jax.jit(mlp(dense))
    before = inner(TWO, X), jax.grad(lambda p: inner(p, X).sum())(TWO)
    assert_twins(quantize_aware(inner, "w8a8"), mlp(dense_q), TWO, X)
    after = inner(TWO, X), jax.grad(lambda p: inner(p, X).sum())(TWO)
    assert_same(after, before)


def test_jit_with_static_and_donated_arguments():
    @functools.partial(jax.jit, static_argnames="act", donate_argnums=1, inline=True)
    def f(p, x, act):
        return act(x @ p["up"]) @ p["down"]

    q = quantize_aware(lambda p, x: f(p, x + 0, act=jnp.sin), "w8a8")
    assert_twins(q, lambda p, x: dense_q(jnp.sin(dense_q(x, p["up"])), p["down"]), TWO, X)


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"unroll": 2}, {"unroll": True}])
def test_scan_over_layers(options):
    def model(dot):
        def body(x, w):
            return jnp.tanh(dot(x, w)), x.sum()

        return lambda p, x: lax.scan(body, x, p["w"], **options)

    check(model, **LOOP)
    (site,) = jc.sites(model(dense))(STACK, X)
    assert (site.name, site.stack, site.loops) == ("w", (3,), (3,))


def test_scan_equals_the_unrolled_loop():
    def scanned(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    def unrolled(p, x):
        for i in range(3):
            x = jnp.tanh(dense_q(x, p["w"][i]))
        return x

    # XLA fuses the body of a loop on its own.
    assert_twins(quantize_aware(scanned, "w8a8"), unrolled, STACK, X, tolerance=ROUNDING)


def test_nested_scans_over_layers():
    p = {"w": normal(2, 3, 4, 4, seed=7) * 0.5, "v": normal(2, 4, 4, seed=8) * 0.5}

    def model(dot):
        def inner(x, w):
            return jnp.tanh(dot(x, w)), None

        def outer(x, layer):
            x, _ = lax.scan(inner, x, layer["w"])
            return dot(x, layer["v"]), None

        return lambda p, x: lax.scan(outer, x, p)[0]

    assert [(s.name, s.stack) for s in jc.sites(model(dense))(p, X)] == [("w", (2, 3)), ("v", (2,))]
    check(model, p, **LOOP)


def test_scan_over_time_shares_the_weight():
    def model(dot):
        def f(p, x):
            def step(h, row):
                h = jnp.tanh(dot(h, p["w"][0]) + dot(row[None], p["w"][1]))
                return h, dot(h, p["w"][2])

            return lax.scan(step, jnp.zeros((1, 4)), x)

        return f

    assert all(s.stack == () and s.loops == (6,) for s in jc.sites(model(dense))(STACK, X))
    check(model)


def test_scan_over_layers_inside_scan_over_time():
    def model(dot):
        def step(p, h, row):
            return lax.scan(lambda h, w: (jnp.tanh(dot(h, w)), None), h + row[None], p["w"])

        return lambda p, x: lax.scan(lambda h, row: (step(p, h, row)[0], h), jnp.zeros((1, 4)), x)

    (site,) = jc.sites(model(dense))(STACK, X)
    assert (site.loops, site.stack) == ((6, 3), (3,))
    check(model, **LOOP)


def test_scan_carries_the_weight():
    """The carry is a parameter that changes: what the loop returns is still one."""

    def model(dot):
        def f(p, x):
            def body(c, _):
                w, x = c
                return (w * 0.5, jnp.tanh(dot(x, w))), None

            (w, x), _ = lax.scan(body, (p["w"][0], x), length=3)
            return dot(x, w)

        return f

    check(model, **LOOP)


def test_scan_whose_weight_carry_meets_data_is_no_weight():
    def f(p, x):
        def body(w, row):
            return w + jnp.outer(row, row), row @ w

        return lax.scan(body, p["w"][0], x)

    sites = jc.sites(f)(STACK, X)
    assert all(o.role == "activation" for s in sites for o in s.operands)


def test_while_loop():
    def model(dot):
        def f(p, x):
            body = lambda c: (c[0] + 1, jnp.tanh(dot(c[1], p["w"][0])))  # noqa: E731
            return lax.while_loop(lambda c: c[0] < 3, body, (0, x))[1]

        return f

    q, twin = quantize_aware(model(dense), "w8a8"), model(dense_q)
    assert_same(jax.jit(q)(STACK, X), jax.jit(twin)(STACK, X))
    tangent = lambda f: jax.jit(lambda p, x: jax.jvp(f, (p, x), (p, x)))(STACK, X)  # noqa: E731
    assert_same(tangent(q), tangent(twin))


def test_matmul_inside_the_condition_of_a_while_loop():
    def model(dot):
        def f(p, x):
            test = lambda c: jnp.sum(dot(c, p["w"][0]) ** 2) > 1e-2  # noqa: E731
            return lax.while_loop(test, lambda c: 0.5 * jnp.tanh(dot(c, p["w"][1])), x)

        return f

    assert names(model(dense), STACK, X) == ["w", "w#1"]
    q, twin = quantize_aware(model(dense), "w8a8"), model(dense_q)
    assert_same(jax.jit(q)(STACK, X), jax.jit(twin)(STACK, X))


def test_fori_loop_with_a_dynamic_layer_index():
    def model(dot):
        return lambda p, x: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(dot(x, p["w"][i])), x)

    check(model, **LOOP)


def test_fori_loop_with_a_dynamic_length():
    def model(dot):
        def f(p, x):
            n = jnp.where(x.sum() > 1e6, 0, 2)
            return lax.fori_loop(0, n, lambda i, x: jnp.tanh(dot(x, p["w"][i])), x)

        return f

    q, twin = quantize_aware(model(dense), "w8a8"), model(dense_q)
    assert_same(jax.jit(q)(STACK, X), jax.jit(twin)(STACK, X))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_cond_with_different_sites_in_the_branches(sign):
    def model(dot):
        def f(p, x):
            yes = lambda x: dot(x, p["w"][0])  # noqa: E731
            no = lambda x: dot(dot(jnp.sin(x), p["w"][1]), p["w"][2])  # noqa: E731
            return lax.cond(sign * jnp.sum(x**2) > 0, yes, no, x)

        return f

    check(model)


@pytest.mark.parametrize("branch", [0, 1, 2])
def test_switch_with_different_sites_in_the_branches(branch):
    def model(dot):
        def f(p, x):
            one = lambda x: dot(x, p["w"][0])  # noqa: E731
            two = lambda x: dot(jnp.tanh(dot(x, p["w"][1])), p["w"][2])  # noqa: E731
            i = branch + jnp.int32(jnp.sum(x) > 1e6)
            return lax.switch(i, [one, jnp.sin, two], x)

        return f

    check(model)


def test_cond_that_chooses_the_weight():
    def f(dot):
        return lambda p, x: dot(
            x, lax.cond(x.sum() > 0, lambda p: p["w"][0], lambda p: p["w"][1] * 2, p)
        )

    check(f)


def test_platform_dependent_lowers_only_its_own_branch():
    """The other branch calls a kernel that this machine cannot lower."""

    def kernel(x, w):
        def body(a, b, out):
            out[...] = a[...] @ b[...]

        return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct((6, 4), x.dtype))(x, w)

    def model(dot):
        def f(p, x):
            here = lambda x, w: jnp.sin(dot(x, w))  # noqa: E731
            return lax.platform_dependent(x, p["w"][0], tpu=kernel, default=here)

        return f

    recipe = Recipe([Rule("*pallas_call", None), Rule("*", "int8", "int8")])
    got = jax.jit(quantize_aware(model(dense), recipe))(STACK, X)  # kernels have no derivative
    assert_same(got, jax.jit(lambda p, x: jnp.sin(dense_q(x, p["w"][0])))(STACK, X))


def test_optimization_barrier_keeps_what_is_a_weight():
    def model(dot):
        return lambda p, x: dot(*lax.optimization_barrier((x, p["w"][0])))

    check(model)


def test_cond_inside_scan():
    def model(dot):
        def body(x, layer):
            i, w = layer
            return lax.cond(i % 2 == 0, lambda x: jnp.tanh(dot(x, w)), lambda x: x * 1.5, x), None

        return lambda p, x: lax.scan(body, x, (jnp.arange(3), p["w"]))[0]

    check(model)


# ---------------------------------------------------------------------- remat


POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("hidden"),
    "nothing": jax.checkpoint_policies.nothing_saveable,
}


@pytest.mark.parametrize("policy", POLICIES)
def test_checkpoint_keeps_its_policy(policy):
    def model(dot):
        def block(p, x):
            h = checkpoint_name(jnp.tanh(dot(x, p["up"])), "hidden")
            return jnp.sin(dot(h, p["down"]))

        return jax.checkpoint(block, policy=POLICIES[policy])

    check(model, TWO)
    q = quantize_aware(model(dense), "w8a8")
    # What is saved for the backward pass is what the twin saves.
    saved = [residuals(f) for f in (q, model(dense_q))]
    assert saved[0] == saved[1]


def residuals(f) -> list:
    """Shapes of what is kept between forward and backward pass."""
    _, pullback = jax.vjp(jax.jit(f), TWO, X)
    return sorted(str(x.shape) for x in jax.tree.leaves(pullback))


def test_checkpoint_inside_scan():
    def model(dot):
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def body(x, w):
            return jnp.tanh(dot(x, w)), None

        return lambda p, x: lax.scan(body, x, p["w"])[0]

    check(model, **LOOP)


# ---------------------------------------------------------------------- custom derivatives


def doubled(dot):
    """x @ w with a rule that no one else would use: 2 g wT for x, 3 xT g for w."""

    @jax.custom_vjp
    def f(x, w):
        return dot(x, w)

    def backward(saved, g):
        x, w = saved
        return g @ w.T * 2.0, x.T @ g * 3.0

    f.defvjp(lambda x, w: (dot(x, w), (x, w)), backward)
    return f


def test_custom_vjp_keeps_the_users_rule():
    check(lambda dot: lambda p, x: doubled(dot)(jnp.sin(x), p["w"][0]))


def test_custom_vjp_under_jit_scan_and_remat():
    def model(dot):
        block = jax.checkpoint(jax.jit(lambda x, w: jnp.tanh(doubled(dot)(x, w))))
        return lambda p, x: lax.scan(lambda x, w: (block(x, w), None), x, p["w"])[0]

    check(model, **LOOP)


def test_custom_vjp_with_nondiff_argnums_and_integer_residuals():
    def model(dot):
        @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
        def f(scale, x, w, i):
            return jnp.tanh(dot(x, w)) * scale

        def forward(scale, x, w, i):
            out = dot(x, w)
            return jnp.tanh(out) * scale, (jnp.cos(out), x, i, jnp.argmax(out), w)

        def backward(scale, saved, g):
            cos, x, i, best, w = saved
            return g @ w.T * scale + best, x.T @ (g * cos) * i, None

        f.defvjp(forward, backward)
        return lambda p, x: f(2.0, jnp.sin(x), p["w"][0], jnp.int32(3))

    check(model)


def test_custom_vjp_with_residuals_that_are_inputs():
    def model(dot):
        @jax.custom_vjp
        def f(n, x, w):
            return dot(x, w)

        def forward(n, x, w):
            return dot(x, w), (w, n, x + 1, x)

        def backward(saved, g):
            w, n, y, x = saved
            return None, g @ w.T * n, (y + x).T @ g

        f.defvjp(forward, backward)
        return lambda p, x: f(jnp.float32(3.0), jnp.sin(x), p["w"][0])

    check(model)


def test_custom_vjp_that_closes_over_arrays():
    constant, factors = normal(4, 4, seed=11), jnp.arange(4.0)[None]

    def model(dot):
        @jax.custom_vjp
        def f(x, w):
            return dot(x + factors, w) @ constant

        def forward(x, w):
            return f(x, w), (x * factors, w)

        def backward(saved, g):
            x, w = saved
            return (g @ constant.T) @ w.T + factors, x.T @ g

        f.defvjp(forward, backward)
        return lambda p, x: f(jnp.sin(x), p["w"][0])

    check(model)


def test_custom_vjp_that_closes_over_traced_values():
    """Residuals and primal read values of the function around it that are not differentiated."""

    def model(dot):
        def outer(p, x):
            mask = lax.stop_gradient(jnp.sign(x))

            @jax.custom_vjp
            def f(w):
                return dot(mask, w)

            f.defvjp(lambda w: (dot(mask, w), mask), lambda mask, g: (mask.T @ g * 3.0,))
            return f(p["w"][0])

        return outer

    q, twin = quantize_aware(model(dense), "w8a8"), model(dense_q)
    assert_same(jax.jit(q)(STACK, X), jax.jit(twin)(STACK, X))
    grad = lambda f: jax.grad(lambda p: jnp.sum(f(p, X) ** 2))(STACK)  # noqa: E731
    assert_same(grad(q), grad(twin))


def test_custom_vjp_whose_forward_calls_the_function_itself():
    """The usual way to write a forward rule; differentiated twice, too."""

    def model(dot):
        @jax.custom_vjp
        def f(x, w):
            return jnp.tanh(dot(x, w))

        f.defvjp(
            lambda x, w: (f(x, w), (x, w)),
            lambda saved, g: (2.0 * g @ saved[1].T, 3.0 * saved[0].T @ g),
        )
        return lambda p, x: f(jnp.sin(x), p["w"][0])

    check(model)

    def twice(dot):
        g = jax.grad(lambda p, x: jnp.sum(model(dot)(p, x) ** 2), argnums=1)
        return lambda p, x: jnp.sum(g(p, x) ** 2)

    check(twice)


def test_custom_vjp_with_symbolic_zeros():
    def model(dot):
        @jax.custom_vjp
        def f(x, w):
            return dot(x, w), x.sum()

        def forward(x, w):
            seen = float(x.perturbed) + 2.0 * float(w.perturbed)
            return (dot(x.value, w.value), x.value.sum()), (x.value, w.value, seen)

        def backward(saved, g):
            x, w, seen = saved
            first = g[0]
            assert not isinstance(first, jax.custom_derivatives.SymbolicZero)
            return first @ w.T * seen, x.T @ first

        f.defvjp(forward, backward, symbolic_zeros=True)
        return lambda p, x: f(jnp.sin(x), p["w"][0])[0]

    check(model)


def test_custom_vjp_under_vmap():
    def model(dot):
        f = doubled(dot)
        return lambda p, x: jax.vmap(lambda r, w: f(r, w), (None, 0))(x, p["w"])

    def twin_dot(x, w):  # vmap comes first: the activation is shared, each weight has its scales
        return token(x) @ weight(w)

    q = quantize_aware(model(dense), "w8a8")
    assert_twins(q, model(twin_dot), STACK, X)


def test_custom_vjp_whose_forward_calls_vjp():
    def model(dot):
        @jax.custom_vjp
        def f(p, x):
            return mlp(dot)(p, x)

        f.defvjp(lambda p, x: jax.vjp(mlp(dot), p, x), lambda pullback, g: pullback(g))
        return f

    check(model, TWO)


def test_custom_vjp_whose_forward_alone_has_the_matmul():
    """The primal computes by other means: the forward rule is what training runs."""

    def model(dot):
        @jax.custom_vjp
        def f(x, w):
            return (x[:, :, None] * w[None]).sum(1)

        f.defvjp(lambda x, w: (dot(x, w), (x, w)), lambda s, g: (g @ s[1].T, s[0].T @ g))
        return lambda p, x: f(jnp.sin(x), p["w"][0])

    assert names(model(dense), STACK, X) == ["w"]
    check(model)


def test_custom_vjp_of_clipping_is_kept():
    @jax.custom_vjp
    def clip(x):
        return jnp.clip(x, -0.5, 0.5)

    clip.defvjp(lambda x: (clip(x), None), lambda _, g: (g * 3.0,))
    check(lambda dot: lambda p, x: clip(dot(clip(x), p["w"][0])))
    assert_twins(
        quantize_aware(lambda p, x: clip(x @ p["w"][0]), Recipe([])),
        lambda p, x: clip(x @ p["w"][0]),
        STACK,
        X,
    )


def test_empty_recipe_keeps_custom_rules():
    f = doubled(dense)
    model = lambda p, x: jax.nn.log_softmax(f(jnp.sin(x), p["w"][0]))  # noqa: E731
    assert_twins(quantize_aware(model, Recipe([])), model, STACK, X)


def tangent_rule(dot, **kwargs):
    """sin(x @ w) with five times the tangent that one would expect."""

    @jax.custom_jvp
    def f(x, w):
        return jnp.sin(dot(x, w))

    @functools.partial(f.defjvp, **kwargs)
    def _(primals, tangents):
        (x, w), (dx, dw) = primals, tangents
        out = jnp.zeros((x.shape[0], w.shape[1]))
        if not isinstance(dx, jax.custom_derivatives.SymbolicZero):
            out += dx @ w
        if not isinstance(dw, jax.custom_derivatives.SymbolicZero):
            out += x @ dw
        return f(x, w), 5.0 * out

    return f


@pytest.mark.parametrize("symbolic_zeros", [False, True])
def test_custom_jvp_keeps_the_users_rule(symbolic_zeros):
    def model(dot):
        f = tangent_rule(dot, symbolic_zeros=symbolic_zeros)
        return lambda p, x: f(jnp.cos(x), p["w"][0])

    check(model)
    q, twin = quantize_aware(model(dense), "w8a8"), model(dense_q)
    tangent = lambda f: jax.jit(lambda p, x: jax.jvp(f, (p, x), (p, x)))(STACK, X)  # noqa: E731
    assert_same(tangent(q), tangent(twin))
    assert_twins(quantize_aware(model(dense), Recipe([])), model(dense), STACK, X)


def test_custom_jvp_with_nondiff_argnums_that_closes_over_arrays():
    constant = normal(4, 4, seed=12)

    def model(dot):
        @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
        def f(scale, x, w):
            return dot(x, w) @ constant * scale

        @f.defjvp
        def _(scale, primals, tangents):
            return f(scale, *primals), tangents[0] @ constant * 7.0 * scale

        return lambda p, x: f(2.0, jnp.cos(x), p["w"][0])

    check(model)


def test_custom_jvp_under_jit_scan_remat_and_vmap():
    def model(dot):
        f = jax.checkpoint(jax.jit(tangent_rule(dot)))

        def f3(p, x):
            def body(x, w):
                return jax.vmap(f, (0, None))(x[:, None], w)[:, 0], None

            return lax.scan(body, x, p["w"])[0]

        return f3

    check(model, tolerance=ROUNDING)


def test_functions_with_custom_rules_of_jax_are_kept():
    def model(dot):
        def f(p, x):
            h = jax.nn.relu(dot(x, p["up"]))
            return jax.nn.log_softmax(dot(jax.nn.silu(h), p["down"])), jax.nn.logsumexp(h)

        return f

    check(model, TWO)


# ---------------------------------------------------------------------- vmap and maps inside


def test_vmap_inside():
    check(lambda dot: lambda p, x: jax.vmap(lambda x: dot(x, p["w"][0]))(x))
    # Each layer of the ensemble has its own scales; the activation has one per row.
    check(lambda dot: lambda p, x: jax.vmap(dot, (None, 0))(x, p["w"]))


def test_lax_map_inside():
    check(lambda dot: lambda p, x: lax.map(lambda row: dot(row, p["w"][0]), x), **LOOP)
    check(
        lambda dot: lambda p, x: lax.map(lambda row: dot(row, p["w"][0]), x, batch_size=2), **LOOP
    )


def test_associative_scan_of_weights_is_left_alone():
    f = lambda p, x: x @ lax.associative_scan(jnp.matmul, p["w"])[-1]  # noqa: E731
    twin = lambda p, x: dense_q(x, lax.associative_scan(jnp.matmul, p["w"])[-1])  # noqa: E731
    assert_twins(quantize_aware(f, "w8a8"), twin, STACK, X)


def test_associative_scan_of_data():
    def model(dot):
        def f(p, x):
            gates = jax.nn.sigmoid(dot(x, p["w"][0]))
            combine = lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1])  # noqa: E731
            return dot(lax.associative_scan(combine, (gates, x))[1], p["w"][1])

        return f

    check(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda w: jnp.linalg.inv(w[1] + 3 * jnp.eye(4)),
        lambda w: jnp.linalg.solve(w[1] + 3 * jnp.eye(4), w[2]),
        lambda w: jax.scipy.linalg.expm(w[1] - w[1].T),
    ],
)
def test_linear_algebra_on_parameters_beside_matmuls(make):
    f = lambda p, x: (x @ p["w"][0]) @ make(p["w"])  # noqa: E731
    twin = lambda p, x: dense_q(dense_q(x, p["w"][0]), make(p["w"]))  # noqa: E731
    assert_twins(quantize_aware(f, "w8a8"), twin, STACK, X)


# ---------------------------------------------------------------------- autodiff inside


def square(f):
    return lambda p, x: jnp.sum(f(p, x) ** 2)


def norm2(tree):
    return sum(jnp.sum(v**2) for v in jax.tree.leaves(tree))


def data_penalty(dot):
    loss = square(mlp(dot))
    return lambda p, x: loss(p, x) + norm2(jax.grad(loss, argnums=1)(p, x))


def parameter_penalty(dot):
    loss = square(mlp(dot))
    return lambda p, x: loss(p, x) + norm2(jax.grad(loss)(p, x))


def jitted_penalty(dot):
    loss = jax.jit(square(mlp(dot)))
    return lambda p, x: loss(p, x) + norm2(jax.jit(jax.grad(loss, argnums=1))(p, x))


def closed_over_penalty(dot):
    """WGAN-GP: the critic closes over its parameters, which are cast first."""

    def f(p, x):
        p = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)
        critic = lambda x: jnp.sum(mlp(dot)(p, x.astype(jnp.bfloat16)).astype(jnp.float32))  # noqa: E731
        return critic(x) + norm2(jax.grad(critic)(x))

    return f


def scanned_penalty(dot):
    def f(p, x):
        def body(total, row):
            g = jax.grad(square(mlp(dot)), argnums=1)(p, row[None])
            return total + norm2(g), None

        return lax.scan(body, 0.0, x)[0]

    return f


def per_example_penalty(dot):
    def f(p, x):
        g = jax.vmap(jax.grad(square(mlp(dot)), argnums=1), (None, 0))(p, x[:, None])
        return norm2(g)

    return f


def rematted_penalty(dot):
    loss = square(jax.checkpoint(mlp(dot)))
    return lambda p, x: norm2(jax.value_and_grad(loss, argnums=1)(p, x))


def tangents(dot):
    f = mlp(dot)
    return lambda p, x: norm2(jax.jvp(lambda x: f(p, x), (x,), (jnp.sin(x),)))


def forward_jacobian(dot):
    f = mlp(dot)
    return lambda p, x: norm2(jax.jacfwd(lambda x: f(p, x[None])[0])(x[0]))


def reverse_jacobian(dot):
    f = mlp(dot)
    return lambda p, x: norm2(jax.jacrev(lambda x: f(p, x[None])[0])(x[0]))


def linearized(dot):
    def f(p, x):
        y, push = jax.linearize(lambda x: mlp(dot)(p, x), x)
        return norm2((y, push(jnp.cos(x))))

    return f


def hessian(dot):
    f = square(mlp(dot))
    return lambda p, x: norm2(jax.hessian(lambda r: f(p, r[None]))(x[0]))


def vjp_then_grad(dot):
    def f(p, x):
        y, pullback = jax.vjp(lambda x: mlp(dot)(p, x), x)
        return norm2((y, pullback(jnp.cos(y))))

    return f


def penalty_in_cond(dot):
    loss = square(mlp(dot))

    def f(p, x):
        g = lambda x: norm2(jax.grad(loss, argnums=1)(p, x))  # noqa: E731
        return loss(p, x) + lax.cond(x.sum() > -1e6, g, lambda x: 0.0, x)

    return f


INNER = [
    data_penalty, parameter_penalty, jitted_penalty, scanned_penalty,
    per_example_penalty, rematted_penalty, tangents, forward_jacobian, reverse_jacobian,
    linearized, hessian, vjp_then_grad, penalty_in_cond,
]  # fmt: skip


# Gradients near 1e7 here: up to 1e-7 of that apart in float32 (on one version of JAX or both) and
# 2e-16 in float64, so it is rounding.
ROUNDED = (parameter_penalty, scanned_penalty, hessian)


@pytest.mark.parametrize("model", INNER, ids=lambda f: f.__name__)
def test_derivatives_inside(model):
    check(model, TWO, tolerance=ROUNDING if model in ROUNDED else 0.0)


def test_gradient_penalty_with_parameters_cast_and_closed_over():
    # bfloat16 keeps 8 bits: one rounding apart after sums in another order.
    check(closed_over_penalty, TWO, tolerance=0.0)


def test_train_step_inside():
    def step(dot):
        loss = square(mlp(dot))

        def f(p, x):
            value, g = jax.value_and_grad(loss)(p, x)
            return jax.tree.map(lambda w, g: w - 0.01 * g, p, g), value

        return f

    got = jax.jit(quantize_aware(jax.jit(step(dense)), "w8a8"))(TWO, X)
    assert_same(got, jax.jit(step(dense_q))(TWO, X))


# ---------------------------------------------------------------------- names, memo


def test_repeated_blocks_are_analysed_once(monkeypatch):
    calls = []
    analyze = Analyzer.analyze

    def counted(self, *args, **kwargs):
        calls.append(1)
        return analyze(self, *args, **kwargs)

    monkeypatch.setattr(Analyzer, "analyze", counted)
    block = jax.jit(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"])
    layers = [{"a": normal(4, 8, seed=i), "b": normal(8, 4, seed=10 + i)} for i in range(1, 7)]

    def f(p, x):
        for layer in p:
            x = x + block(layer, x)
        return x

    found = names(f, layers, X)
    assert found == [f"{i}/{n}" for i in range(6) for n in "ab"]
    assert len(calls) == 2  # the function and the block


def test_names_are_the_same_on_every_version():
    p = {
        "table": normal(10, 4, seed=1),
        "enc": [{"k": normal(4, 4, seed=i)} for i in range(2)],
        "stack": normal(3, 4, 4, seed=3) * 0.5,
        "a": normal(4, 2, seed=4),
        "b": normal(2, 4, seed=5),
        "conv": normal(3, 4, 4, seed=6),
    }

    def f(p, ids):
        h = p["table"][ids]
        with jax.named_scope("encoder"):
            h = jax.jit(lambda h: h @ p["enc"][0]["k"].T)(h)
            h = jax.checkpoint(lambda h: jnp.tanh(h) @ p["enc"][1]["k"])(h)
            h = h @ p["enc"][1]["k"]
            with jax.named_scope("scores"):
                h = (h @ h.T) @ h
            h = jax.vmap(lambda r: jnp.einsum("i,j,ij->i", r, r, jnp.eye(4)))(h)
        h = h @ (p["enc"][0]["k"] + p["a"] @ p["b"])
        h = lax.scan(lambda h, w: (h @ w, h @ h.T), h, p["stack"])[0]
        h = lax.cond(h.sum() > 0, lambda h: h @ p["stack"][1], lambda h: h, h)
        h = doubled(dense)(h, p["stack"][jnp.argmax(h[0]) % 3])
        h = lax.conv_general_dilated(
            h[None], p["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )[0]
        return h @ p["table"].T

    assert names(f, p, jnp.array([1, 2, 3])) == [
        "table",
        "enc/0/k",
        "enc/1/k",
        "enc/1/k#1",
        "encoder/scores/dot_general#0",
        "encoder/scores/dot_general#1",
        "encoder/i,j,ij->i/dot_general#0",
        "encoder/i,j,ij->i/dot_general#1",
        "a",
        "a+b+enc/0/k",
        "stack",
        "dot_general#0",
        "stack#1",
        "stack#2",
        "conv",
        "table#1",
    ]
