# SPDX-License-Identifier: Apache-2.0
"""An existing train step becomes int4-aware with learned step sizes (LSQ), in one line.

    python examples/train_step_plain.py

The step is not changed; where it held `params` it holds a `jc.QuantParams`.
"""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import jaxcompress as jc

STEPS = 300

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32")
train, test = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def model(params, x):
    return jax.nn.relu(x @ params["up"] + params["bias"]) @ params["down"]


def loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(params, x), y).mean()


def step_with(tx):
    """The step that was there before."""

    @jax.jit
    def step(params, opt, x, y):
        value, g = jax.value_and_grad(loss)(params, x, y)
        updates, opt = tx.update(g, opt, params)
        return optax.apply_updates(params, updates), opt, value

    return step


def fit(step, params, opt):
    for i in range(STEPS):
        rows = jax.random.randint(jax.random.key(i), (128,), 0, len(train[0]))
        params, opt, _ = step(params, opt, train[0][rows], train[1][rows])
    return params


def accuracy(f, params):
    return 100 * float((f(params, test[0]).argmax(-1) == test[1]).mean())


def main():
    up, down = jax.random.split(jax.random.key(0))
    start = {
        "up": jax.random.normal(up, (64, 64)) / 8,
        "bias": jnp.zeros((1, 64)),
        "down": jax.random.normal(down, (64, 10)) / 8,
    }
    adam = optax.adam(3e-3)
    print(f"{'recipe':<14}{'test accuracy':>14}")
    plain = fit(step_with(adam), start, adam.init(start))
    print(f"{'float32':<14}{accuracy(model, plain):>13.1f}%")

    for name in ("w8a8", "lsq-w4a4"):
        tx = jc.quant_tx(adam)
        params = jc.quant_params(model, name)(start, train[0][:256])
        step = jc.quantize_aware(step_with(tx), name)  # the one line
        params = fit(step, params, tx.init(params))
        print(f"{name:<14}{accuracy(jc.quantize_aware(model, name), params):>13.1f}%")


if __name__ == "__main__":
    main()
