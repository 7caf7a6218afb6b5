# SPDX-License-Identifier: Apache-2.0
"""Soft pruners against their formulas in NumPy, what they hand over, and the transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import expit

import jaxcompress as jc
from jaxcompress import prune

RNG = np.random.default_rng(0)
PARAMS = {
    "up": RNG.normal(size=(8, 4)).astype(np.float32),
    "bias": RNG.normal(size=4).astype(np.float32),
    "down": RNG.normal(size=(4, 6)).astype(np.float32),
}
X = RNG.normal(size=(5, 8)).astype(np.float32)
WEIGHTS = ("up", "down")


def loss(p, x):
    return jnp.mean((jnp.tanh(x @ p["up"] + p["bias"][None]) @ p["down"]) ** 2)


def smallest_to_zero(scores, share):
    """Mask of one array; of equal scores the last go."""
    order = sorted(range(scores.size), key=lambda i: (scores.flat[i], -i))
    mask = np.ones(scores.size, bool)
    mask[order[: round(share * scores.size)]] = False
    return mask.reshape(scores.shape)


def two_of_four(w):
    mask = np.zeros(w.shape, bool)
    for i in range(0, w.shape[0], 4):
        for j in range(w.shape[1]):
            best = sorted(range(i, i + 4), key=lambda r: (-abs(w[r, j]), r))[:2]
            mask[best, j] = True
    return mask


def masked(masks):
    return PARAMS | {k: np.where(m, PARAMS[k], 0) for k, m in masks.items()}


def close(got, want, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), got, want)


@pytest.mark.parametrize("how", [0.75, (2, 4)], ids=["unstructured", "2:4"])
@pytest.mark.parametrize("decay", [0.0, 0.3], ids=["ste", "sr_ste"])
def test_straight_through(how, decay):
    """Value and gradient are those at the pruned weights; pruned ones decay too in SR-STE."""
    one = two_of_four if how == (2, 4) else lambda w: smallest_to_zero(abs(w), how)
    masks = {k: one(PARAMS[k]) for k in WEIGHTS}
    soft = prune.sr_ste(loss, how, decay=decay) if decay else prune.ste(loss, how)
    value, g = jax.jit(jax.value_and_grad(soft))(soft.init(PARAMS), X)
    want, dense = jax.value_and_grad(loss)(masked(masks), X)
    for k, mask in masks.items():
        dense[k] += decay * np.where(mask, 0, PARAMS[k])
    close((value, g), (want, dense))
    weights, kept = soft.harden(PARAMS)
    close(weights, masked(masks), atol=0)
    assert all((kept[k] == masks[k]).all() for k in WEIGHTS) and kept["bias"].shape == ()
    if not decay:  # forward mode too
        change = jax.tree.map(np.ones_like, PARAMS)
        along = jax.jvp(lambda p: soft(p, X), (PARAMS,), (change,))[1]
        close(along, sum(np.sum(x) for x in jax.tree.leaves(dense)))


def held_with(soft, scores):
    held = soft.init(PARAMS)
    assert held.scores.keys() == scores.keys()
    assert all(held.scores[k].shape == s.shape for k, s in scores.items())
    return prune.SoftParams(held.weights, scores)


@pytest.mark.parametrize("kind", ["hard", "hard, each array", "soft"])
def test_movement(kind):
    scores = {k: np.round(RNG.normal(size=PARAMS[k].shape), 1).astype(np.float32) for k in WEIGHTS}
    if kind == "soft":
        soft = prune.movement(loss, threshold=0.6)
        masks = {k: expit(s) > 0.6 for k, s in scores.items()}
        start = soft.init(PARAMS)
        close(expit(start.scores["up"]), np.full((8, 4), 0.8))
        everything = np.concatenate([s.ravel() for s in scores.values()])
        close(soft.penalty(held_with(soft, scores)), expit(everything).mean())
    elif kind == "hard":  # ties over two arrays, in the order of the leaves
        soft = prune.movement(loss, prune.cubic(0.0, 0.75, 0, 10))
        whole = smallest_to_zero(np.concatenate([scores[k].ravel() for k in ("down", "up")]), 0.75)
        masks = {"down": whole[:24].reshape(4, 6), "up": whole[24:].reshape(8, 4)}
    else:
        soft = prune.movement(loss, 0.75, distribution="uniform")
        masks = {k: smallest_to_zero(s, 0.75) for k, s in scores.items()}
    held = held_with(soft, scores)
    traces = []

    @jax.jit
    @jax.value_and_grad
    def run(h, i):
        traces.append(i)
        return soft(h, X, prune_step=i)

    value, g = run(held, 12)
    want, dense = jax.value_and_grad(loss)(masked(masks), X)
    own = {k: np.where(masks[k], dense[k], 0) for k in WEIGHTS} | {"bias": dense["bias"]}
    close((value, g.weights), (want, own))
    close(g.scores, {k: dense[k] * PARAMS[k] for k in WEIGHTS})
    close(soft.harden(held, 12)[0], masked(masks), atol=0)
    if kind == "hard":
        assert all(m.all() for m in soft.harden(held, 0)[1].values())
        run(held, 0)
        assert len(traces) == 1
        with pytest.raises(jc.JaxCompressError, match="depends on the step: give prune_step"):
            soft(held, X)


@pytest.mark.parametrize(
    "structure", [prune.unstructured, prune.channels(-1)], ids=["w", "channel"]
)
def test_l0(structure):
    soft = prune.l0(loss, structure=structure, open_share=0.7)
    held = soft.init(PARAMS)
    close(expit(held.scores["up"]), np.full(held.scores["up"].shape, 0.7))
    shapes = dict.fromkeys(("up",), (8, 4) if structure is prune.unstructured else (1, 4))
    shapes["down"] = (4, 6) if structure is prune.unstructured else (1, 6)
    alpha = {k: RNG.normal(size=s).astype(np.float32) * 3 for k, s in shapes.items()}
    held = held_with(soft, alpha)
    # in the end: z without noise
    z = {k: np.clip(expit(a) * 1.2 - 0.1, 0, 1) for k, a in alpha.items()}
    gated = PARAMS | {k: PARAMS[k] * z[k] for k in WEIGHTS}
    close(soft(held, X), loss(gated, X))
    weights, masks = soft.harden(held)
    close(weights, gated)
    for k in WEIGHTS:
        assert (masks[k] == np.broadcast_to(z[k] > 0, PARAMS[k].shape)).all()
    # drawn: gradients of log alpha against finite differences of the formula, the same u
    key = jax.random.key(3)
    drawn = {}
    for i, k in enumerate(("down", "up")):  # the order of the leaves
        u = jax.random.uniform(jax.random.fold_in(key, i), shapes[k], minval=1e-6, maxval=1 - 1e-6)
        drawn[k] = np.float64(u)

    def by_hand(alpha):
        z = {
            k: np.clip(expit((np.log(u) - np.log1p(-u) + alpha[k]) * 1.5) * 1.2 - 0.1, 0, 1)
            for k, u in drawn.items()
        }
        h = np.tanh(X @ (PARAMS["up"] * z["up"]) + PARAMS["bias"])
        return np.mean((h @ (PARAMS["down"] * z["down"])) ** 2)

    value, g = jax.value_and_grad(lambda h: soft(h, X, prune_key=key))(held)
    close(value, by_hand(alpha))
    d = {k: RNG.normal(size=s) for k, s in shapes.items()}
    at = [by_hand({k: a + h * d[k] for k, a in alpha.items()}) for h in (1e-6, -1e-6)]
    slope = sum(np.sum(g.scores[k] * d[k]) for k in WEIGHTS)
    np.testing.assert_allclose(slope, (at[0] - at[1]) / 2e-6, rtol=1e-4, atol=1e-7)
    assert loss(PARAMS, X) != value != soft(held, X, prune_key=jax.random.key(4))


def test_the_penalty_of_l0_is_how_often_gates_are_open():
    soft = prune.l0(lambda p, x: (p["w"] != 0).mean(), pattern="w")
    params = {"w": np.ones((40, 50), np.float32)}
    held = prune.SoftParams(params, {"w": np.linspace(-4, 4, 2000).reshape(40, 50)})
    found = [soft(held, X, prune_key=jax.random.key(i)) for i in range(30)]
    assert abs(np.mean(found) - soft.penalty(held)) < 4 * 0.5 / np.sqrt(2000 * 30)


MAKERS = {
    "ste": lambda f: prune.ste(f, 0.5),
    "sr_ste": lambda f: prune.sr_ste(f, (2, 4)),
    "movement": lambda f: prune.movement(f, prune.cubic(0.0, 0.5, 0, 6)),
    "movement, soft": lambda f: prune.movement(f, threshold=0.5),
    "l0": lambda f: prune.l0(f),
}


@pytest.mark.cover
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("optimizer", [optax.adam(0.05), optax.lion(0.02)], ids=["adam", "lion"])
def test_training_and_what_is_handed_over(name, optimizer):
    """One compilation, stable state; the masks that are handed over stay under `fixed`."""
    soft = MAKERS[name](loss)
    held, traces = jax.tree.map(jnp.asarray, soft.init(PARAMS)), []

    @jax.jit
    def step(held, opt, i, key):
        traces.append(i)
        keys = {"prune_key": key} if name == "l0" else {}

        def total(h):
            return soft(h, X, prune_step=i, **keys) + 0.5 * soft.penalty(h)

        value, g = jax.value_and_grad(total)(held)
        updates, opt = optimizer.update(g, opt, held)
        return optax.apply_updates(held, updates), opt, value

    opt, first, before = optimizer.init(held), None, jax.tree.structure(held)
    for i in range(8):
        held, opt, value = step(held, opt, jnp.int32(i), jax.random.key(0))
        first = value if first is None else first
    assert value < first and len(traces) == 1 and jax.tree.structure(held) == before
    weights, masks = soft.harden(held, 8)
    close(soft(held, X, prune_step=8), loss(weights, X))
    if name in ("ste", "sr_ste", "movement"):
        assert jc.prune.sparsity(masks) == 0.5
    for k in WEIGHTS:
        assert not np.asarray(weights[k])[~np.asarray(masks[k])].any()
    tx = prune.chain(optax.adam(0.1), prune.fixed(masks))
    updates, state = tx.update(jax.grad(loss)(weights, X), tx.init(weights), weights)
    after = optax.apply_updates(weights, updates)
    for k in WEIGHTS:
        assert not np.asarray(after[k])[~np.asarray(masks[k])].any()


@pytest.mark.parametrize("name", ["ste", "movement, soft", "l0"])
def test_with_quantization(name):
    """Around and inside: the quantized function of the pruned weights."""
    fn = lambda p, x: jnp.tanh(x @ p["up"] + p["bias"][None]) @ p["down"]  # noqa: E731
    soft = MAKERS[name](fn)
    held = soft.init(PARAMS)
    if name != "ste":
        scores = {k: RNG.normal(size=PARAMS[k].shape).astype(np.float32) for k in WEIGHTS}
        held = held_with(soft, scores)
    want = jax.jit(jc.quantize_aware(fn, "w8a8"))(soft.harden(held)[0], X)
    inside = MAKERS[name](jc.quantize_aware(fn, "w8a8"))
    for f in (jc.quantize_aware(soft, "w8a8"), inside):
        close(jax.jit(lambda h, x, f=f: f(h, x))(held, X), want)


def test_trees_with_nothing_to_prune_in_some_leaves():
    tree = {"w": jnp.ones((4, 8), jnp.bfloat16), "t": jnp.float32(2.0), "n": None, "i": 3}
    soft = prune.movement(lambda p: p["w"].sum() * p["t"] * p["i"], 0.25)
    held = soft.init(tree)
    assert held.scores["w"].dtype == jnp.float32 and soft(held) == 24 * 2 * 3
    weights, masks = soft.harden(held)
    assert weights["w"].dtype == jnp.bfloat16 and int(masks["w"].sum()) == 24
    assert weights["n"] is None and weights["i"] == 3


WRONG = [
    (lambda: prune.ste(loss, 1.0), "less than 1"),
    (lambda: prune.ste(loss, (3, 2)), r"ste: N:M is \(3, 2\): N of every M"),
    (lambda: prune.sr_ste(loss, 0.5, decay=-1.0), "decay=-1.0"),
    (lambda: prune.movement(loss), "give either sparsity= .* or threshold="),
    (lambda: prune.movement(loss, 0.5, threshold=0.5), "give either"),
    (lambda: prune.movement(loss, threshold=1.0), "between 0 and 1"),
    (lambda: prune.l0(loss, open_share=0.0), "open_share=0.0"),
    (lambda: prune.ste(loss, 0.5, pattern="no")(PARAMS, X), "'no' matches no parameter"),
    (lambda: prune.ste(loss, (2, 3))(PARAMS, X), "groups of 3 do not divide axis -2 of `down`"),
    (lambda: prune.l0(loss, structure=prune.blocks(3, 1)).init(PARAMS), r"units of \[3, 1\]"),
    (lambda: prune.l0(loss)(PARAMS, X), r"l0: the first argument is a dict; .* init\(params\)"),
    (
        lambda: prune.ste(loss, 0.5)(PARAMS, X, prune_key=jax.random.key(0)),
        "ste draws nothing: leave prune_key out",
    ),
    (
        lambda: prune.l0(loss)(prune.SoftParams(PARAMS, {"up": 0}), X),
        r"scores for \['up'\] and weights to prune are \['down', 'up'\]",
    ),
]


@pytest.mark.parametrize("run, message", WRONG, ids=[message[:25] for _, message in WRONG])
def test_errors(run, message):
    with pytest.raises(jc.JaxCompressError, match=message):
        run()
