# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST: gradual against one-shot pruning, RigL against SET and static masks, ERK.

A perceptron with 300 and 100 hidden units is trained from the same weights on the same batches in
every configuration; each finished run is a line of `benchmarks/logs/prune_study.jsonl`, and what
is there is not run again. Differences are paired by seed; the 95 % intervals are those of
Student's t.

Usage: python benchmarks/prune_study.py [--only cubic90,rigl95] [--seeds 5]

FMNIST_DIR says where the images lie.

Zhu and Gupta 2017; Mocanu et al. 2018; Evci et al. 2020, who use this network for MNIST.
"""

import argparse
import functools
import gzip
import json
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parent.parent))
from study import finished, print_differences

import jaxcompress as jc

LOG = Path(__file__).parent / "logs" / "prune_study.jsonl"
TRAIN, EPOCHS, BATCH, RATE = 20_000, 8, 100, 2e-3
STEPS = EPOCHS * TRAIN // BATCH
BEGIN, END, EVERY = STEPS // 10, STEPS * 3 // 4, 20
SIZES = (784, 300, 100, 10)


def read(part):
    """Images as float32[n, 784] of mean 0 and variance 1, labels as int32[n]."""
    folder = Path(os.environ.get("FMNIST_DIR", "/usr/share/datasets/fashion-mnist"))
    paths = [folder / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    images, labels = (np.frombuffer(gzip.decompress(p.read_bytes()), np.uint8) for p in paths)
    images = (images[16:].reshape(-1, 784).astype("float32") / 255 - 0.286) / 0.353
    return images, labels[8:].astype("int32")


def init(key):
    """He's initialization; biases are zero."""
    params = {}
    for i, (a, b) in enumerate(zip(SIZES, SIZES[1:])):
        w = (2 / a) ** 0.5 * jax.random.normal(jax.random.fold_in(key, i), (a, b))
        params[f"dense{i}"] = {"w": w, "b": jnp.zeros((1, b))}
    return params


def model(params, x):
    for i in range(len(SIZES) - 1):
        x = (jax.nn.relu(x) if i else x) @ params[f"dense{i}"]["w"] + params[f"dense{i}"]["b"]
    return x


def loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(params, x), y).mean()


def gradual(sparsity, distribution="uniform"):
    schedule = jc.prune.cubic(0.0, sparsity, BEGIN, END)
    return lambda seed: jc.prune.magnitude(
        schedule, distribution=distribution, every=EVERY, pattern="*/w"
    )


def moving(pruner, sparsity, distribution="erk"):
    return lambda seed: pruner(
        sparsity, key=seed, distribution=distribution, every=EVERY, end=END, pattern="*/w"
    )


def static(sparsity, distribution="erk"):
    return lambda seed: jc.prune.random(
        sparsity, key=seed, distribution=distribution, pattern="*/w"
    )


def soft(make):
    """Weights that are read as pruned while they train: (loss -> soft loss)."""
    return lambda fn: make(fn, (1, 4), pattern="*/w")


# name: (what it says, soft loss of a loss)
SOFT = {
    "ste14": ("STE, 1:4", soft(jc.prune.ste)),
    "srste14": ("SR-STE, 1:4", soft(jc.prune.sr_ste)),
}
# name: (what it says, seed -> pruner)
CONFIGS = {
    "dense": ("dense", None),
    "oneshot90": (
        "one-shot, 90 %",
        lambda seed: jc.prune.magnitude(jc.prune.one_shot(0.9, END), every=EVERY, pattern="*/w"),
    ),
    "cubic90": ("cubic, 90 %", gradual(0.9)),
    "static95": ("static, ERK, 95 %", static(0.95)),
    "static95-uniform": ("static, uniform, 95 %", static(0.95, "uniform")),
    "set95": ("SET, ERK, 95 %", moving(jc.prune.set, 0.95)),
    "rigl95": ("RigL, ERK, 95 %", moving(jc.prune.rigl, 0.95)),
    "rigl95-uniform": ("RigL, uniform, 95 %", moving(jc.prune.rigl, 0.95, "uniform")),
    "cubic95": ("cubic, 95 %", gradual(0.95)),
    "cubic95-erk": ("cubic, ERK, 95 %", gradual(0.95, "erk")),
} | {name: (title, None) for name, (title, _) in SOFT.items()}
# (better, than, what is aimed at)
COMPARISONS = (
    ("cubic90", "oneshot90", "above 0"),
    ("rigl95", "static95", "above 0"),
    ("rigl95", "rigl95-uniform", "above 0"),
    ("static95", "static95-uniform", "above 0"),
    ("cubic95-erk", "cubic95", "above 0"),
    ("rigl95", "set95", "reported"),
    ("cubic95-erk", "rigl95", "reported"),
    ("cubic90", "dense", "reported"),
    ("srste14", "ste14", "reported"),
)


def run(config, seed, data, advance):
    """Trains once; accuracy in percent, sparsity, last mean loss, seconds."""
    (train_x, train_y), (test_x, test_y) = data
    make, start, cpu = CONFIGS[config][1], time.perf_counter(), time.process_time()
    params = init(jax.random.key(seed))
    tx = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))
    if make is not None:
        tx = jc.prune.chain(tx, make(seed))

    own = SOFT[config][1](loss) if config in SOFT else loss

    def step(carry, rows):
        params, opt = carry
        value, g = jax.value_and_grad(own)(params, train_x[rows], train_y[rows])
        updates, opt = tx.update(g, opt, params)
        return (optax.apply_updates(params, updates), opt), value

    @jax.jit
    def epoch(params, opt, order):
        return jax.lax.scan(step, (params, opt), order)

    opt, values, rng = tx.init(params), np.zeros(1), np.random.default_rng(seed)
    if make is not None:  # sparse from the first step where the pruner is
        params = jc.prune.apply_masks(params, jc.prune.masks(opt))
    for _ in range(EPOCHS):
        order = rng.permutation(TRAIN).reshape(-1, BATCH)
        (params, opt), values = epoch(params, opt, order)
        jax.block_until_ready(values)
        advance(len(order))
    if config in SOFT:
        params, _ = own.harden(params)
    right = jnp.sum(jnp.argmax(jax.jit(model)(params, test_x), -1) == test_y)
    weights = {name: layer["w"] for name, layer in params.items()}
    return {
        "accuracy": 100 * int(right) / len(test_x),
        "sparsity": round(float(jc.prune.sparsity(weights)), 5),
        "loss": round(float(np.mean(values)), 5),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


def summary(rows):
    """Prints accuracies, and paired differences with their intervals."""
    of = {config: {r["seed"]: r for r in rows if r["config"] == config} for config in CONFIGS}
    print(f"{'configuration':<22}{'seeds':>6}{'sparsity':>10}{'accuracy':>10}{'lowest':>8}{'s':>6}")
    for config, (title, _) in CONFIGS.items():
        if found := list(of[config].values()):
            accuracy = [r["accuracy"] for r in found]
            middle = [np.median([r[k] for r in found]) for k in ("sparsity", "seconds")]
            print(
                f"{title:<22}{len(found):>6}{middle[0]:>10.4f}{np.mean(accuracy):>10.2f}"
                f"{min(accuracy):>8.2f}{middle[1]:>6.0f}"
            )
    titles = {config: c[0] for config, c in CONFIGS.items()}
    print_differences(of, titles, COMPARISONS, 44)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(CONFIGS))
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    done = {(row["config"], row["seed"]) for row in finished(LOG) if row["epochs"] == EPOCHS}
    plan = [(c, s) for s in range(args.seeds) for c in args.only.split(",")]
    plan = [key for key in plan if key not in done]
    if plan:
        images, labels = read("train")
        data = jax.tree.map(jnp.asarray, ((images[:TRAIN], labels[:TRAIN]), read("t10k")))
    with Progress() as progress:
        bar = progress.add_task("", total=len(plan) * STEPS)
        for config, seed in plan:
            progress.update(bar, description=f"{config}, seed {seed}")
            found = run(config, seed, data, functools.partial(progress.advance, bar))
            with LOG.open("a") as log:
                row = {"config": config, "seed": seed, "epochs": EPOCHS} | found
                print(json.dumps(row), file=log, flush=True)
    print(f"{EPOCHS} epochs of {TRAIN} images, batches of {BATCH}, Adam {RATE}")
    summary([r for r in finished(LOG) if r["epochs"] == EPOCHS])


if __name__ == "__main__":
    main()
