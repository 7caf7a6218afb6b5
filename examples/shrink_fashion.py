# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST: a conv net at a quarter of its FLOPs, its channels chosen, repaired, trained on.

    python examples/shrink_fashion.py

The small net is a function like any other: the same train step works on it, and so does int8. The
files are those of Debian's package `dataset-fashion-mnist`; the variable FMNIST_DIR says where else
they lie.

References: Molchanov et al. 2019 (Taylor scores); Fang et al. 2023 (coupled groups).
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from prune_fashion import read

import jaxcompress as jc

BATCH, STEPS, WIDTHS = 100, 1200, (1, 16, 32, 64)


def init(key):
    params = {}
    for i, (a, b) in enumerate(zip(WIDTHS, WIDTHS[1:])):
        w = (2 / (9 * a)) ** 0.5 * jax.random.normal(jax.random.fold_in(key, i), (3, 3, a, b))
        params[f"conv{i}"] = {"w": w, "b": jnp.zeros((1, 1, 1, b))}
    return params | {"head": jax.random.normal(key, (WIDTHS[-1], 10)) / 8}


def model(params, x):
    x = x.reshape(-1, 28, 28, 1)
    for i in range(len(WIDTHS) - 1):
        p = params[f"conv{i}"]
        x = jax.lax.conv_general_dilated(
            x, p["w"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + p["b"])
    return x.mean((1, 2)) @ params["head"]


def fit(fn, params, data, steps):
    images, labels = data
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    @jax.jit
    def step(params, opt, x, y):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(fn(params, x), y).mean()

        updates, opt = tx.update(jax.grad(loss)(params), opt, params)
        return optax.apply_updates(params, updates), opt

    opt, rng = tx.init(params), np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, len(images), BATCH)
        params, opt = step(params, opt, images[rows], labels[rows])
    return params


def main():
    train, (images, labels) = read("train"), read("t10k")
    batches = [train[0][:1000]]

    def show(name, fn, params):
        right = np.asarray(jax.jit(fn)(params, images)).argmax(-1) == labels
        print(f"{name:<22}{jc.nbytes(params):>9,}{100 * right.mean():>14.1f}%")

    print(f"{'net':<22}{'bytes':>9}{'test accuracy':>15}")
    params = fit(model, init(jax.random.key(0)), train, STEPS)
    show("original", model, params)
    small = jc.prune.shrink(
        model,
        params,
        images[:1],
        keep=jc.prune.budget(flops=0.25),
        importance="obs",
        calibration=batches,
        repair="least_squares",
    )
    show("quarter of the flops", small.fn, small.params)
    tuned = fit(small.fn, small.params, train, STEPS)
    show("and trained on", small.fn, tuned)
    packed = jc.quantize(small.fn, tuned, "w8a8", calibration=batches)
    show("and in int8", packed.fn, packed.params)


if __name__ == "__main__":
    main()
