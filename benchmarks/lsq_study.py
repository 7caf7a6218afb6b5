# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST: learned step sizes against absmax at 2 bits, LSQ at 4, and int8 gradients.

A conv net is trained from the same weights on the same batches in every configuration; each
finished run is a line of `benchmarks/logs/lsq_study.jsonl`, and what is there is not run again.
The first and the last layer of the 2- and 4-bit nets have 8 bits, in all of them. Differences are
paired by seed; the 95 % intervals are those of Student's t.

Usage: python benchmarks/lsq_study.py [--only float,lsq2] [--seeds 5] [--rates 0.001,0.003]

The rates of Adam were chosen with `--rates`, which scores 10,000 other training images instead of
the test set (`"split": "validation"` in the log). FMNIST_DIR says where the images lie.

Esser et al. 2020, Learned Step Size Quantization (there from trained weights, here from none).
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
from jax import lax
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parent.parent))
from study import finished, print_differences

import jaxcompress as jc

LOG = Path(__file__).parent / "logs" / "lsq_study.jsonl"
TRAIN, EPOCHS, BATCH = 20_000, 8, 100
# The best of 1, 2, 4 and 8e-3 on the validation images; of absmax2 of 1, 2 and 4e-3.
RATE, RATES = 4e-3, {"absmax2": 1e-3}
KEYS = ("config", "seed", "rate", "split", "epochs")


def read(part):
    """Images as float32[n, 28, 28, 1] of mean 0 and variance 1, labels as int32[n]."""
    folder = Path(os.environ.get("FMNIST_DIR", "/usr/share/datasets/fashion-mnist"))
    paths = [folder / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    images, labels = (np.frombuffer(gzip.decompress(p.read_bytes()), np.uint8) for p in paths)
    images = (images[16:].reshape(-1, 28, 28, 1).astype("float32") / 255 - 0.286) / 0.353
    return images, labels[8:].astype("int32")


SHAPES = {
    "first": (3, 3, 1, 16),
    "conv1": (3, 3, 16, 32),
    "conv2": (3, 3, 32, 64),
    "dense": (1024, 128),
    "last": (128, 10),
}


def init(key):
    """He's initialization; biases are zero."""
    params = {}
    for one, (name, shape) in zip(jax.random.split(key, len(SHAPES)), SHAPES.items()):
        scale = (2 / np.prod(shape[:-1])) ** 0.5
        params[name] = {"w": scale * jax.random.normal(one, shape), "b": jnp.zeros(shape[-1])}
    return params


def model(params, x):
    for name in ("first", "conv1", "conv2"):  # each halves the image
        dims = ("NHWC", "HWIO", "NHWC")
        w = params[name]["w"]
        x = lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=dims)
        x = jax.nn.relu(x + params[name]["b"].reshape(1, 1, 1, -1))
    x = x.reshape(len(x), -1)
    x = jax.nn.relu(x @ params["dense"]["w"] + params["dense"]["b"].reshape(1, -1))
    return x @ params["last"]["w"] + params["last"]["b"].reshape(1, -1)


def loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(params, x), y).mean()


def low(bits, range):
    """Weights and activations per tensor; activations are those behind a ReLU, thus unsigned."""
    weight = jc.Quantizer(f"int{bits}", "tensor", range=range)
    activation = jc.Quantizer(f"uint{bits}", "tensor", range=range)
    ends = [jc.Rule(f"{name}/w", "int8", "int8") for name in ("first", "last")]
    return jc.Recipe([*ends, jc.Rule("*", weight, activation)])


def int8(rounding=None):
    gradient = {}
    if rounding:
        gradient = {"gradient": jc.Quantizer("int8", "token", rounding=rounding)}
    return jc.Recipe([jc.Rule("*", "int8", "int8", **gradient)])


# name: (what it says, how its recipe is made, whether the step takes random keys)
CONFIGS = {
    "float": ("float32", lambda: None, False),
    "absmax2": ("absmax, 2 bits", lambda: low(2, "absmax"), False),
    "lsq2": ("LSQ, 2 bits", lambda: low(2, "learned"), False),
    "lsq4": ("LSQ, 4 bits", lambda: low(4, "learned"), False),
    "int8": ("int8, float backward", int8, False),
    "int8-nearest": ("int8, int8 backward, nearest", lambda: int8("half_even"), False),
    "int8-stochastic": ("int8, int8 backward, stochastic", lambda: int8("stochastic"), True),
}
# (better or equal, than, what is aimed at)
COMPARISONS = (
    ("lsq2", "absmax2", "interval above 0"),
    ("lsq4", "float", "above -1"),
    ("int8", "float", "reported"),
    ("int8-stochastic", "int8", "above -0.5"),
    ("int8-nearest", "int8", "reported"),
    ("int8-stochastic", "int8-nearest", "reported"),
)


def train_step(tx):
    def step(params, opt, x, y):
        value, g = jax.value_and_grad(loss)(params, x, y)
        updates, opt = tx.update(g, opt, params)
        return optax.apply_updates(params, updates), opt, value

    return step


def run(config, seed, rate, data, advance):
    """Trains once; accuracy in percent, last mean loss, seconds."""
    (train_x, train_y), (test_x, test_y) = data
    _, make, keyed = CONFIGS[config]
    recipe, start = make(), time.perf_counter()
    params = init(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    tx = optax.adam(optax.cosine_decay_schedule(rate, EPOCHS * (TRAIN // BATCH)))
    step, forward = train_step(tx), model
    if recipe is not None:
        tx = jc.quant_tx(tx)
        step, forward = (jc.quantize_aware(f, recipe) for f in (train_step(tx), model))
        params = jc.quant_params(model, recipe)(params, train_x[:1000])
    step, forward = jax.jit(step), jax.jit(forward)
    opt, values = tx.init(params), []
    for epoch in range(EPOCHS):
        order = rng.permutation(TRAIN).reshape(-1, BATCH)
        values = []
        for i, rows in enumerate(order):
            key = jax.random.fold_in(jax.random.key(seed), epoch * len(order) + i)
            extra = {"quantize_key": key} if keyed else {}
            params, opt, value = step(params, opt, train_x[rows], train_y[rows], **extra)
            values.append(value)
            advance()
    right = [
        jnp.sum(jnp.argmax(forward(params, test_x[i : i + 1000]), -1) == test_y[i : i + 1000])
        for i in range(0, len(test_x), 1000)
    ]
    return {
        "accuracy": 100 * int(sum(right)) / len(test_x),
        "loss": round(float(np.mean(values)), 5),
        "seconds": round(time.perf_counter() - start, 1),
    }


def summary(rows):
    """Prints accuracies, and paired differences with their intervals."""
    of = {config: {r["seed"]: r for r in rows if r["config"] == config} for config in CONFIGS}
    print(f"{'configuration':<34}{'seeds':>6}{'accuracy':>10}{'lowest':>8}{'highest':>9}{'s':>6}")
    for config, (title, _, _) in CONFIGS.items():
        if found := [r["accuracy"] for r in of[config].values()]:
            seconds = np.median([r["seconds"] for r in of[config].values()])
            ends = f"{min(found):>8.2f}{max(found):>9.2f}{seconds:>6.0f}"
            print(f"{title:<34}{len(found):>6}{np.mean(found):>10.2f}{ends}")
    titles = {config: c[0] for config, c in CONFIGS.items()}
    print_differences(of, titles, COMPARISONS, 50)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(CONFIGS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", help="try these on the validation images")
    args = parser.parse_args()
    split = "validation" if args.rates else "test"
    done = {tuple(row[k] for k in KEYS) for row in finished(LOG)}
    seeds, only = range(args.seeds), args.only.split(",")

    def rates(config):
        return [float(r) for r in (args.rates or str(RATES.get(config, RATE))).split(",")]

    plan = [(c, s, r, split, EPOCHS) for s in seeds for c in only for r in rates(c)]
    plan = [key for key in plan if key not in done]
    if plan:
        images, labels = read("train")
        other = (images[-10_000:], labels[-10_000:]) if args.rates else read("t10k")
        data = jax.tree.map(jnp.asarray, ((images[:TRAIN], labels[:TRAIN]), other))
    steps = EPOCHS * (TRAIN // BATCH)
    with Progress() as progress:
        bar = progress.add_task("", total=len(plan) * steps)
        for key in plan:
            config, seed, rate = key[:3]
            progress.update(bar, description=f"{config}, seed {seed}")
            found = run(config, seed, rate, data, functools.partial(progress.advance, bar))
            with LOG.open("a") as log:
                print(json.dumps(dict(zip(KEYS, key)) | found), file=log, flush=True)
    rows = [r for r in finished(LOG) if r["split"] == split and r["epochs"] == EPOCHS]
    print(f"{split}, {EPOCHS} epochs of {TRAIN} images, batches of {BATCH}")
    if not args.rates:
        return summary([r for r in rows if r["rate"] == RATES.get(r["config"], RATE)])
    for rate in sorted({r["rate"] for r in rows}):
        print(f"\nrate {rate}")
        summary([r for r in rows if r["rate"] == rate])


if __name__ == "__main__":
    main()
