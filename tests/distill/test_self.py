# SPDX-License-Identifier: Apache-2.0
"""Averaged students, students that teach each other, and GKD's choice of sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from twins import draw

import jaxcompress as jc
from jaxcompress import distill

X = draw(0, 6, 3)
Y = jnp.arange(6) % 4
W = [draw(i, 3, 4) for i in (1, 2, 3)]


def f(w, x):
    return x @ w


def test_ema_is_the_recursion():
    tx = optax.chain(optax.sgd(0.1), distill.ema(0.8))
    w, mean, state = W[0], W[0], tx.init(W[0])
    assert optax.tree_utils.tree_get(state, "params") is not None
    for i in range(3):
        updates, state = jax.jit(tx.update)(W[1] * i, state, w)
        np.testing.assert_allclose(updates, -0.1 * W[1] * i, rtol=1e-6)
        w = w + updates
        mean = 0.8 * mean + 0.2 * w
    np.testing.assert_allclose(distill.ema_params(state), mean, rtol=1e-6)
    with pytest.raises(jc.JaxCompressError, match="found 0 states of ema"):
        distill.ema_params(optax.sgd(0.1).init(w))


def test_mutual_is_the_sum_of_each_against_constants():
    kl = distill.kl()
    loss = distill.mutual([f, f, f], kl, alpha=0.6)
    (got, _), g = jax.value_and_grad(loss, has_aux=True)(W, (X, Y))
    hard = optax.softmax_cross_entropy_with_integer_labels
    total = 0.0
    for i, w in enumerate(W):

        def own(w, i=i):
            peers = [kl(f(w, X), f(v, X)) for j, v in enumerate(W) if j != i]
            return 0.3 * sum(peers) + 0.4 * hard(f(w, X), Y).mean()

        value, gradient = jax.value_and_grad(own)(w)
        np.testing.assert_allclose(g[i], gradient, rtol=1e-4, atol=1e-6)
        total += value
    np.testing.assert_allclose(got, total, rtol=1e-6)
    with pytest.raises(jc.JaxCompressError, match="1 students; at least two"):
        distill.mutual([f], kl)


def test_on_policy_samples_as_often_as_asked():
    choose = distill.on_policy(lambda key, w, batch: f(w, batch) @ w.T, fraction_sampled=0.3)
    keys = jax.random.split(jax.random.key(0), 2000)
    out = jax.jit(jax.vmap(lambda k: choose(k, W[0], X)))(keys)
    sampled = np.isclose(out, f(W[0], X) @ W[0].T, rtol=1e-4).all((1, 2))
    assert np.isclose(out[~sampled], X).all()
    assert abs(sampled.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 2000)  # four deviations
    g = jax.grad(lambda w: choose(keys[0], w, X).sum())(W[0])
    np.testing.assert_array_equal(g, 0)
