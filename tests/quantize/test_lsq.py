# SPDX-License-Identifier: Apache-2.0
"""Learned ranges: LSQ and PACT, and DoReFa, against their closed forms in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import normal

import jaxcompress as jc
from jaxcompress._quantize.dorefa import dorefa_activation, dorefa_weight
from jaxcompress._quantize.lsq import initial_step, lsq
from jaxcompress._quantize.pact import pact

V = np.concatenate([np.asarray(normal(200)), [-4.0, -2.0, 1.75, 3.0]]).astype(np.float32)
QN, QP = 4.0, 3.0
G = 1 / np.sqrt(V.size * QP)
formats = pytest.mark.parametrize("qn, qp", [(4.0, 3.0), (8.0, 7.0), (0.0, 15.0)])
steps = pytest.mark.parametrize("s", [0.3, 0.5, 1.0])


def closed_form(v, s, qn, qp):
    """Value and both derivatives of LSQ, equations 1, 3 and 5 of the paper."""
    u = v.astype(np.float64) / s
    inside = (-qn <= u) & (u <= qp)
    value = s * np.round(np.clip(u, -qn, qp))
    ds = np.where(inside, np.round(u) - u, np.where(u < -qn, -qn, qp))
    return value, inside.astype(float), ds / np.sqrt(v.size * qp)


@formats
@steps
def test_lsq_is_its_closed_form(s, qn, qp):
    step = jnp.array([s], jnp.float32)
    value, back = jax.vjp(lambda v, s: lsq(v, s, qn, qp, V.size), V, step)
    want, dv, ds = closed_form(V, np.float32(s), qn, qp)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    c = np.asarray(normal(V.size, seed=1))
    got_v, got_s = back(jnp.asarray(c))
    np.testing.assert_array_equal(got_v, c * dv)
    np.testing.assert_allclose(got_s, [np.sum(c * ds)], rtol=2e-5)  # a float32 sum of 204
    _, tangent = jax.jvp(lambda s: lsq(V, s, qn, qp, V.size), (step,), (jnp.ones(1),))
    np.testing.assert_allclose(tangent, ds, rtol=1e-5, atol=1e-6)


@steps
def test_lsq_is_the_derivative_of_its_surrogate(s):
    """The rounding held fixed at round(v/s) - v/s, finite differences give the same slope."""
    u = V.astype(np.float64) / s
    inside = (-QN <= u) & (u <= QP)
    offset = np.round(u) - u
    c = np.asarray(normal(V.size, seed=2), np.float64)

    def surrogate(step):
        return np.sum(c * step * np.where(inside, u * s / step + offset, np.clip(u, -QN, QP)))

    h = 1e-4
    want = (surrogate(s + h) - surrogate(s - h)) / (2 * h) * G
    got = jax.grad(lambda x: jnp.vdot(jnp.asarray(c, jnp.float32), lsq(V, x, QN, QP, V.size)))(
        jnp.array([s], jnp.float32)
    )
    np.testing.assert_allclose(got, [want], rtol=1e-4)


def test_each_scale_has_its_own_gradient():
    w = normal(6, 3)
    s = jnp.array([[0.2, 0.5, 1.0]])
    got = jax.grad(lambda s: lsq(w, s, QN, QP, 6).sum())(s)
    for k in range(3):
        _, _, ds = closed_form(np.asarray(w[:, k]), float(s[0, k]), QN, QP)
        np.testing.assert_allclose(got[0, k], ds.sum(), rtol=1e-5, atol=1e-6)


def test_a_step_that_reached_zero_is_finite():
    for s in (0.0, -1.0):
        value, g = jax.value_and_grad(lambda s: lsq(V, s, QN, QP, V.size).sum())(jnp.array([s]))
        assert np.isfinite(value) and np.isfinite(g).all()


def test_initialization():
    np.testing.assert_allclose(initial_step(jnp.float32(0.6), 7.0), 2 * 0.6 / np.sqrt(7), rtol=1e-6)
    assert initial_step(jnp.float32(0.0), 7.0) == 1
    w, x = normal(4, 8), normal(6, 4, seed=1)
    params = jc.quant_params(lambda w, x: x @ w, "lsq-w4a4")(w, x)
    learned = params.learned["arg0"]
    for name, value in (("weight", w), ("activation", x)):
        want = 2 * np.abs(value).mean() / np.sqrt(7)
        np.testing.assert_allclose(learned[name]["step"], [[want]], rtol=1e-6)


def test_full_range_and_formats():
    assert jc.Quantizer("int4", range="learned").format.min == -8
    assert jc.Quantizer("uint4", range="learned").format.min == 0
    with pytest.raises(jc.FormatError, match="is for integer formats, found float8_e4m3fn"):
        jc.Quantizer("float8_e4m3fn", range="learned")
    with pytest.raises(jc.FormatError, match="is for unsigned integer formats, found int4"):
        jc.Quantizer("int4", range="pact")


def test_lsq_in_a_function():
    """One matmul, written by hand: both operands, forward and all gradients."""
    w, x = normal(4, 8), normal(6, 4, seed=1)
    init, apply = jc.quantize_aware_with_state(lambda w, x: jnp.sum(jnp.tanh(x @ w)), "lsq-w4a4")
    state = init(w, x)

    def by_hand(a, b, w, x):
        def q(v, s):
            u, g = v / s, 1 / np.sqrt(v.size * 7)
            s = s * g + jax.lax.stop_gradient(s - s * g)
            r = jnp.clip(v / s, -8, 7)
            return s * (r + jax.lax.stop_gradient(jnp.round(u.clip(-8, 7)) - r))

        return jnp.sum(jnp.tanh(q(x, a) @ q(w, b)))

    def ours(learned, w, x):
        return apply(type(state)(learned, state.statistics), w, x)[0]

    a, b = (state.learned["arg0"][k]["step"] for k in ("activation", "weight"))
    want = jax.value_and_grad(by_hand, (0, 1, 2, 3))(a, b, w, x)
    value, (learned, dw, dx) = jax.value_and_grad(ours, (0, 1, 2))(state.learned, w, x)
    got = (value, tuple(learned["arg0"][k]["step"] for k in ("activation", "weight")) + (dw, dx))
    for p, q in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(p, q, rtol=2e-5, atol=1e-6)


def test_pact_is_its_closed_form():
    x, a, levels = V, np.float32(1.5), 15.0
    value, back = jax.vjp(lambda x, a: pact(x, a, levels), x, jnp.array([a]))
    step = a / levels
    np.testing.assert_allclose(value, np.round(np.clip(x, 0, a) / step) * step, atol=1e-6)
    c = np.asarray(normal(x.size, seed=3))
    dx, da = back(jnp.asarray(c))
    np.testing.assert_array_equal(dx, np.where((x >= 0) & (x < a), c, 0))
    np.testing.assert_allclose(da, [c[x >= a].sum()], rtol=1e-5)


def test_pact_in_a_recipe():
    rule = jc.Rule("*", activation=jc.Quantizer("uint4", "tensor", range="pact"))
    params = jc.quant_params(lambda w, x: x @ w, jc.Recipe([rule]))(jnp.eye(4), normal(6, 4))
    np.testing.assert_allclose(
        params.learned["arg0"]["activation"]["clip"], [[normal(6, 4).max()]], rtol=1e-7
    )
    f = jc.quantize_aware(lambda w, x: x @ w, jc.Recipe([rule]))
    a = float(normal(6, 4).max())
    want = np.round(np.clip(normal(6, 4), 0, a) * 15 / a) * a / 15
    np.testing.assert_allclose(f(params, normal(6, 4)), want, atol=1e-6)


def test_dorefa():
    for bits in (1, 2, 4):
        n = 2.0**bits - 1
        t = np.tanh(V.astype(np.float64))
        want = 2 * np.round(n * (t / (2 * np.abs(t).max()) + 0.5)) / n - 1
        np.testing.assert_allclose(dorefa_weight(jnp.asarray(V), n), want, atol=1e-6)
        want = np.round(n * np.clip(V, 0, 1)) / n
        np.testing.assert_allclose(dorefa_activation(jnp.asarray(V), n), want, atol=1e-6)
    got = jax.grad(lambda w: dorefa_weight(w, 3.0).sum())(jnp.array([0.2, -0.1, 1.0]))
    plain = jax.grad(lambda w: (jnp.tanh(w) / jnp.abs(jnp.tanh(w)).max()).sum())
    np.testing.assert_allclose(got, plain(jnp.array([0.2, -0.1, 1.0])), rtol=1e-6)


def test_dorefa_needs_no_state():
    q = jc.Quantizer("uint2", range="dorefa")
    recipe = jc.Recipe([jc.Rule("*", weight=q, activation=q)])
    w, x = normal(4, 8), normal(6, 4, seed=1)
    got = jax.jit(jc.quantize_aware(lambda w, x: x @ w, recipe))(w, x)
    np.testing.assert_allclose(got, dorefa_activation(x, 3.0) @ dorefa_weight(w, 3.0), atol=1e-5)
