# SPDX-License-Identifier: Apache-2.0
"""Folding: unrolled layers are evaluated once, and nothing that can be computed changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from twins import assert_same, assert_twins, fake, token, weight

import jaxcompress as jc
from jaxcompress._core import fold

LAYERS = 6


def network(linear):
    def fn(params, x):
        for p in params:
            h = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["gain"]
            h = jnp.tanh(linear(h, p["up"]) + p["bias"])
            x = x + linear(h * h - h.mean(), p["down"]) * 0.5
        return x

    return fn


plain = network(jnp.matmul)
twin = network(lambda x, w: token(x) @ weight(w))


@pytest.fixture
def params(key):
    def layer(key):
        a, b, c = jax.random.split(key, 3)
        return {
            "up": jax.random.normal(a, (8, 16)),
            "down": jax.random.normal(b, (16, 8)),
            "bias": jax.random.normal(c, (1, 16)),
            "gain": jnp.ones((1, 8)),
        }

    return [layer(k) for k in jax.random.split(key, LAYERS)]


def blocks_in(fn, *args):
    """Calls of shared blocks in the jaxpr of fn, and how many different ones they call."""
    jaxpr = jax.make_jaxpr(fn)(*args)
    found = []

    def walk(jaxpr):
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            if eqn.params.get("name") == "jaxcompress_block":
                found.append(eqn.params["jaxpr"])
            else:
                for value in eqn.params.values():
                    if hasattr(getattr(value, "jaxpr", value), "eqns"):
                        walk(value)

    walk(jaxpr)
    return len(found), len({id(j) for j in found})


def test_unrolled_layers_call_one_block(params, key):
    x = jax.random.normal(key, (4, 8))
    calls, different = blocks_in(jc.quantize_aware(plain, "w8a8"), params, x)
    assert (calls, different) == (LAYERS, 1)


def test_values_and_gradients_equal_the_twin(params, key):
    # The blocks are compiled with other neighbours than in the twin: XLA fuses in another order.
    x = jax.random.normal(key, (4, 8))
    assert_twins(jc.quantize_aware(plain, "w8a8"), twin, params, x, tolerance=1e-5)


def test_same_bits_as_without_folding(params, key, monkeypatch):
    x = jax.random.normal(key, (4, 8))

    def run():
        f = jax.jit(
            jax.value_and_grad(lambda p: jnp.sum(jc.quantize_aware(plain, "w8a8")(p, x) ** 2))
        )
        return f(params)

    folded = run()
    monkeypatch.setattr(fold, "LEAST", 10**6)
    assert blocks_in(jc.quantize_aware(plain, "w8a8"), params, x)[0] == 0
    assert_same(folded, run(), tolerance=1e-5)


def test_layers_with_another_format_are_not_merged(params, key):
    x = jax.random.normal(key, (4, 8))
    rules = [jc.Rule("2/*", weight="int4"), jc.Rule("*", weight="int8", activation="int8")]

    def mixed(p, x):
        for i, layer in enumerate(p):
            if i == 2:
                x = network(lambda x, w: x @ fake(w, 0, 7.0))([layer], x)
            else:
                x = twin([layer], x)
        return x

    quantized = jc.quantize_aware(plain, jc.Recipe(rules))
    assert blocks_in(quantized, params, x)[0] == LAYERS - 1
    assert_twins(quantized, mixed, params, x, tolerance=1e-5)


def test_tap_sees_every_layer_under_its_own_name(params, key):
    x = jax.random.normal(key, (4, 8))
    _, seen = jc.tap(plain, "*/down")(params, x)
    assert sorted(seen) == [f"{i}/down" for i in range(LAYERS)]
    inputs = []

    def linear(x, w):
        if w.shape[0] == 16:
            inputs.append(x)
        return x @ w

    network(linear)(params, x)
    for i, want in enumerate(inputs):
        np.testing.assert_allclose(seen[f"{i}/down"], want, rtol=1e-5, atol=1e-6)


def test_a_weight_shared_by_all_layers(params, key):
    x = jax.random.normal(key, (4, 8))

    def tied(linear):
        return lambda p, x: network(linear)([p] * LAYERS, x)

    quantized = jc.quantize_aware(tied(jnp.matmul), "w8a8")
    assert blocks_in(quantized, params[0], x)[1] == 1
    want = tied(lambda x, w: token(x) @ weight(w))
    assert_twins(quantized, want, params[0], x, tolerance=1e-5)


def test_results_inside_the_blocks_that_are_read_later(params, key):
    x = jax.random.normal(key, (4, 8))

    def skips(linear):
        def fn(params, x):
            kept = []
            for p in params:
                h = jnp.tanh(linear(x, p["up"]) + p["bias"]) * 0.5 + 0.25
                kept.append(h * h)
                x = x + linear(jnp.cos(h) - h.mean(), p["down"])
            return x, kept[1] + kept[4]  # of two layers only

        return fn

    quantized = jc.quantize_aware(skips(jnp.matmul), "w8a8")
    assert blocks_in(quantized, params, x) == (LAYERS, 1)
    assert_twins(quantized, skips(lambda x, w: token(x) @ weight(w)), params, x, tolerance=1e-5)


def test_a_jitted_layer_is_traced_once(params, key):
    x = jax.random.normal(key, (4, 8))
    layer = jax.jit(lambda p, x: plain([p], x))

    def fn(params, x):
        for p in params:
            x = layer(p, x)
        return x

    jaxpr = jax.make_jaxpr(jc.quantize_aware(fn, "w8a8"))(params, x)
    region = jaxpr.eqns[0].params["jaxpr"]
    calls = [e for e in getattr(region, "jaxpr", region).eqns if e.primitive.name == "jit"]
    assert len(calls) == LAYERS
    assert len({id(getattr(e.params["jaxpr"], "jaxpr", e.params["jaxpr"])) for e in calls}) == 1
    assert_twins(jc.quantize_aware(fn, "w8a8"), twin, params, x, tolerance=1e-5)


def test_repeats_finds_the_period():
    codes = np.array([9, *[1, 2, 3, 4, 5, 6, 7, 8] * 5, 9, *[1, 1, 2, 2, 3, 3, 4, 4, 5] * 3])
    assert fold._repeats(codes, 0, len(codes)) == [(1, 8, 5), (42, 9, 3)]
    assert fold._repeats(np.arange(40), 0, 40) == []


def test_random_keys_stay_different(params, key):
    """Equal equations on different values stay different values."""
    x = jax.random.normal(key, (4, 8))

    def fn(params, x, keys):
        for p, k in zip(params, keys, strict=True):
            noise = jax.random.normal(k, (4, 16))
            x = x + (jnp.tanh(x @ p["up"]) * noise + noise * noise) @ p["down"]
        return x

    def hand(params, x, keys):
        for p, k in zip(params, keys, strict=True):
            noise = jax.random.normal(k, (4, 16))
            h = jnp.tanh(token(x) @ weight(p["up"])) * noise + noise * noise
            x = x + token(h) @ weight(p["down"])
        return x

    keys = list(jax.random.split(key, LAYERS))
    assert_twins(jc.quantize_aware(fn, "w8a8"), hand, params, x, keys, tolerance=1e-4)
