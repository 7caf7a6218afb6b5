# SPDX-License-Identifier: Apache-2.0
"""What holds for every method of `jc.quantize`: a row a method, a test a law."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import default
from twins import draw as normal

import jaxcompress as jc

LAYERS, D, F = 2, 16, 32


def block(x, p):
    h = jax.nn.relu(x @ p["up"] + p["b"])
    return x + h @ p["down"]


def scanned(params, x):
    return jax.lax.scan(lambda x, p: (block(x, p), None), x, params["layers"])[0] @ params["head"]


def listed(params, x):
    for p in params["layers"]:
        x = block(x, p)
    return x @ params["head"]


def normed(params, x):
    """One layer behind the norm of trained statistics, which can be folded into it."""
    p = params["norm"]
    y = (x @ params["w"] - p["mean"]) / jnp.sqrt(p["var"] + 1e-5) * p["scale"] + p["bias"]
    return jax.nn.relu(y) @ params["head"]


STACKED = {
    "layers": {
        "up": normal(1, LAYERS, D, F) / 4,
        "b": normal(2, LAYERS, 1, F) / 4,
        "down": normal(3, LAYERS, F, D) / 6,
    },
    "head": normal(4, D, 8) / 4,
}
LIST = STACKED | {
    "layers": [jax.tree.map(lambda x, i=i: x[i], STACKED["layers"]) for i in range(LAYERS)]
}
NORMED = {
    "w": normal(1, D, F) / 4,
    "norm": {
        "mean": normal(5, 1, F) / 4,
        "var": 1 + normal(6, 1, F) ** 2,
        "scale": 1 + normal(7, 1, F) / 4,
        "bias": normal(8, 1, F),
    },
    "head": normal(4, F, 8) / 4,
}
# Channels of very different sizes, correlated, as activations are.
MIX = normal(9, D, D) / 4 + jnp.eye(D)
BATCHES = [normal(10 + i, 32, D) @ MIX * jnp.exp(normal(20, 1, D)) for i in range(3)]


class Law(typing.NamedTuple):
    """A method, a model on which it has something to do (and the same with a list of layers), and
    how many arrays the sites of the first read."""

    name: str
    models: tuple = ((scanned, STACKED), (listed, LIST))
    weights: int = 3
    settings: dict = {}

    @property
    def method(self):
        return jc.methods.METHODS[self.name](**self.settings)


TABLE = (
    Law("rtn"),
    Law("mse"),
    Law("gptq"),
    Law("sparsegpt", settings={"nm": (2, 4)}),
    Law("awq"),
    Law("smoothquant"),
    Law("equalization"),
    Law("bias_correction"),
    Law("fold_norm", ((normed, NORMED),), 2),
)
SCANNED = [law for law in TABLE if len(law.models) > 1]


def name_of(law):
    return law.name


every_method = pytest.mark.parametrize("law", TABLE, ids=name_of)


def few_methods(laws, *names):
    """For tests that solve once more for each method."""
    return pytest.mark.parametrize("law", default(laws, *names, name=name_of), ids=name_of)


def recipe(bits, size="group:8"):
    return jc.Recipe([jc.Rule("*", jc.Quantizer(f"int{bits}", size))], f"w{bits}")


@functools.cache
def compressed(name, bits=4, model=0):
    (law,) = (law for law in TABLE if law.name == name)
    fn, params = law.models[model]
    return jc.quantize(fn, params, recipe(bits), calibration=BATCHES, method=law.method)


def distance(law, small):
    """Of the results from those of the float function, relative, over all batches."""
    fn, params = law.models[0]
    x = jnp.concatenate(BATCHES)
    want = fn(params, x)
    return float(jnp.linalg.norm(small.fn(small.params, x) - want) / jnp.linalg.norm(want))


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), a, b))


def test_the_table_has_every_method():
    assert {law.name for law in TABLE} == set(jc.methods.METHODS)


@few_methods(TABLE, "gptq")
def test_same_call_same_bits(law):
    fn, params = law.models[0]
    again = jc.quantize(fn, params, recipe(4), calibration=BATCHES, method=law.method)
    assert same(compressed(law.name).params, again.params)


@every_method
def test_every_weight_is_packed_and_counted(law):
    small = compressed(law.name)
    leaves = jax.tree.leaves(small.params, is_leaf=lambda x: isinstance(x, jc.QTensor))
    assert sum(isinstance(x, jc.QTensor) for x in leaves) == law.weights
    assert small.report.bytes_after == jc.nbytes(small.params)


@few_methods(TABLE, "mse", "gptq", "sparsegpt")
def test_more_bits_are_nearer(law):
    half = law.name == "sparsegpt"  # half of the weights are gone with any number of bits
    few, many = (distance(law, compressed(law.name, bits)) for bits in (2 if half else 4, 8))
    assert few > many > 0.05 if half else few > many and many < 0.02


@every_method
def test_jit_and_vmap(law):
    small, x = compressed(law.name), BATCHES[0]
    eager = small.fn(small.params, x)
    np.testing.assert_allclose(jax.jit(small.fn)(small.params, x), eager, rtol=1e-4, atol=1e-4)
    mapped = jax.vmap(lambda x: small.fn(small.params, x))(x.reshape(4, 8, D))
    np.testing.assert_allclose(mapped.reshape(eager.shape), eager, rtol=1e-4, atol=1e-4)


@few_methods(SCANNED, "gptq", "smoothquant")
def test_scanned_layers_are_rounded_as_listed_ones(law):
    """Up to the order of the sums in the statistics, which moves few codes."""
    stacked, one_by_one = (compressed(law.name, model=i).params["layers"] for i in (0, 1))
    for i, layer in enumerate(one_by_one):
        for name in ("up", "down"):
            a, b = stacked[name].dequantize()[i], layer[name].dequantize()
            assert float(jnp.mean(jnp.abs(a - b) > 1e-5)) < 0.02, (i, name)


@pytest.mark.parametrize("bits", default([2, 3], "3"))
@pytest.mark.parametrize("name", ["mse", "gptq", "awq"])
def test_outputs_err_less_than_rounded_to_nearest(name, bits):
    (law,) = (law for law in TABLE if law.name == name)
    assert distance(law, compressed(name, bits)) < distance(law, compressed("rtn", bits))
