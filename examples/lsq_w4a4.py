# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST in float and with learned step sizes: 4 bits for weights and activations.

    python examples/lsq_w4a4.py

The step is written once and not changed. The files are those of Debian's package
`dataset-fashion-mnist`; the variable FMNIST_DIR says where else they lie.

References: Esser et al. 2020, Learned Step Size Quantization (first and last layer in 8 bits).
"""

import gzip
import os
import pathlib

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.training.train_state import TrainState

import jaxcompress as jc

BATCH, STEPS = 100, 1000
INT4 = jc.Quantizer("int4", "tensor", range="learned")
UINT4 = jc.Quantizer("uint4", "tensor", range="learned")  # what follows a ReLU
ENDS = [jc.Rule(f"{name}/*", "int8", "int8") for name in ("Conv_0", "Dense_1")]
LSQ = jc.Recipe([*ENDS, jc.Rule("*", INT4, UINT4)])


def read(part):
    """Images of mean 0 and variance 1, float32[n, 28, 28, 1], and labels, int32[n]."""
    folder = pathlib.Path(os.environ.get("FMNIST_DIR", "/usr/share/datasets/fashion-mnist"))
    paths = [folder / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    if not all(path.is_file() for path in paths):
        raise FileNotFoundError(
            f"Fashion-MNIST is not in {folder}. Get it with `apt-get install "
            "dataset-fashion-mnist`, or set FMNIST_DIR to a folder with its four .gz files."
        )
    images, labels = (np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8) for path in paths)
    images = images[16:].reshape(-1, 28, 28, 1).astype("float32")
    return (images / 255 - 0.286) / 0.353, labels[8:].astype("int32")


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (16, 32, 64):
            x = nn.relu(nn.Conv(features, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def forward(params, x):
    return CNN().apply({"params": params}, x)


@jax.jit
def train_step(state, x, y):
    def loss(params):
        logits = forward(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def fit(step, params, tx, images, labels):
    state = TrainState.create(apply_fn=forward, params=params, tx=tx)
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        rows = rng.integers(0, len(images), BATCH)
        state = step(state, images[rows], labels[rows])
    return state.params


def main():
    train, (images, labels) = read("train"), read("t10k")
    start = CNN().init(jax.random.key(0), train[0][:1])["params"]
    adam = optax.adam(optax.cosine_decay_schedule(4e-3, STEPS))
    plain = fit(train_step, start, adam, *train)
    held = jc.quant_params(forward, LSQ)(start, train[0][:1000])
    held = fit(jc.quantize_aware(train_step, LSQ), held, jc.quant_tx(adam), *train)

    print(f"{'recipe':<14}{'test accuracy':>14}")
    aware = jc.quantize_aware(forward, LSQ)
    for name, f, params in (("float32", forward, plain), ("lsq-w4a4", aware, held)):
        parts = [jax.jit(f)(params, images[i : i + 1000]) for i in range(0, len(images), 1000)]
        right = np.concatenate(parts).argmax(-1) == labels
        print(f"{name:<14}{100 * right.mean():>13.1f}%")


if __name__ == "__main__":
    main()
