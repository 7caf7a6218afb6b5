# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST: a small conv net learns from a wide one, by its logits and by its features.

    python examples/distill_fashion.py

The files are those of Debian's package `dataset-fashion-mnist`; the variable FMNIST_DIR says where
else they lie. The teacher learns from all images, its students from the first 4,000.
"""

import gzip
import os
import pathlib

import jax
import numpy as np
import optax

import jaxcompress as jc

STEPS, FEW = 400, 4000


def read(part):
    """Images as float32[n, 28, 28, 1], labels as int32[n]."""
    folder = pathlib.Path(os.environ.get("FMNIST_DIR", "/usr/share/datasets/fashion-mnist"))
    paths = [folder / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    if not all(path.is_file() for path in paths):
        raise FileNotFoundError(
            f"Fashion-MNIST is not in {folder}. Get it with `apt-get install "
            "dataset-fashion-mnist`, or set FMNIST_DIR to a folder with its four .gz files."
        )
    images, labels = (np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8) for path in paths)
    return images[16:].reshape(-1, 28, 28, 1).astype("float32") / 255, labels[8:].astype("int32")


def init(key, width):
    shapes = {"a": (3, 3, 1, width), "b": (3, 3, width, 2 * width), "c": (98 * width, 10)}
    keys = jax.random.split(key, 3)
    return {
        name: jax.random.normal(k, s) * (2 / np.prod(s[:-1])) ** 0.5
        for k, (name, s) in zip(keys, shapes.items())
    }


def model(params, x):
    for name in "ab":  # each halves the image
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, params[name], (2, 2), "SAME", dimension_numbers=dims)
        x = jax.nn.relu(x)
    return x.reshape(len(x), -1) @ params["c"]


def labels_alone(params, batch, teacher_params=None):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(params, x), y).mean(), {}


def fit(loss, params, data, teacher=None):
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))

    @jax.jit
    def step(params, opt, batch, teacher):
        f = jax.value_and_grad(loss, has_aux=True)
        _, g = f(params, batch, teacher_params=teacher)
        updates, opt = tx.update(g, opt, params)
        return optax.apply_updates(params, updates), opt

    opt, rng = tx.init(params), np.random.default_rng(0)
    for _ in range(STEPS):
        rows = rng.integers(0, len(data[0]), 128)
        params, opt = step(params, opt, (data[0][rows], data[1][rows]), teacher)
    return params


def main():
    train, test = read("train"), read("t10k")
    few = (train[0][:FEW], train[1][:FEW])
    teacher = fit(labels_alone, init(jax.random.key(1), 32), train)
    kl = jc.distill.kl(temperature=4.0)
    # where the image of the second convolution is large; its channels may differ in number
    attention = jc.distill.match("b", "b", jc.distill.attention_transfer(), weight=1000.0)
    losses = {
        "labels": labels_alone,
        "logits": jc.distill.loss_fn(model, model, kl, hard_labels=True),
        "and features": jc.distill.loss_fn(model, model, kl, hard_labels=True, match=attention),
    }
    rows = {"(teacher)": teacher}
    for name, loss in losses.items():
        rows[name] = fit(loss, init(jax.random.key(0), 4), few, teacher)
    print(f"{'student':<14}{'test accuracy':>14}")
    for name, params in rows.items():
        right = [
            (model(params, test[0][i : i + 1000]).argmax(-1) == test[1][i : i + 1000]).sum()
            for i in range(0, len(test[0]), 1000)
        ]
        print(f"{name:<14}{100 * float(sum(right)) / len(test[0]):>13.1f}%")


if __name__ == "__main__":
    main()
