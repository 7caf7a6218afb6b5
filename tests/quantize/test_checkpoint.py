# SPDX-License-Identifier: Apache-2.0
"""Training that is saved by Orbax and resumed, here or in a new process, has the same bits."""

import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxcompress as jc

BEFORE, AFTER = 3, 3  # steps
ACTIVATION = jc.Quantizer("int8", "tensor", range="ema", momentum=0.9)
RECIPES = {
    "lsq": jc.recipes.get("lsq-w4a4"),
    "ema": jc.Recipe([jc.Rule("*", "int8", ACTIVATION)]),
}
OPTIMIZER = jc.quant_tx(optax.adamw(1e-2))


def batch(i):
    return jnp.float32(np.random.default_rng(i).standard_normal((8, 4)) * (1 + i))


def linen(recipe, seed):
    """(a train state, function of it and of the number of a step)."""
    model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(4)])

    def loss(params, x):
        return jnp.mean(model.apply({"params": params}, x) ** 2)

    @jax.jit
    def train_step(state, x):
        return state.apply_gradients(grads=jax.grad(loss)(state.params, x))

    weights = model.init(jax.random.key(seed), batch(0))["params"]
    params = jc.quant_params(loss, recipe)(weights, batch(seed))
    step = jc.quantize_aware(train_step, recipe)
    start = TrainState.create(apply_fn=model.apply, params=params, tx=OPTIMIZER)
    return start, lambda state, i: step(state, batch(i))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.b(jnp.tanh(self.a(x)))


def mutating(recipe, seed):
    """(state of a model and its optimizer, function of it and of the number of a step)."""

    @nnx.jit
    def train_step(model, optimizer, x):
        g = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, g)

    start = jc.quant_params(lambda model, x: model(x), recipe)(Net(nnx.Rngs(seed)), batch(seed))
    objects = start, nnx.Optimizer(start, OPTIMIZER, wrt=nnx.Param)
    step = jc.quantize_aware(train_step, recipe)

    def advance(state, i):
        nnx.update(objects, state)
        step(*objects, batch(i))
        return nnx.state(objects)

    return nnx.state(objects), advance


KINDS = {"linen": linen, "nnx": mutating}


def train(state, advance, first, n):
    for i in range(first, first + n):
        state = advance(state, i)
    return state


def bits(state):
    return [np.asarray(x).copy() for x in jax.tree.leaves(state)]


def save(folder, state, api):
    if api == "standard":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "standard", state)
        return
    with ocp.CheckpointManager(folder / "manager") as manager:
        manager.save(BEFORE, args=ocp.args.StandardSave(state))


def restore(folder, like, api):
    """A saved state in the structure of `like`, of which only shapes are used."""
    abstract = jax.eval_shape(lambda: like)
    if api == "standard":
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder / "standard", abstract)
    with ocp.CheckpointManager(folder / "manager") as manager:
        return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(abstract))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of all checkpoints, bits without interruption) after training of each kind."""
    folder, want = tmp_path_factory.mktemp("checkpoints"), {}
    for kind, make in KINDS.items():
        for name, recipe in RECIPES.items():
            state, advance = make(recipe, seed=0)
            state = train(state, advance, 0, BEFORE)
            for api in ("standard", "manager"):
                save(folder / kind / name, state, api)
            middle = bits(state)
            want[kind, name] = bits(train(state, advance, BEFORE, AFTER))
            assert any(np.any(a != b) for a, b in zip(middle, want[kind, name], strict=True))
    return folder, want


@pytest.mark.cover
@pytest.mark.parametrize("api", ["standard", "manager"])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_in_the_same_process(trained, kind, name, api):
    folder, want = trained
    like, advance = KINDS[kind](RECIPES[name], seed=1)  # other weights and ranges
    state = restore(folder / kind / name, like, api)
    assert jax.tree.structure(state) == jax.tree.structure(like)
    got = bits(train(state, advance, BEFORE, AFTER))
    for a, b in zip(got, want[kind, name], strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.slow
def test_resumed_in_a_new_process(trained):
    folder, want = trained
    run = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for (kind, name), expected in want.items():
        with np.load(folder / f"{kind}-{name}.npz") as got:
            assert len(got) == len(expected)
            for i, value in enumerate(expected):
                np.testing.assert_array_equal(got[f"arr_{i}"], value)


def main(folder):
    for kind, make in KINDS.items():
        for name, recipe in RECIPES.items():
            like, advance = make(recipe, seed=2)
            state = restore(folder / kind / name, like, "standard")
            np.savez(folder / f"{kind}-{name}.npz", *bits(train(state, advance, BEFORE, AFTER)))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
