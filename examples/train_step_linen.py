# SPDX-License-Identifier: Apache-2.0
"""A Flax Linen `TrainState` with ranges that are averaged while it trains.

python examples/train_step_linen.py
"""

import flax.linen as nn
import jax
import optax
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import jaxcompress as jc

STEPS = 300
ACTIVATION = jc.Quantizer("int8", "tensor", range="ema", momentum=0.95)
RECIPE = jc.Recipe([jc.Rule("*/kernel", "int4", ACTIVATION)])

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
train, test = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(32)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


model = CNN()


@jax.jit
def train_step(state, x, y):
    """The step that was there before."""

    def loss(params):
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    value, g = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=g), value


def forward(params, x):
    return model.apply({"params": params}, x)


def fit(step, params, tx):
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    for i in range(STEPS):
        rows = jax.random.randint(jax.random.key(i), (128,), 0, len(train[0]))
        state, _ = step(state, train[0][rows], train[1][rows])
    return state.params


def main():
    start = model.init(jax.random.key(0), train[0][:1])["params"]
    adam = optax.adam(3e-3)
    plain = fit(train_step, start, adam)
    params = jc.quant_params(forward, RECIPE)(start, train[0][:256])
    params = fit(jc.quantize_aware(train_step, RECIPE), params, jc.quant_tx(adam))

    print(f"{'recipe':<14}{'test accuracy':>14}")
    for name, f, p in (
        ("float32", forward, plain),
        ("int4 x int8", jc.quantize_aware(forward, RECIPE), params),
    ):
        right = (f(p, test[0]).argmax(-1) == test[1]).mean()
        print(f"{name:<14}{100 * float(right):>13.1f}%")


if __name__ == "__main__":
    main()
