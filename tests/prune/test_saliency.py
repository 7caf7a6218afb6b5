# SPDX-License-Identifier: Apache-2.0
"""Masks at initialization against finite differences in NumPy, float64."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress import prune

RNG = np.random.default_rng(0)
PARAMS = {"a": RNG.normal(size=(5, 6)), "b": RNG.normal(size=(6,)), "c": RNG.normal(size=(6, 3))}
X, Y = RNG.normal(size=(8, 5)), RNG.normal(size=(8, 3))
FLOAT32 = {k: jnp.float32(v) for k, v in PARAMS.items()}
SHAPES = [(5, 6), (6, 3)]


def forward(p, x, tanh=np.tanh):
    return tanh(x @ p["a"] + p["b"][None]) @ p["c"]


def loss(p, x, y):
    return jnp.mean((forward(p, x, jnp.tanh) - y) ** 2)


def loss_of(w):
    a, c = w[:30].reshape(5, 6), w[30:].reshape(6, 3)
    return np.mean((forward(PARAMS | {"a": a, "c": c}, X) - Y) ** 2)


def gradient(f, w, h=1e-4):
    steps = h * np.eye(w.size)
    return np.array([(f(w + s) - f(w - s)) / (2 * h) for s in steps])


W = np.concatenate([PARAMS["a"].ravel(), PARAMS["c"].ravel()])


def kept(scores, count):
    """The masks of a and c of the largest scores."""
    order = np.sort(scores)[::-1]
    assert order[count - 1] - order[count] > 1e-4 * abs(order[0])  # no toss-up
    mask = scores >= order[count - 1]
    return {"a": mask[:30].reshape(5, 6), "c": mask[30:].reshape(6, 3)}


def assert_masks(found, want):
    assert found["b"].shape == () and bool(found["b"])
    for k in "ac":
        np.testing.assert_array_equal(found[k], want[k])


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_snip(sparsity):
    # The derivative with respect to a factor in front of every weight, which is 1.
    scores = abs(gradient(lambda c: loss_of(c * W), np.ones(48)))
    found = prune.snip(loss, sparsity)(FLOAT32, jnp.float32(X), jnp.float32(Y))
    assert_masks(found, kept(scores, 48 - round(48 * sparsity)))


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_grasp(sparsity):
    # How half the square of the gradient's norm changes with such a factor.
    flow = lambda c: np.sum(gradient(loss_of, c * W) ** 2) / 2  # noqa: E731
    scores = gradient(flow, np.ones(48), 1e-3)
    found = prune.grasp(loss, sparsity)(FLOAT32, jnp.float32(X), jnp.float32(Y))
    assert_masks(found, kept(scores, 48 - round(48 * sparsity)))


@pytest.mark.parametrize(("sparsity", "rounds"), [(0.5, 1), (0.5, 5), (0.8, 10)])
def test_synflow(sparsity, rounds):
    ones = np.ones((8, 5))

    def flow(w):
        p = {"a": w[:30].reshape(5, 6), "c": w[30:].reshape(6, 3), "b": abs(PARAMS["b"])}
        return np.sum((ones @ p["a"] + p["b"]) @ p["c"])

    mask = np.ones(48, bool)
    for k in range(1, rounds + 1):
        w = np.where(mask, abs(W), 0)
        scores = np.where(mask, w * gradient(flow, w), -1)
        count = 48 - round(48 * (1 - (1 - sparsity) ** (k / rounds)))
        mask = np.concatenate([m.ravel() for m in kept(scores, count).values()])
    linear = lambda p, x: forward(p, x, lambda v: v)  # noqa: E731
    found = prune.synflow(linear, sparsity, rounds=rounds)(FLOAT32, jnp.float32(X))
    assert_masks(found, {"a": mask[:30].reshape(5, 6), "c": mask[30:].reshape(6, 3)})


def test_uniform_has_a_count_in_each_array():
    make = prune.snip(loss, 0.5, distribution="uniform")
    found = make(FLOAT32, jnp.float32(X), jnp.float32(Y))
    assert [int(found[k].sum()) for k in "ac"] == [15, 9]


@pytest.mark.parametrize("maker", [prune.snip, prune.grasp])
def test_a_weight_without_gradient_is_an_error(maker):
    params = FLOAT32 | {"unused": jnp.ones((2, 2))}
    with pytest.raises(jc.JaxCompressError, match="no gradient reaches `unused`"):
        maker(loss, 0.5)(params, jnp.float32(X), jnp.float32(Y))
    found = maker(loss, 0.5, exclude="unused")(params, jnp.float32(X), jnp.float32(Y))
    assert found["unused"].shape == ()


def test_fixed_masks_stay():
    masks = prune.snip(loss, 0.5)(FLOAT32, jnp.float32(X), jnp.float32(Y))
    tx = prune.chain(optax.adam(0.1), prune.fixed(masks))
    params, state = FLOAT32, tx.init(FLOAT32)
    for _ in range(3):
        updates, state = tx.update(FLOAT32, state, params)
        params = optax.apply_updates(params, updates)
        for k in "ac":
            np.testing.assert_array_equal(np.asarray(params[k]) != 0, masks[k])
    assert_masks(prune.masks(state), masks)
    with pytest.raises(jc.JaxCompressError, match="fixed: the parameters are"):
        prune.fixed({"a": masks["a"]}).init(FLOAT32)
    with pytest.raises(jc.JaxCompressError, match=r"mask of `a` is \[6\] and the array \[5, 6\]"):
        prune.fixed(masks | {"a": jnp.ones(6, bool)}).init(FLOAT32)


def test_bad_settings():
    with pytest.raises(jc.RecipeError, match="sparsity=1"):
        prune.snip(loss, 1.0)
    with pytest.raises(jc.RecipeError, match="sparsity=-0.5"):
        prune.synflow(loss, -0.5)
    with pytest.raises(jc.RecipeError, match="rounds=0"):
        prune.synflow(loss, 0.5, rounds=0)
