# SPDX-License-Identifier: Apache-2.0
"""Pruners as links of a chain: against loops in NumPy, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress import prune

RNG = np.random.default_rng(0)
W = RNG.normal(size=(16, 12)).astype("float32")


def grads(step):
    return {"w": jnp.asarray(np.random.default_rng(step).normal(size=W.shape), jnp.float32)}


def top(scores, count):
    """Mask of the largest by a stable sort."""
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores.ravel(), kind="stable")[:count]] = True
    return mask.reshape(scores.shape)


def test_gradual_magnitude_is_a_loop_in_numpy():
    tx = optax.chain(optax.sgd(0.1), prune.magnitude(prune.cubic(0, 0.8, 2, 8), every=2))
    params = {"w": jnp.asarray(W)}
    state, update = tx.init(params), jax.jit(tx.update)
    w, mask = W.copy(), np.ones(W.shape, bool)
    for step in range(12):
        updates, state = update(grads(step), state, params)
        params = optax.apply_updates(params, updates)
        w = np.where(mask, w - np.float32(0.1) * np.asarray(grads(step)["w"]), 0)
        sparsity = 0 if step < 2 else 0.8 - 0.8 * (1 - min((step - 2) / 6, 1)) ** 3
        if step % 2 == 0:
            mask = top(np.where(mask, abs(w), -1), w.size - round(sparsity * w.size))
            w = np.where(mask, w, 0)
        np.testing.assert_array_equal(prune.masks(state)["w"], mask)
        np.testing.assert_allclose(params["w"], w, atol=1e-6)
    assert mask.sum() == W.size - round(0.8 * W.size)


@pytest.mark.parametrize("end", [None, 12])
def test_rigl_is_a_loop_in_numpy(end):
    tx = prune.chain(optax.sgd(0.1), prune.rigl(0.75, every=3, end=end, drop=0.4))
    params = {"w": jnp.asarray(W)}
    state, update = tx.init(params), jax.jit(tx.update)
    w, mask = W.copy(), np.array(prune.masks(state)["w"])
    assert mask.sum() == 48
    changed = 0
    for step in range(15):
        g = np.asarray(grads(step)["w"])
        updates, state = update(grads(step), state, params)
        params = optax.apply_updates(params, updates)
        w = np.where(mask, w - np.float32(0.1) * g, 0)
        if step % 3 == 0 and step > 0 and (end is None or step < end):
            part = 0.4 if end is None else 0.2 * (1 + np.cos(np.pi * step / end))
            new = int(part * 48)
            kept = top(np.where(mask, abs(w), -1), 48 - new)
            grown = top(np.where(kept, -1, abs(g)), new)
            changed += (grown & ~mask).sum()
            mask = kept | grown
            w = np.where(mask, w, 0)
        np.testing.assert_array_equal(prune.masks(state)["w"], mask)
        np.testing.assert_allclose(params["w"], w, atol=1e-6)
        assert mask.sum() == 48
    assert changed > 10


def test_set_keeps_the_largest_and_lets_others_grow():
    tx = prune.chain(optax.sgd(0.0), prune.set(0.75, every=1, drop=0.5, key=4))
    params = {"w": jnp.asarray(W)}
    state = tx.init(params)
    seen = []
    for step in range(6):
        old = np.asarray(prune.masks(state)["w"])
        updates, state = tx.update(grads(0), state, params)
        params = optax.apply_updates(params, updates)
        new = np.asarray(prune.masks(state)["w"])
        assert new.sum() == 48
        if step:
            values = np.where(old, abs(np.asarray(params["w"])), -1)
            before = np.where(old, abs(W), -1) if step == 1 else values
            assert (new >= top(before, 24)).all()
            seen.append(new & ~old)
    assert all(grown.any() for grown in seen)
    assert not (seen[0] & seen[1] & seen[2] & seen[3]).any()  # other ones at each step


@pytest.mark.parametrize("shape", [(8, 4), (3, 3, 8, 4), (5, 8, 4)])
def test_nm_lies_along_the_axis_of_inputs(shape):
    w = RNG.integers(-3, 4, shape).astype("float32")
    tx = prune.nm(2, 4)
    params = {"w": jnp.asarray(w)}
    _, state = tx.update({"w": jnp.zeros(shape)}, tx.init(params), params)
    groups = np.moveaxis(w, -2, -1).reshape(-1, 4)
    mask = np.stack([top(abs(g), 2) for g in groups])
    found = np.moveaxis(np.asarray(prune.masks(state)["w"]), -2, -1).reshape(-1, 4)
    np.testing.assert_array_equal(found, mask)


def test_ramp_of_nm():
    tx = prune.nm(1, 4, begin=2, end=8)
    params = {"w": jnp.asarray(W)}
    state, update, kept = tx.init(params), jax.jit(tx.update), []
    for _ in range(10):
        _, state = update({"w": jnp.zeros_like(W)}, state, params)
        groups = np.asarray(prune.masks(state)["w"]).reshape(4, 4, 12).sum(1)
        assert (groups == groups[0, 0]).all()
        kept.append(int(groups[0, 0]))
    assert kept == [4, 4, 4, 4, 3, 3, 2, 2, 1, 1]


def test_moments_of_what_grows_are_zero():
    tx = prune.chain(
        optax.clip_by_global_norm(10.0), optax.adam(0.1), prune.rigl(0.75, every=2, drop=0.5)
    )
    params = {"w": jnp.asarray(W), "b": jnp.ones(12)}
    state = tx.init(params)
    for step in range(3):
        old = np.asarray(prune.masks(state)["w"])
        updates, state = tx.update(grads(step) | {"b": jnp.ones(12)}, state, params)
        params = optax.apply_updates(params, updates)
    grown = np.asarray(prune.masks(state)["w"]) & ~old
    adam = state[1][0]
    assert grown.sum() > 5
    for moments in (adam.mu, adam.nu):
        assert not np.asarray(moments["w"])[grown].any()
        assert np.asarray(moments["w"])[~grown].all() and np.asarray(moments["b"]).all()
    assert not np.asarray(params["w"])[grown].any()  # it starts from zero
    updates, _ = tx.update(grads(9) | {"b": jnp.ones(12)}, state, params)
    assert np.asarray(updates["w"])[grown].all()  # and moves from then on


def test_low_precision_updates_leave_exact_zeros():
    cast = optax.stateless(lambda u, p: jax.tree.map(lambda x: x.astype(jnp.bfloat16), u))
    tx = optax.chain(optax.sgd(0.1), cast, prune.magnitude(0.5))
    params = {"w": jnp.asarray(W)}
    updates, state = tx.update(grads(0), tx.init(params), params)
    new = optax.apply_updates(params, updates)["w"]
    assert int((new == 0).sum()) == 96


@pytest.mark.parametrize("name", ["magnitude", "global", "nm", "rigl", "random"])
def test_eight_devices_choose_the_same(name):
    make = {
        "magnitude": lambda: prune.magnitude(0.7),
        "global": lambda: prune.magnitude(0.7, distribution="global"),
        "nm": lambda: prune.nm(2, 4),
        "rigl": lambda: prune.rigl(0.7, every=1, distribution="uniform"),
        "random": lambda: prune.random(0.7),
    }[name]
    tx = prune.chain(optax.adam(0.1), make())
    big = np.random.default_rng(5).normal(size=(64, 128)).astype("float32")
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), P("x", None))

    def run(put):
        params = {"w": put(jnp.asarray(big))}
        state = jax.jit(tx.init)(params)

        @jax.jit
        def step(params, state, g):
            updates, state = tx.update(g, state, params)
            return optax.apply_updates(params, updates), state

        for i in range(3):
            g = np.random.default_rng(i).normal(size=big.shape).astype("float32")
            args = params, state, {"w": put(jnp.asarray(g))}
            if i == 1:
                program = step.lower(*args).compile().as_text()
            params, state = step(*args)
        return params, prune.masks(state)["w"], program

    one, one_mask, _ = run(lambda x: x)
    many, many_mask, program = run(lambda x: jax.device_put(x, sharding))
    np.testing.assert_array_equal(one_mask, many_mask)
    np.testing.assert_array_equal(one["w"], many["w"])
    assert many["w"].sharding.is_equivalent_to(sharding, 2)
    assert "f32[64,128]" not in program  # no device ever holds a whole weight


def step_of(tx):
    params = {"w": jnp.asarray(W)}
    return params, tx.init(params)


def test_rigl_says_what_it_needs():
    params, state = step_of(optax.chain(optax.sgd(0.1), prune.rigl(0.5)))
    tx = optax.chain(optax.sgd(0.1), prune.rigl(0.5))
    with pytest.raises(jc.JaxCompressError, match=r"grads=gradients.*jc.prune.chain.*\"updates\""):
        tx.update(grads(0), state, params)
    tx.update(grads(0), state, params, grads=grads(0))
    tx = optax.chain(optax.sgd(0.1), prune.rigl(0.5, growth="updates"))
    tx.update(grads(0), state, params)


def test_rigl_refuses_gradients_of_a_masked_function():
    tx = prune.chain(optax.sgd(0.1), prune.rigl(0.5))
    params, state = step_of(tx)
    loss = prune.masked(lambda p: jnp.sum(p["w"] ** 3), prune.masks(state))
    with pytest.raises(jc.JaxCompressError, match=r"zero.*not\s+jc.prune.masked\(loss\)"):
        tx.update(jax.grad(loss)(params), state, params)


def test_a_pruner_that_is_not_last_is_found():
    with pytest.raises(jc.RecipeError, match=r"last link must be a pruner.*pruners at \[0\]"):
        prune.chain(prune.magnitude(0.5), optax.sgd(0.1))
    with pytest.raises(jc.RecipeError, match="is none"):
        prune.chain(optax.sgd(0.1))
    tx = optax.chain(optax.sgd(0.1), prune.magnitude(0.5), optax.scale(0.5))
    params, state = step_of(tx)
    with pytest.raises(jc.RecipeError, match="not the last link"):
        prune.masks(state)
    updates, state = tx.update(grads(0), state, params)
    with pytest.raises(jc.RecipeError, match="pruned weights of `w` are not zero"):
        tx.update(grads(1), state, optax.apply_updates(params, updates))


def test_two_pruners_may_end_a_chain():
    params = {"a": jnp.asarray(W), "c": jnp.asarray(W)}
    tx = prune.chain(optax.sgd(0.1), prune.nm(2, 4, pattern="a"), prune.random(0.9, pattern="c"))
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    masks = prune.masks(state)
    assert [int((new[k] == 0).sum()) for k in "ac"] == [96, round(0.9 * 192)]
    assert [int((~masks[k]).sum()) for k in "ac"] == [96, round(0.9 * 192)]


def test_what_a_pruner_needs_is_said():
    tx = prune.magnitude(0.5)
    params, state = step_of(tx)
    with pytest.raises(jc.JaxCompressError, match=r"tx.update\(gradients, state, params\)"):
        tx.update(grads(0), state)
    with pytest.raises(jc.JaxCompressError, match="`w` is to be pruned and gets no update"):
        tx.update({"w": None}, state, params)
    with pytest.raises(jc.JaxCompressError, match="found no state of a pruner"):
        prune.masks(optax.adam(0.1).init(params))
    bad = prune.magnitude(lambda step: 1.5)
    with pytest.raises(jc.RecipeError, match=r"gave the sparsity 1.5"):
        bad.update(grads(0), bad.init(params), params)
