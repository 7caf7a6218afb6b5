# SPDX-License-Identifier: Apache-2.0
"""Masks with quantization: both orders of the transforms, whole steps, `jc.quant_tx`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxcompress as jc
from jaxcompress import prune

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def mlp(p, x):
    return jnp.tanh(x @ p["up"] + p["b"]) @ p["down"]


def tied(p, x):
    return (jnp.tanh(x @ p["up"] + p["b"]) @ p["up"].T) @ p["down"][:4]


def scanned(p, x):
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["stack"])[0] + p["b"][0, 0]


def conv(p, x):
    y = lax.conv(x.reshape(2, 1, 4, 4), p["kernel"], (1, 1), "SAME")
    return y.reshape(2, -1) + p["b"][0, 0]


PARAMS = {
    "up": normal(4, 8),
    "down": normal(8, 4),
    "stack": normal(3, 4, 4),
    "kernel": normal(2, 1, 3, 3),
    "b": normal(1, 8),
}
MASKS = {k: jnp.asarray(RNG.random(v.shape) < 0.5) for k, v in PARAMS.items()} | {"b": True}
CASES = {"mlp": (mlp, 8), "tied": (tied, 8), "scanned": (scanned, 8), "conv": (conv, 8)}
DATA = {"mlp": normal(8, 4), "tied": normal(8, 4), "scanned": normal(8, 4), "conv": normal(2, 16)}
zeroed = {k: jnp.where(MASKS[k], v, 0) for k, v in PARAMS.items()}


@pytest.mark.cover
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("recipe", [None, "w8a8", "ternary"])
def test_both_orders_are_the_function_of_zeroed_weights(name, recipe):
    fn, x = CASES[name][0], DATA[name]
    aware = (lambda f: jc.quantize_aware(f, recipe)) if recipe else lambda f: f
    want, pull = jax.vjp(lambda p: aware(fn)(p, x), zeroed)
    back = pull(jnp.ones_like(want))[0]
    inside, outside = aware(prune.masked(fn, MASKS)), prune.masked(aware(fn), MASKS)
    for f in (inside, outside, jax.jit(inside)):
        got, pull = jax.vjp(lambda p, f=f: f(p, x), PARAMS)
        np.testing.assert_allclose(got, want, atol=1e-6)
        grads = pull(jnp.ones_like(got))[0]
        for k, g in grads.items():
            mask = np.broadcast_to(MASKS[k], g.shape)
            np.testing.assert_allclose(g, np.where(mask, back[k], 0), atol=1e-5)


def test_masked_weights_keep_their_names_and_sites():
    names = [s.name for s in jc.sites(prune.masked(tied, MASKS))(PARAMS, DATA["tied"])]
    assert names == [s.name for s in jc.sites(tied)(PARAMS, DATA["tied"])]
    assert names == ["up", "up#1", "down"]


def test_argument_by_name_and_position():
    f = lambda x, *, p: mlp(p, x)  # noqa: E731
    want = mlp(zeroed, DATA["mlp"])
    np.testing.assert_array_equal(prune.masked(f, MASKS, argnums="p")(DATA["mlp"], p=PARAMS), want)
    g = lambda x, p: mlp(p, x)  # noqa: E731
    for n in (1, -1):
        np.testing.assert_array_equal(prune.masked(g, MASKS, argnums=n)(DATA["mlp"], PARAMS), want)
    with pytest.raises(jc.JaxCompressError, match="argnums=2 names no argument"):
        prune.masked(g, MASKS, argnums=2)(DATA["mlp"], PARAMS)


def step_of(tx, fn):
    def step(params, opt, x):
        value, g = jax.value_and_grad(lambda p: jnp.mean(fn(p, x) ** 2))(params)
        updates, opt = tx.update(g, opt, params)
        return optax.apply_updates(params, updates), opt, value

    return step


@pytest.mark.parametrize("order", ["pruner inside", "chain of jc.prune"])
def test_two_of_four_and_int8_in_one_step(order):
    chain = prune.chain if order == "chain of jc.prune" else optax.chain
    tx = chain(optax.adam(1e-2), prune.nm(2, 4, pattern=["up", "down"]))
    params = {k: PARAMS[k] for k in ("up", "down", "b")}
    step = jax.jit(jc.quantize_aware(step_of(tx, mlp), "w8a8"))
    opt, values = tx.init(params), []
    for _ in range(20):
        params, opt, value = step(params, opt, DATA["mlp"])
        values.append(float(value))
    assert values[-1] < values[1]
    for k in ("up", "down"):
        w = np.asarray(params[k]).reshape(-1, 4, params[k].shape[1])
        assert ((w != 0).sum(1) == 2).all()
        assert ((np.asarray(prune.masks(opt)[k]) != 0) == (np.asarray(params[k]) != 0)).all()
        # The grid of int8 has a zero: what is stored is zero where the weight is.
        stored = jc.Quantizer("int8").quantize(params[k], axis=0)
        assert not np.asarray(stored.codes)[np.asarray(params[k]) == 0].any()


def test_pruner_inside_quant_tx_prunes_weights_and_no_step_size():
    fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]  # noqa: E731
    params = {k: PARAMS[k] for k in ("up", "down")}
    tx = jc.quant_tx(prune.chain(optax.adam(1e-2), prune.rigl(0.5, every=2, drop=0.5)))
    held = jc.quant_params(fn, "lsq-w4a4")(params, DATA["mlp"])
    step = jax.jit(jc.quantize_aware(step_of(tx, fn), "lsq-w4a4"))
    opt = tx.init(held)
    assert jax.tree.structure(prune.masks(opt)) == jax.tree.structure(params)
    for _ in range(5):
        held, opt, _ = step(held, opt, DATA["mlp"])
    for k, mask in prune.masks(opt).items():
        assert not np.asarray(held.weights[k])[~np.asarray(mask)].any()
        assert int(mask.sum()) == 16
    assert all((np.asarray(s) != 0).all() for s in jax.tree.leaves(held.learned))
    predict = prune.masked(jc.quantize_aware(fn, "lsq-w4a4"), prune.masks(opt))
    want = jc.quantize_aware(fn, "lsq-w4a4")(held, DATA["mlp"])
    np.testing.assert_array_equal(predict(held, DATA["mlp"]), want)
