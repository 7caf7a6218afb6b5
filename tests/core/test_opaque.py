# SPDX-License-Identifier: Apache-2.0
"""Primitives that hide a matmul: reported, and an error where a rule asks for it."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental import pallas as pl
from jax.extend.core import Primitive
from jax.interpreters import mlir

import jaxcompress as jc
from jaxcompress import Recipe, Rule, quantize_aware
from tests.twins import assert_same, normal, token, weight

W, X = normal(4, 4, seed=1) + 3 * jnp.eye(4), normal(6, 4, seed=2)
HEAD = normal(4, 8, seed=3)


def pallas(x, w):
    def kernel(a, b, out):
        out[...] = a[...] @ b[...]

    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pl.pallas_call(kernel, out_shape=out, interpret=True)(x, w)


def linear_solve(x, w):
    solve = lambda matvec, b: jnp.linalg.inv(w) @ b  # noqa: E731
    return lax.custom_linear_solve(
        lambda v: w @ v, x[0], solve, transpose_solve=lambda vecmat, b: jnp.linalg.inv(w).T @ b
    )


def vmapped(x, w):
    @custom_vmap
    def f(x, w):
        return x @ w

    @f.def_vmap
    def _(size, batched, x, w):
        return x @ w, True

    return f(x, w)


def stateful(x, w):
    def body(refs):
        x, w, out = refs
        out[...] = x[...] @ w[...]

    return pl.run_state(body)((x, w, jnp.zeros((x.shape[0], w.shape[1]))))[2]


unknown_p = Primitive("unknown_call")
unknown_p.def_impl(lambda x, w, *, body: x @ w)
unknown_p.def_abstract_eval(lambda x, w, *, body: body.out_avals[0])
mlir.register_lowering(
    unknown_p, mlir.lower_fun(lambda x, w, *, body: x @ w, multiple_results=False)
)


def unknown(x, w):
    return unknown_p.bind(x, w, body=jax.make_jaxpr(jnp.matmul)(x, w))


def inside_jit_and_scan(x, w):
    return jax.jit(lambda x: lax.scan(lambda x, _: (pallas(x, w), None), x, length=2)[0])(x)


HIDERS = {
    "pallas_call": pallas,
    "custom_linear_solve": linear_solve,
    "custom_vmap_call": vmapped,
    "run_state": stateful,
    "unknown_call": unknown,
}


@pytest.fixture(params=HIDERS)
def hidden(request):
    """(name of the primitive, function of (x, w) that hides a matmul)."""
    return request.param, HIDERS[request.param]


def model(f):
    return lambda p, x: f(x, p["w"]) @ p["head"]


PARAMS = {"w": W, "head": HEAD}


def test_a_rule_that_matches_is_an_error(hidden):
    name, f = hidden
    with pytest.raises(jc.SiteError) as error:
        quantize_aware(model(f), "w8a8")(PARAMS, X)
    text = str(error.value)
    assert f"`{name}#0`" in text and "`w`" in text  # which, and of what parameter
    assert "test_opaque.py:" in text  # where
    assert way_out(text).leaves_alone


def way_out(message: str) -> Rule:
    """The rule that an error message proposes."""
    return Rule(re.search(r'Rule\("([^"]+)", None\)', message)[1], None)


def test_the_way_out_works(hidden):
    _, f = hidden
    with pytest.raises(jc.SiteError) as error:
        quantize_aware(model(f), "w8a8")(PARAMS, X)
    recipe = Recipe([way_out(str(error.value)), Rule("*", "int8", "int8")])
    twin = lambda p, x: token(f(x, p["w"])) @ weight(p["head"])  # noqa: E731
    assert_same(jax.jit(quantize_aware(model(f), recipe))(PARAMS, X), jax.jit(twin)(PARAMS, X))


def test_a_rule_by_the_name_of_the_primitive(hidden):
    name, f = hidden
    recipe = Recipe([Rule(name, None), Rule("*", "int8", "int8")])
    twin = lambda p, x: token(f(x, p["w"])) @ weight(p["head"])  # noqa: E731
    assert_same(jax.jit(quantize_aware(model(f), recipe))(PARAMS, X), jax.jit(twin)(PARAMS, X))


def test_no_error_without_a_parameter(hidden):
    _, f = hidden
    plain = lambda p, x: f(x, W) @ p["head"]  # noqa: E731
    twin = lambda p, x: token(f(x, W)) @ weight(p["head"])  # noqa: E731
    assert_same(jax.jit(quantize_aware(plain, "w8a8"))(PARAMS, X), jax.jit(twin)(PARAMS, X))


def test_no_error_with_an_empty_recipe(hidden):
    _, f = hidden
    got = jax.jit(quantize_aware(model(f), Recipe([])))(PARAMS, X)
    assert_same(got, jax.jit(model(f))(PARAMS, X))


def test_sites_lists_it(hidden):
    name, f = hidden
    sites = jc.sites(model(f))(PARAMS, X)
    opaque = [s for s in sites if s.opaque]
    assert [s.op for s in opaque] == [name]
    assert "w" in [o.path for o in opaque[0].operands]
    assert "test_opaque.py" in opaque[0].source
    assert [s.name for s in sites if not s.opaque] == ["head"]


def test_below_jit_and_scan():
    with pytest.raises(jc.SiteError, match="pallas_call"):
        quantize_aware(model(inside_jit_and_scan), "w8a8")(PARAMS, X)


def test_without_a_matmul_nothing_is_hidden():
    def f(p, x):
        def kernel(a, out):
            out[...] = a[...] * 2

        x = pl.pallas_call(
            kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True
        )(x)
        return x @ p["head"]

    assert [s.name for s in jc.sites(f)(PARAMS, X)] == ["head"]
    twin = lambda p, x: token(x * 2) @ weight(p["head"])  # noqa: E731
    assert_same(jax.jit(quantize_aware(f, "w8a8"))(PARAMS, X), jax.jit(twin)(PARAMS, X))


def test_solve_of_parameters_alone_is_no_error():
    f = lambda p, x: x @ jnp.linalg.solve(p["w"], p["head"])  # noqa: E731
    twin = lambda p, x: token(x) @ weight(jnp.linalg.solve(p["w"], p["head"]))  # noqa: E731
    assert_same(jax.jit(quantize_aware(f, "w8a8"))(PARAMS, X), jax.jit(twin)(PARAMS, X))
