# SPDX-License-Identifier: Apache-2.0
"""Laws of hard pruners, over {pruners} x {optimizers} x {pytrees}.

After every step: zeros are exact and as many as asked for; the structure, shapes and dtypes of the
state are what they were; one program was compiled; a run that is stored and resumed is the same.

The default run takes a cover in which every two of pruner, optimizer and pytree meet; `-m full`
takes all.
"""

import itertools

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress import prune

# name: (pruner, for each step how many of n weights are kept)
STEPS = 6


def share(schedule):
    return [lambda n, s=s: n - round(s * n) for s in schedule]


PRUNERS = {
    # cubic(0, 0.75, 0, 4) at steps 0, 2, 4; masks change at even steps.
    "magnitude": (
        lambda: prune.magnitude(prune.cubic(0.0, 0.75, 0, 4), every=2),
        share([0, 0, 0.65625, 0.65625, 0.75, 0.75]),
    ),
    "random": (lambda: prune.random(0.5, key=3), share([0.5] * STEPS)),
    # 4:4 at step 0, one less at steps 1 and 3.
    "nm": (lambda: prune.nm(2, 4, end=3), share([0, 0, 0.25, 0.5, 0.5, 0.5])),
    "rigl": (
        lambda: prune.rigl(0.6, every=2, end=6, drop=0.5, distribution="uniform"),
        share([0.6] * STEPS),
    ),
    "set": (
        lambda: prune.set(0.6, every=1, drop=0.5, distribution="uniform"),
        share([0.6] * STEPS),
    ),
}


def with_rate(pruner):
    return optax.inject_hyperparams(
        lambda learning_rate: prune.chain(optax.adam(learning_rate), pruner)
    )(0.1)


OPTIMIZERS = {
    "sgd": lambda p: prune.chain(optax.sgd(0.1), p),
    "momentum": lambda p: prune.chain(optax.sgd(0.1, momentum=0.9, nesterov=True), p),
    "adam": lambda p: prune.chain(optax.adam(0.1), p),
    "adamw": lambda p: prune.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1), p),
    "lion": lambda p: prune.chain(optax.lion(0.01), p),
    "rmsprop": lambda p: prune.chain(optax.rmsprop(0.1), p),
    "adafactor": lambda p: prune.chain(optax.adafactor(0.1, min_dim_size_to_factor=4), p),
    "muon": lambda p: prune.chain(optax.contrib.muon(0.1), p),
    "MultiSteps": lambda p: optax.MultiSteps(prune.chain(optax.adam(0.1), p), 2),
    "inject_hyperparams": with_rate,
}


def normal(i, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(i).normal(size=shape), dtype)


def model():
    rngs = nnx.Rngs(0)
    return nnx.state(nnx.Sequential(nnx.Linear(8, 4, rngs=rngs), nnx.Linear(4, 6, rngs=rngs)))


TREES = {
    "dict": lambda: {"a": {"w": normal(0, 8, 4), "b": normal(1, 4)}, "c": normal(2, 4, 6)},
    "list": lambda: [normal(0, 8, 4), [normal(1, 4), normal(2, 4, 6)]],
    "nnx": model,
    "scalars": lambda: {
        "w": normal(0, 4, 8),
        "t": jnp.float32(2.0),
        "n": None,
        "m": normal(1, 8, 3),
    },
    "bfloat16": lambda: {"w": normal(0, 8, 4, dtype=jnp.bfloat16), "b": normal(1, 4)},
}
ALL = list(itertools.product(PRUNERS, OPTIMIZERS, TREES))
NAMES = [list(x) for x in (PRUNERS, OPTIMIZERS, TREES)]
# Any two of the three numbers (i + j) mod 5, i, j take all their values together.
COVER = {(NAMES[0][(i + j) % 5], NAMES[1][i], NAMES[2][j]) for i in range(10) for j in range(5)}


def test_cover_has_every_pair():
    for a, b in ((0, 1), (0, 2), (1, 2)):
        pairs = {(case[a], case[b]) for case in COVER}
        assert pairs == set(itertools.product(NAMES[a], NAMES[b]))


CASES = [
    pytest.param(*case, id="-".join(case), marks=() if case in COVER else pytest.mark.full)
    for case in ALL
]


def gradients(params, step):
    """As of a loss, dense and other ones at each step."""
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), params)


def shapes(tree):
    leaves, structure = jax.tree.flatten(tree)
    return [(x.shape, x.dtype, x.weak_type) for x in leaves], structure


@pytest.mark.parametrize(("pruner", "optimizer", "tree"), CASES)
def test_laws(pruner, optimizer, tree):
    make, kept = PRUNERS[pruner]
    tx = OPTIMIZERS[optimizer](make())
    params = TREES[tree]()
    often, traces = 2 if optimizer == "MultiSteps" else 1, []

    @jax.jit
    def step(params, opt, grads):
        traces.append(grads)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt

    # What a run starts with is what it goes on with: no scalar of Python, no weak type.
    opt = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), tx.init(params))
    held, stored = shapes((params, opt)), None
    before = jax.tree.map(np.asarray, prune.masks(opt))
    for i in range(STEPS * often):
        params, opt = step(params, opt, gradients(params, i))
        assert shapes((params, opt)) == held
        if i + 1 == 3 * often:
            stored = jax.tree.map(np.asarray, (params, opt))
        if (i + 1) % often:
            continue
        masks = jax.tree.map(np.asarray, prune.masks(opt))
        assert jax.tree.structure(masks) == jax.tree.structure(params)
        for x, mask in zip(map(np.asarray, jax.tree.leaves(params)), jax.tree.leaves(masks)):
            assert np.isfinite(x.astype("float32")).all()
            if x.ndim < 2:
                assert mask.shape == () and mask and (x != 0).all()
                continue
            assert mask.dtype == bool and mask.shape == x.shape
            assert int(mask.sum()) == kept[i // often](x.size)
            assert not x[~mask].any()
        if pruner in ("magnitude", "random", "nm"):  # what is zero stays zero
            grew = jax.tree.map(lambda new, old: bool((new & ~old).any()), masks, before)
            assert not any(jax.tree.leaves(grew))
        before = masks
    assert len(traces) == 1
    for x, start in zip(jax.tree.leaves(params), jax.tree.leaves(TREES[tree]())):
        assert (np.asarray(x) != np.asarray(start)).any()

    again, state = jax.tree.map(jnp.asarray, stored)
    for i in range(3 * often, STEPS * often):
        again, state = step(again, state, gradients(params, i))
    for a, b in zip(jax.tree.leaves((again, state)), jax.tree.leaves((params, opt))):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert jc.nbytes(state) > 0
