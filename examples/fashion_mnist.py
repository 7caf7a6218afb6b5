# SPDX-License-Identifier: Apache-2.0
"""An MLP-Mixer in Flax NNX on Fashion-MNIST, trained int8-aware.

    jaxcompress compress examples/fashion_mnist.py --recipe w8a8

60,000 + 10,000 images of 28 x 28 pixels in 10 classes, official split. The files are those of
Debian's package `dataset-fashion-mnist`; the variable FMNIST_DIR says where else they lie.

References: Tolstikhin et al. 2021, MLP-Mixer, figure 1 (with ReLU, and patches that overlap).
"""

import gzip
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxcompress as jc

BATCH, FLOAT_STEPS, STEPS = 128, 2400, 200
PATCH, WIDTH, BLOCKS = 7, 128, 2


def read(part):
    """Images as uint8[n, 28, 28] and labels as uint8[n]."""
    folder = pathlib.Path(os.environ.get("FMNIST_DIR", "/usr/share/datasets/fashion-mnist"))
    paths = [folder / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    if not all(path.is_file() for path in paths):
        raise FileNotFoundError(
            f"Fashion-MNIST is not in {folder}. Get it with `apt-get install "
            "dataset-fashion-mnist`, or set FMNIST_DIR to a folder with its four .gz files."
        )
    images, labels = (np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8) for path in paths)
    return images[16:].reshape(-1, 28, 28), labels[8:]


class MLP(nnx.Module):
    def __init__(self, width, hidden, rngs):
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class Block(nnx.Module):
    def __init__(self, tokens, width, rngs):
        self.norm_tokens = nnx.LayerNorm(width, rngs=rngs)
        self.mix_tokens = MLP(tokens, 2 * tokens, rngs)
        self.norm_channels = nnx.LayerNorm(width, rngs=rngs)
        self.mix_channels = MLP(width, 2 * width, rngs)

    def __call__(self, x):
        x = x + self.mix_tokens(self.norm_tokens(x).swapaxes(1, 2)).swapaxes(1, 2)
        return x + self.mix_channels(self.norm_channels(x))


class Mixer(nnx.Module):
    def __init__(self, rngs):
        tokens = (28 // PATCH) ** 2
        size = (2 * PATCH, 2 * PATCH)
        self.stem = nnx.Conv(1, WIDTH, size, strides=PATCH, rngs=rngs)
        self.blocks = nnx.List([Block(tokens, WIDTH, rngs) for _ in range(BLOCKS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, images):
        x = (images.astype(jnp.float32) / 255 - 0.286) / 0.353
        x = self.stem(x[..., None]).reshape(len(x), -1, WIDTH)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


train_x, train_y = read("train")
test_x, test_y = read("t10k")
graph = nnx.graphdef(nnx.eval_shape(lambda: Mixer(nnx.Rngs(0))))


def apply(params, images):
    return nnx.merge(graph, params)(images)


def loss(params, batch):
    images, labels = batch
    logits = apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def batches(rng):
    """One epoch, shuffled."""
    order = rng.permutation(len(train_x))
    for i in range(0, len(order) - BATCH + 1, BATCH):
        yield train_x[order[i : i + BATCH]], train_y[order[i : i + BATCH]].astype("int32")


def evaluate(predict):
    outputs = [predict(test_x[i : i + 1000]) for i in range(0, len(test_x), 1000)]
    return {"accuracy": float((np.argmax(np.concatenate(outputs), axis=-1) == test_y).mean())}


task = jc.Task(
    "fashion_mnist",
    apply=apply,
    params=lambda key: nnx.state(Mixer(nnx.Rngs(key))),
    calibration=[train_x[:BATCH]],
    evaluate=evaluate,
    train=jc.Train(
        loss,
        batches,
        optimizer=optax.adam(2e-5),
        steps=STEPS,
        float_steps=FLOAT_STEPS,
        float_optimizer=optax.adamw(optax.cosine_decay_schedule(4e-3, FLOAT_STEPS)),
    ),
)
