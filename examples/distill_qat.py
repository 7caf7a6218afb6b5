# SPDX-License-Identifier: Apache-2.0
"""Weights of 2 bits learn from their float self: quantization-aware distillation, in two lines.

    python examples/distill_qat.py

1797 of scikit-learn's handwritten digits, 8 x 8 pixels; the last 397 are the test set, and the
2-bit network is tuned on 300.
"""

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxcompress as jc

STEPS = 300
RECIPE = jc.Recipe([jc.Rule("*", jc.Quantizer("int2", "channel", range="mse"))])

images, labels = load_digits(return_X_y=True)
images, labels = (images / 16).astype("float32"), labels.astype("int32")
train, test = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def model(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def labels_alone(params, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(params, x), y).mean(), {}


def fit(loss, params, data, rate):
    tx = optax.adam(optax.cosine_decay_schedule(rate, STEPS))

    @jax.jit
    def step(params, opt, batch):
        _, g = jax.value_and_grad(loss, has_aux=True)(params, batch)
        updates, opt = tx.update(g, opt, params)
        return optax.apply_updates(params, updates), opt

    opt, rng = tx.init(params), np.random.default_rng(0)
    for _ in range(STEPS):
        rows = rng.integers(0, len(data[0]), 64)
        params, opt = step(params, opt, (data[0][rows], data[1][rows]))
    return params


def main():
    up, down = jax.random.split(jax.random.key(0))
    start = {
        "up": jax.random.normal(up, (64, 32)) / 8,
        "down": jax.random.normal(down, (32, 10)) / 5,
    }
    teacher = fit(labels_alone, start, train, 3e-3)
    few = (train[0][:300], train[1][:300])

    kl = jc.distill.kl(temperature=2.0)
    distilled = jc.distill.loss_fn(model, lambda x: model(teacher, x), kl, hard_labels=True)
    aware = jc.quantize_aware(model, RECIPE)
    rows = {
        "float32": (model, teacher),
        "2 bits": (aware, teacher),
        "2 bits, QAT": (aware, fit(jc.quantize_aware(labels_alone, RECIPE), teacher, few, 1e-3)),
        "2 bits, QAD": (aware, fit(jc.quantize_aware(distilled, RECIPE), teacher, few, 1e-3)),
    }
    print(f"{'weights':<14}{'test accuracy':>14}")
    for name, (f, params) in rows.items():
        accuracy = 100 * float((f(params, test[0]).argmax(-1) == test[1]).mean())
        print(f"{name:<14}{accuracy:>13.1f}%")


if __name__ == "__main__":
    main()
