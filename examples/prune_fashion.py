# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST with zeros: gradual magnitude, RigL, and 2:4 with int8 in one train step.

    python examples/prune_fashion.py

The step is written once; what differs is the last link of the optimizer. The files are those of
Debian's package `dataset-fashion-mnist`; the variable FMNIST_DIR says where else they lie.

References: Zhu and Gupta 2017; Evci et al. 2020; Mishra et al. 2021.
"""

import gzip
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc

BATCH, STEPS = 100, 1500
SIZES = (784, 300, 100, 10)


def read(part):
    """Images of mean 0 and variance 1, float32[n, 784], and labels, int32[n]."""
    folder = pathlib.Path(os.environ.get("FMNIST_DIR", "/usr/share/datasets/fashion-mnist"))
    paths = [folder / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    if not all(path.is_file() for path in paths):
        raise FileNotFoundError(
            f"Fashion-MNIST is not in {folder}. Get it with `apt-get install "
            "dataset-fashion-mnist`, or set FMNIST_DIR to a folder with its four .gz files."
        )
    images, labels = (np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8) for path in paths)
    return (images[16:].reshape(-1, 784) / np.float32(255) - 0.286) / 0.353, labels[8:].astype(
        "int32"
    )


def init(key):
    keys, pairs = jax.random.split(key, 3), zip(SIZES, SIZES[1:])
    shapes = [(k, a, b) for k, (a, b) in zip(keys, pairs)]
    return [
        {"w": (2 / a) ** 0.5 * jax.random.normal(k, (a, b)), "b": jnp.zeros((1, b))}
        for k, a, b in shapes
    ]


def model(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def make_step(tx):
    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model(params, x), y).mean()

    def step(params, opt, x, y):
        updates, opt = tx.update(jax.grad(loss)(params, x, y), opt, params)
        return optax.apply_updates(params, updates), opt

    return step


def fit(pruners, recipe, images, labels):
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))
    tx = jc.prune.chain(tx, *pruners) if pruners else tx
    step = make_step(tx)
    step = jax.jit(jc.quantize_aware(step, recipe) if recipe else step)
    params, rng = init(jax.random.key(0)), np.random.default_rng(0)
    opt = tx.init(params)
    for _ in range(STEPS):
        rows = rng.integers(0, len(images), BATCH)
        params, opt = step(params, opt, images[rows], labels[rows])
    return params


def main():
    train, (images, labels) = read("train"), read("t10k")
    last = STEPS * 3 // 4
    cubic = jc.prune.cubic(0.0, 0.9, STEPS // 10, last)
    runs = {
        "dense": ((), None),
        "magnitude 90 %": ((jc.prune.magnitude(cubic, every=20, pattern="*/w"),), None),
        "RigL 90 %": ((jc.prune.rigl(0.9, every=20, end=last, pattern="*/w"),), None),
        "2:4 and int8": ((jc.prune.nm(2, 4, end=last, pattern="*/w"),), "w8a8"),
    }
    print(f"{'weights':<16}{'zeros':>7}{'test accuracy':>15}")
    for name, (pruners, recipe) in runs.items():
        params = fit(pruners, recipe, *train)
        predict = jc.quantize_aware(model, recipe) if recipe else model
        right = np.asarray(jax.jit(predict)(params, images)).argmax(-1) == labels
        zeros = 100 * jc.prune.sparsity([layer["w"] for layer in params])
        print(f"{name:<16}{zeros:>6.1f}%{100 * right.mean():>14.1f}%")


if __name__ == "__main__":
    main()
