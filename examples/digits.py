# SPDX-License-Identifier: Apache-2.0
"""A small CNN in Flax Linen on scikit-learn's handwritten digits, trained int8-aware.

    jaxcompress compress examples/digits.py --recipe w8a8

1797 images of 8 x 8 pixels in 10 classes; the last 450 of a fixed shuffle are the test set.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxcompress as jc

BATCH, FLOAT_STEPS, STEPS = 64, 600, 200


class CNN(nn.Module):
    """Two convolutions, each halving the image, and two dense layers."""

    @nn.compact
    def __call__(self, x):
        for features in (32, 64):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def load():
    """Images scaled to 0 ... 1 and labels, in a fixed order."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    return (images[order] / 16).astype("float32").reshape(-1, 8, 8, 1), labels[order]


images, labels = load()
train_x, train_y, test_x, test_y = images[:-450], labels[:-450], images[-450:], labels[-450:]
model = CNN()


def loss(params, batch):
    x, y = batch
    logits = model.apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def batches(rng):
    """One epoch, shuffled."""
    order = rng.permutation(len(train_x))
    for i in range(0, len(order) - BATCH + 1, BATCH):
        rows = order[i : i + BATCH]
        yield train_x[rows], train_y[rows]


def evaluate(predict):
    right = jnp.argmax(predict(test_x), axis=-1) == test_y
    return {"accuracy": float(right.mean())}


task = jc.Task(
    "digits",
    apply=model.apply,
    params=lambda key: model.init(key, train_x[:1]),
    calibration=[train_x[:BATCH]],
    evaluate=evaluate,
    train=jc.Train(
        loss,
        batches,
        optimizer=optax.adam(1e-4),
        steps=STEPS,
        float_steps=FLOAT_STEPS,
        float_optimizer=optax.adam(optax.cosine_decay_schedule(3e-3, FLOAT_STEPS)),
    ),
)
