# SPDX-License-Identifier: Apache-2.0
"""`jc.quantize` on models of Linen, NNX and Equinox, and on eight devices."""

import equinox as eqx
import flax.linen as nn
import jax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from twins import default

import jaxcompress as jc
from tests.quantize.test_post_training_methods import MLP, X, distance, mlp
from tests.twins import assert_same

KERNELS = {"a": MLP["a"]["w"], "c": MLP["c"]["w"].T}
BIASES = {"a": MLP["a"]["b"][0], "c": MLP["c"]["b"]}
RECIPE = jc.Recipe([jc.Rule("*", jc.Quantizer("int3", "group:16"))])


def linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, name="c")(nn.relu(nn.Dense(32, name="a")(x)))

    params = {"params": {k: {"kernel": KERNELS[k], "bias": BIASES[k]} for k in "ac"}}
    return Net().apply, params, lambda p, k: p["params"][k]["kernel"]


def of_nnx():
    class Net(nnx.Module):
        def __init__(self):
            self.a = nnx.Linear(16, 32, rngs=nnx.Rngs(0))
            self.c = nnx.Linear(32, 8, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.c(nnx.relu(self.a(x)))

    net = Net()
    net.a.kernel[...], net.c.kernel[...] = KERNELS["a"], KERNELS["c"]
    net.a.bias[...], net.c.bias[...] = BIASES["a"], BIASES["c"]
    graph, state = nnx.split(net)
    return (
        lambda s, x: nnx.merge(graph, s)(x),
        nnx.to_pure_dict(state),
        lambda p, k: p[k]["kernel"],
    )


def equinox():
    keys = jax.random.split(jax.random.key(0))
    net = eqx.nn.Sequential(
        [
            eqx.nn.Linear(16, 32, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Linear(32, 8, key=keys[1]),
        ]
    )
    for i, k in ((0, "a"), (2, "c")):
        where = lambda n, i=i: (n.layers[i].weight, n.layers[i].bias)  # noqa: E731
        net = eqx.tree_at(where, net, (KERNELS[k].T, BIASES[k]))
    params, static = eqx.partition(net, eqx.is_array)

    def fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    return fn, params, lambda p, k: p.layers[{"a": 0, "c": 2}[k]].weight.T


METHOD = ["awq", "gptq"]


@pytest.fixture(scope="module")
def want():
    return jc.quantize(mlp, MLP, RECIPE, calibration=X, method=METHOD)


@pytest.mark.parametrize("build", [linen, of_nnx, equinox])
def test_models_of_libraries_get_the_weights_of_the_plain_function(build, want):
    fn, params, kernel = build()
    small = jc.quantize(fn, params, RECIPE, calibration=X, method=METHOD)
    for name, w in (("a", want.params["a"]["w"]), ("c", want.params["c"]["w"].T)):
        assert distance(kernel(small.params, name).dequantize(), w.dequantize()) < 1e-5
    assert distance(small.fn(small.params, X[0]), want.fn(want.params, X[0])) < 1e-5


EIGHT = {
    "auto, gptq": (AxisType.Auto, "gptq", RECIPE),
    "explicit, gptq": (AxisType.Explicit, "gptq", RECIPE),
    "explicit, awq": (AxisType.Explicit, "awq", RECIPE),
    "auto, smoothquant": (AxisType.Auto, "smoothquant", "w8a8"),
}


@pytest.mark.parametrize("case", default(EIGHT, "explicit, awq"))
def test_eight_devices_give_the_result_of_one(case):
    axis, method, recipe = EIGHT[case]
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis,))
    split = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("d"))) for x in X]
    one = jc.quantize(mlp, MLP, recipe, calibration=X, method=method)
    with jax.set_mesh(mesh):
        everywhere = jax.device_put(MLP, NamedSharding(mesh, PartitionSpec()))
        eight = jc.quantize(mlp, everywhere, recipe, calibration=split, method=method)
        found = jax.device_get(eight.fn(eight.params, split[0]))
    values = lambda p: jax.device_get(jax.tree.map(_values, p, is_leaf=_packed))  # noqa: E731
    assert_same(values(eight.params), values(one.params), 1e-5)
    assert_same(found, jax.device_get(one.fn(one.params, X[0])), 1e-5)


def _packed(x):
    return isinstance(x, jc.QTensor)


def _values(x):
    return x.dequantize() if _packed(x) else x


def test_values_that_are_not_finite_name_their_site():
    """Weights near the largest float: what the solver makes of them overflows."""
    huge = MLP | {"a": MLP["a"] | {"w": MLP["a"]["w"] * 1e38}}
    with pytest.raises(jc.JaxCompressError, match="`a/w`|`c/w`"):
        jc.quantize(mlp, huge, RECIPE, calibration=X, method="gptq")
