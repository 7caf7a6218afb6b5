# SPDX-License-Identifier: Apache-2.0
"""A Flax NNX step, whose model and optimizer change in place, becomes int8-aware in one line.

python examples/train_step_nnx.py
"""

import jax
import optax
from flax import nnx
from sklearn.datasets import load_digits

import jaxcompress as jc

STEPS = 300
ADAM = optax.adam(3e-3)
ACTIVATION = jc.Quantizer("int8", "tensor", range="ema", momentum=0.95)
AVERAGED = jc.Recipe([jc.Rule("*/kernel", "int4", ACTIVATION)])

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32")
train, test = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


@nnx.jit
def train_step(model, optimizer, x, y):
    """The step that was there before."""

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    value, g = nnx.value_and_grad(loss)(model)
    optimizer.update(model, g)
    return value


def forward(model, x):
    return model(x)


def fit(step, model, tx=ADAM):
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for i in range(STEPS):
        rows = jax.random.randint(jax.random.key(i), (128,), 0, len(train[0]))
        step(model, optimizer, train[0][rows], train[1][rows])
    return model


def accuracy(f, model):
    return 100 * float((f(model, test[0]).argmax(-1) == test[1]).mean())


def main():
    print(f"{'recipe':<14}{'test accuracy':>14}")
    model = fit(train_step, MLP(nnx.Rngs(0)))
    print(f"{'float32':<14}{accuracy(forward, model):>13.1f}%")
    for name in ("w8a8", "w4a8-g32"):
        model = fit(jc.quantize_aware(train_step, name), MLP(nnx.Rngs(0)))  # the one line
        print(f"{name:<14}{accuracy(jc.quantize_aware(forward, name), model):>13.1f}%")

    # Ranges that are averaged while it trains are one more parameter of the model.
    model = jc.quant_params(forward, AVERAGED)(MLP(nnx.Rngs(0)), train[0][:256])
    model = fit(jc.quantize_aware(train_step, AVERAGED), model, jc.quant_tx(ADAM))
    print(f"{'int4 x int8':<14}{accuracy(jc.quantize_aware(forward, AVERAGED), model):>13.1f}%")


if __name__ == "__main__":
    main()
