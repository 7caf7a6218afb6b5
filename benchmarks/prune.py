# SPDX-License-Identifier: Apache-2.0
"""What pruning costs: a mask in the train step, masks without sorting.

1. A train step of a perceptron with `optax.chain(adam, pruner)` against the same step without it.
2. The mask of 2 of every 4 weights against sorting the groups, as masks are usually made.
3. RigL's update of one layer, dropping and growing, against two rankings by argsort, each a sort
   of a sort.

Masks of both ways are compared. All variants take turns (A B A B) in one process, two calls each of
which the second counts; ratios are of medians of the time that the process has had of its
processors.

Usage: python benchmarks/prune.py [--rounds 15] [--size 2048]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parent.parent))
import jaxcompress as jc
from jaxcompress._solvers import select


def ratio(title, variants, args, rounds, bound):
    """Prints the median seconds of two compiled functions in turns, and their ratio."""
    times = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, fn in variants.items():
            jax.block_until_ready(fn(*args[name]))  # memory that the other one gave back
            start = time.process_time()
            jax.block_until_ready(fn(*args[name]))
            times[name].append(time.process_time() - start)
    (plain, a), (ours, b) = ((n, statistics.median(t[1:])) for n, t in times.items())
    print(f"{title}: {plain} -> {ours}")
    print(f"  time {a:.5f} s -> {b:.5f} s, ratio {b / a:.4f} (asked: at most {bound})", flush=True)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def step(rounds):
    sizes = (784, 1024, 1024, 10)
    params = [normal(i, *s) / s[0] ** 0.5 for i, s in enumerate(zip(sizes, sizes[1:]))]
    x, y = normal(8, 512, 784), normal(9, 512, 10)

    def loss(params):
        h = x
        for w in params[:-1]:
            h = jax.nn.relu(h @ w)
        return jnp.mean((h @ params[-1] - y) ** 2)

    def make(tx):
        def run(params, opt):
            g = jax.grad(loss)(params)
            updates, opt = tx.update(g, opt, params)
            return optax.apply_updates(params, updates), opt

        return jax.jit(run)

    adam = optax.adam(1e-3)
    masks = [jax.random.bernoulli(jax.random.key(7), 0.1, w.shape) for w in params]
    variants = {"step": adam, "with fixed masks": optax.chain(adam, jc.prune.fixed(masks))}
    args = {name: (params, tx.init(params)) for name, tx in variants.items()}
    ratio("mask in the step", {n: make(tx) for n, tx in variants.items()}, args, rounds, 1.01)
    variants = {
        "step": adam,
        "with magnitude": optax.chain(adam, jc.prune.magnitude(0.9, every=100)),
    }
    args = {name: (params, tx.init(params)) for name, tx in variants.items()}
    for name, tx in variants.items():  # past the step at which masks are chosen
        args[name] = make(tx)(*args[name])
    ratio("pruner between choices", {n: make(tx) for n, tx in variants.items()}, args, rounds, 1.01)


def two_of_four(size, rounds):
    w = jnp.abs(normal(0, size, size))

    def sort(w):
        groups = jnp.moveaxis(w.reshape(size // 4, 4, size), 1, -1)
        order = jnp.argsort(-groups, axis=-1, stable=True)
        mask = jnp.argsort(order, axis=-1) < 2
        return jnp.moveaxis(mask, -1, 1).reshape(size, size)

    variants = {
        "sorting groups": jax.jit(sort),
        "comparing": jax.jit(lambda w: select.n_of_m(w, 2, 4, 0)),
    }
    assert bool(jnp.all(sort(w) == variants["comparing"](w)))
    ratio(f"2 of 4, {size} x {size}", variants, dict.fromkeys(variants, (w,)), rounds, 0.025)


def rigl(size, rounds):
    w, g = {"w": normal(0, size, size)}, {"w": normal(1, size, size)}
    tx = jc.prune.rigl(0.9, every=1, distribution="uniform")
    state = jax.jit(lambda w, s: tx.update(w, s, w, grads=g)[1])(w, tx.init(w))  # step 0 is none
    mask = jc.prune.masks(state)["w"]
    kept = jc.prune.apply_masks(w, {"w": mask})

    def ours(w, state, g):
        none = jax.tree.map(jnp.zeros_like, w)
        return jc.prune.masks(tx.update(none, state, w, grads=g)[1])["w"]

    def sort(w, mask, g):
        def rank(x):
            return jnp.argsort(jnp.argsort(-x.reshape(-1), stable=True)).reshape(x.shape)

        n = jnp.sum(mask)
        new = jnp.floor(jnp.float32(0.3) * n).astype(jnp.int32)
        held = rank(jnp.where(mask, jnp.abs(w), -1)) < n - new
        return held | (rank(jnp.where(held, -1, jnp.abs(g))) < new)

    variants = {"argsort": jax.jit(sort), "rigl": jax.jit(ours)}
    args = {"argsort": (kept["w"], mask, g["w"]), "rigl": (kept, state, g)}
    a, b = (np.asarray(f(*args[n])) for n, f in variants.items())
    assert (a == b).all() and a.sum() == mask.sum()
    ratio(f"RigL's update, {size} x {size}", variants, args, rounds, 0.05)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rounds", 15), ("size", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.default_backend()}, median of {args.rounds} rounds")
    two_of_four(args.size, args.rounds)
    rigl(args.size, max(3, args.rounds // 3))
    step(3 * args.rounds)


if __name__ == "__main__":
    main()
