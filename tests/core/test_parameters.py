# SPDX-License-Identifier: Apache-2.0
"""Parameters in every container, of every dtype, and whatever is computed from them.

The twins are written by hand and agree bit for bit, unless stated.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from twins import assert_same, assert_twins, token, weight
from twins import draw as normal

import jaxcompress as jc

SUM = 1e-5  # sums in another order


W1, W2, B = normal(1, 4, 8), normal(2, 8, 4), normal(3, 8)
X = normal(4, 6, 4)


def mlp(w1, b, w2, x, weight=lambda w: w, token=lambda x: x):
    return token(jnp.tanh(token(x) @ weight(w1) + b[None])) @ weight(w2)


def check(f, params, names, x=X, recipe="w8a8", twin=None, tolerance=0.0):
    """`f(params, x, weight, token)` quantized equals itself with the twins, under these names."""
    same = lambda v: v  # noqa: E731
    plain = lambda p, x: f(p, x, same, same)  # noqa: E731
    twin = twin or (lambda p, x: f(p, x, weight, token))
    assert [s.name for s in jc.sites(plain)(params, x)] == names
    assert_twins(jc.quantize_aware(plain, recipe), twin, params, x, tolerance=tolerance)
    report = jc.report(plain, recipe)(params, x)
    assert report.bytes_before == jc.nbytes(params)
    return report


# ---------------------------------------------------------------------- containers


class Pair(NamedTuple):
    kernel: Any
    bias: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    up: Any
    down: Any
    name: str = dataclasses.field(default="block", metadata={"static": True})


@jax.tree_util.register_pytree_node_class
class Keyless:
    """A node that gives no names to its children."""

    def __init__(self, *children):
        self.children = children

    def tree_flatten(self):
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


CONTAINERS = {
    "dict": (
        {"enc": {"l0": {"w": W1, "b": B}}, "dec": {"w": W2}},
        lambda p: (p["enc"]["l0"]["w"], p["enc"]["l0"]["b"], p["dec"]["w"]),
        ["enc/l0/w", "dec/w"],
    ),
    "list": ([W1, [B, W2]], lambda p: (p[0], p[1][0], p[1][1]), ["0", "1/1"]),
    "tuple": (((W1, B), W2), lambda p: (*p[0], p[1]), ["0/0", "1"]),
    "namedtuple": (
        Pair(Pair(W1, B), Pair(W2)),
        lambda p: (p.kernel.kernel, p.kernel.bias, p.bias.kernel),
        ["kernel/kernel", "bias/kernel"],
    ),
    "dataclass": (
        Block(Pair(W1, B), Pair(W2)),
        lambda p: (p.up.kernel, p.up.bias, p.down.kernel),
        ["up/kernel", "down/kernel"],
    ),
    "none": (
        {"a": None, "w1": W1, "x": {"n": None, "b": B}, "w2": W2},
        lambda p: (p["w1"], p["x"]["b"], p["w2"]),
        ["w1", "w2"],
    ),
    "ints": ({0: W1, 7: B, 12: W2}, lambda p: (p[0], p[7], p[12]), ["0", "12"]),
    "tuples": (
        {("a", 0): W1, ("a", 1): B, ("b", 0): W2},
        lambda p: (p["a", 0], p["a", 1], p["b", 0]),
        ["('a', 0)", "('b', 0)"],
    ),
    "spaces": (
        {"first layer": W1, "the bias": B, "last layer": W2},
        lambda p: (p["first layer"], p["the bias"], p["last layer"]),
        ["first layer", "last layer"],
    ),
    "slashes": (
        {"net/~/w1": W1, "net/~/b": B, "w2/": W2},
        lambda p: (p["net/~/w1"], p["net/~/b"], p["w2/"]),
        ["net/~/w1", "w2/"],
    ),
    "equal paths": (
        {"a/b": W1, "a": {"b": W2}, "c": B},
        lambda p: (p["a/b"], p["c"], p["a"]["b"]),
        ["['a/b']", "['a']['b']"],
    ),
    "equal text": (
        {"a": [W1, B], "a/1": W2},
        lambda p: (p["a"][0], p["a"][1], p["a/1"]),
        ["a/0", "['a/1']"],
    ),
    "a number sign": (
        {"w": W1, "w#1": W2, "b": B},
        lambda p: (p["w"], p["b"], p["w#1"]),
        ["w", "['w#1']"],
    ),
    "a plus": (
        {"a": W1, "a+b": W2, "b": B},
        lambda p: (p["a"], p["b"], p["a+b"]),
        ["a", "a+b"],
    ),
    "keyless": (
        Keyless(W1, Keyless(B, W2)),
        lambda p: (p.children[0], *p.children[1].children),
        ["0", "1/1"],
    ),
}


@pytest.mark.parametrize("params, read, names", CONTAINERS.values(), ids=CONTAINERS)
def test_containers(params, read, names):
    def f(p, x, weight, token):
        w1, b, w2 = read(p)
        return mlp(w1, b, w2, x, weight, token)

    report = check(f, params, names)
    assert [r.site for r in report.rows if r.op] == names
    assert len(report.rows) == 3  # and the bias


def test_a_bare_array():
    check(lambda p, x, w, a: a(x) @ w(p), W1, ["arg0"])
    f = lambda x, w: x @ w  # noqa: E731
    assert [s.name for s in jc.sites(f, argnums=1)(X, W1)] == ["arg1"]
    only = jc.Recipe([jc.Rule("arg0", weight="int8")])
    assert_twins(jc.quantize_aware(lambda p, x: x @ p, only), lambda p, x: x @ weight(p), W1, X)


def test_several_arguments_with_colliding_names():
    def f(enc, x, dec, weight=lambda w: w, token=lambda x: x):
        return mlp(enc["w"], enc["b"], dec["w"], x, weight, token)

    args = ({"w": W1, "b": B}, X, {"w": W2})
    want = jax.jit(lambda *args: f(*args, weight, token))(*args)
    for argnums in ((0, 2), (2, 0), [0, -1], ("enc", "dec"), (0, "dec")):
        names = [s.name for s in jc.sites(f, argnums=argnums)(*args)]
        assert names == ["arg0/w", "arg2/w"]
        assert_same(jc.quantize_aware(f, "w8a8", argnums=argnums)(*args), want)
    assert [s.name for s in jc.sites(f, argnums=0)(*args)] == ["w", "dot_general#0"]
    one = jc.quantize_aware(f, jc.Recipe([jc.Rule("arg2/*", weight="int8")]), argnums=(0, 2))
    want = jax.jit(lambda e, x, d: mlp(e["w"], e["b"], weight(d["w"]), x))(*args)
    assert_same(one(*args), want)


def test_argnums_by_position_and_name():
    def f(x, params, *, extra=None, scale=2.0):
        y = mlp(params["w1"], B, params["w2"], x) * scale
        return y if extra is None else y @ extra

    p, e = {"w1": W1, "w2": W2}, normal(5, 4, 4)
    want = jax.jit(lambda p: mlp(p["w1"], B, p["w2"], X, weight, token) * 2.0)(p)
    for argnums in (1, -1, "params", [1], ("params",)):
        q = jc.quantize_aware(f, "w8a8", argnums=argnums)
        assert_same(q(X, p), want)
        if argnums != -1:
            assert_same(q(X, params=p), want)
            assert_same(q(params=p, x=X), want)
    names = [s.name for s in jc.sites(f, argnums=(1, "extra"))(X, p, extra=e)]
    assert names == ["w1", "w2", "argextra"]


# ---------------------------------------------------------------------- libraries


def test_flax_linen():
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(8)(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
            x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
            return nn.Dense(4, name="head")(x)

    net = Net()
    variables = net.init(jax.random.key(0), X, False)

    def eval_twin(v, x):
        p, s = v["params"], v["batch_stats"]["BatchNorm_0"]
        d, n, h = p["Dense_0"], p["BatchNorm_0"], p["head"]
        y = token(x) @ weight(d["kernel"]) + d["bias"][None]
        mul = lax.rsqrt(s["var"] + 1e-5) * n["scale"]
        y = (y - s["mean"][None]) * mul[None] + n["bias"][None]
        return token(jax.nn.relu(y)) @ weight(h["kernel"]) + h["bias"][None]

    q = jc.quantize_aware(lambda v, x: net.apply(v, x, False), "w8a8")
    assert_twins(q, eval_twin, variables, X, tolerance=SUM)  # Linen orders the norm differently
    names = ["params/Dense_0/kernel", "params/head/kernel"]
    sites = jc.sites(net.apply)(variables, X, False)
    assert [s.name for s in sites] == names
    assert [s.scope for s in sites] == ["Net/Dense_0", "Net/head"]

    @jax.jit
    def step(v, x, key):
        def loss(params):
            out, new = net.apply(
                {**v, "params": params}, x, True, mutable=["batch_stats"], rngs={"dropout": key}
            )
            return jnp.mean(out**2), new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(v["params"])
        return value, grads, new

    recipe = jc.Recipe([jc.Rule("Dense_0/kernel", weight="int8", activation="int8")])
    for r in ("w8a8", recipe):
        value, grads, new = jc.quantize_aware(step, r)(variables, X, jax.random.key(1))
        assert np.isfinite(value) and jax.tree.structure(new) == jax.tree.structure(
            {"batch_stats": variables["batch_stats"]}
        )
        assert float(jnp.abs(grads["Dense_0"]["kernel"]).max()) > 0
        assert differs(step(variables, X, jax.random.key(1))[0], value)
    # calls by name, as Linen's users do
    out = jc.quantize_aware(net.apply, "w8a8")(variables, X, train=False)
    assert_same(out, q(variables, X), SUM)


def differs(a, b):
    return any(np.any(np.asarray(x) != y) for x, y in zip(*map(jax.tree.leaves, (a, b))))


def nnx_model():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(4, 8, rngs=rngs)
            self.down = nnx.Linear(8, 4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, deterministic=True)

        def __call__(self, x):
            return self.down(self.drop(nnx.relu(self.up(x))))

    return Net(nnx.Rngs(0))


def nnx_twin(up, down, x):
    y = token(x) @ weight(up["kernel"]) + up["bias"][None]
    return token(jax.nn.relu(y)) @ weight(down["kernel"]) + down["bias"][None]


def test_nnx():
    from flax import nnx

    model = nnx_model()
    graph, state = nnx.split(model)
    pure = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    want = jax.jit(nnx_twin)(pure["up"], pure["down"], X)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(nnx_twin(p["up"], p["down"], X) ** 2)))(pure)

    by_state = lambda s, x: nnx.merge(graph, s)(x)  # noqa: E731
    assert_same(jc.quantize_aware(by_state, "w8a8")(state, X), want)
    names = [s.name for s in jc.sites(by_state)(state, X)]
    assert [n.removesuffix("/value") for n in names] == ["up/kernel", "down/kernel"]
    loss = jc.quantize_aware(lambda s, x: jnp.sum(by_state(s, x) ** 2), "w8a8")
    got = jax.jit(jax.grad(loss))(state, X)
    assert_same(jax.tree.leaves(nnx.to_pure_dict(got)), jax.tree.leaves(grads), SUM)

    # the module itself as the argument
    by_module = lambda m, x: m(x)  # noqa: E731
    assert_same(jc.quantize_aware(by_module, "w8a8")(model, X), want)
    names = [s.name for s in jc.sites(by_module)(model, X)]
    assert [n.removesuffix("/value") for n in names] == ["up/kernel", "down/kernel"]
    rule = jc.Recipe([jc.Rule("up/kernel", weight="int8")])
    jc.quantize_aware(by_module, rule)(model, X)  # `/value` may be left out
    assert jc.report(by_module, "w8a8")(model, X).bytes_before == jc.nbytes(jax.tree.leaves(state))


def test_nnx_train_steps():
    from flax import nnx

    model = nnx_model()
    pure = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    want = jax.jit(jax.grad(lambda p: jnp.sum(nnx_twin(p["up"], p["down"], X) ** 2)))(pure)
    plain = lambda m, x: jnp.sum(m(x) ** 2)  # noqa: E731

    @nnx.jit
    def step(m, x):
        return nnx.value_and_grad(plain)(m, x)[1]

    before = step(model, X)
    got = jc.quantize_aware(step, "w8a8")(model, X)
    assert_same(jax.tree.leaves(nnx.to_pure_dict(got)), jax.tree.leaves(want), SUM)
    assert_same(jax.tree.leaves(step(model, X)), jax.tree.leaves(before))
    inner = nnx.grad(jc.quantize_aware(plain, "w8a8"))(model, X)
    assert_same(jax.tree.leaves(nnx.to_pure_dict(inner)), jax.tree.leaves(want), SUM)


def test_equinox():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, 3, 8, 2, key=jax.random.key(0))

    def plain(m, x):
        return jax.vmap(m)(x)

    def twin(m, x):
        for layer in m.layers[:-1]:
            x = jax.nn.relu(token(x) @ weight(layer.weight, 1).T + layer.bias[None])
        last = m.layers[-1]
        return token(x) @ weight(last.weight, 1).T + last.bias[None]

    q = jc.quantize_aware(plain, "w8a8")
    assert_same(q(model, X), eqx.filter_jit(twin)(model, X), SUM)
    names = [s.name for s in jc.sites(plain)(model, X)]
    assert names == [f"layers/{i}/weight" for i in range(3)]
    loss = lambda f: lambda m, x: jnp.sum(f(m, x) ** 2)  # noqa: E731
    arrays = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_array))  # noqa: E731
    want = arrays(eqx.filter_jit(eqx.filter_grad(loss(twin)))(model, X))
    assert_same(arrays(eqx.filter_jit(eqx.filter_grad(loss(q)))(model, X)), want, SUM)
    step = eqx.filter_jit(lambda m, x: eqx.filter_value_and_grad(loss(plain))(m, x)[1])
    step(model, X)
    assert_same(arrays(jc.quantize_aware(step, "w8a8")(model, X)), want, SUM)
    # a model is what the transform returns too
    out = jc.quantize_aware(lambda m, x: (m, plain(m, x)), "w8a8")(model, X)[0]
    assert jax.tree.structure(out) == jax.tree.structure(model)


# ---------------------------------------------------------------------- dtypes and sizes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("recipe", ["w8a8", "w8a16"])
def test_dtypes(dtype, recipe):
    params = {"w1": W1.astype(dtype), "b": B.astype(dtype), "w2": W2.astype(dtype)}
    x = X.astype(dtype)

    def f(p, x, w, a):
        return mlp(p["w1"], p["b"], p["w2"], x, w, a if recipe == "w8a8" else lambda v: v)

    check(f, params, ["w1", "w2"], x, recipe)
    assert jc.quantize_aware(lambda p, x: x @ p["w1"], recipe)(params, x).dtype == dtype


def test_mixed_dtypes():
    params = {"w1": W1, "b": B, "w2": W2.astype(jnp.float16)}

    def f(p, x, w, a):  # master weights in float32, computed in bfloat16
        h = jnp.tanh(a(x.astype(jnp.bfloat16)) @ w(p["w1"].astype(jnp.bfloat16)))
        return jnp.matmul(a(h), w(p["w2"].astype(jnp.bfloat16)), preferred_element_type=jnp.float32)

    check(f, params, ["w1", "w2"])


def test_integer_and_boolean_leaves():
    params = {"w": W1, "ids": jnp.arange(4), "mask": jnp.arange(8) % 2 == 0, "step": jnp.int32(3)}

    def f(p, x, w, a):
        return a(x[:, p["ids"]]) @ w(p["w"] * p["mask"][None])

    same = lambda v: v  # noqa: E731
    plain = lambda p, x: f(p, x, same, same)  # noqa: E731
    assert [s.name for s in jc.sites(plain)(params, X)] == ["mask+w"]
    want = jax.jit(lambda p, x: f(p, x, weight, token))(params, X)
    assert_same(jc.quantize_aware(plain, "w8a8")(params, X), want)
    grad = lambda f: jax.jit(jax.grad(lambda p, x: jnp.sum(f(p, x) ** 2), allow_int=True))  # noqa
    got = grad(jc.quantize_aware(plain, "w8a8"))(params, X)["w"]
    assert_same(got, grad(lambda p, x: f(p, x, weight, token))(params, X)["w"])
    assert jc.report(plain, "w8a8")(params, X).bytes_before == jc.nbytes(params)


def test_an_integer_matmul_stays():
    params = {"w": W1, "i": jnp.arange(16).reshape(4, 4)}
    f = lambda p, x: (x @ p["w"], jnp.arange(4) @ p["i"])  # noqa: E731
    y, i = jc.quantize_aware(f, "w8a8")(params, X)
    assert_same((y, i), jax.jit(lambda p, x: (token(x) @ weight(p["w"]), f(p, x)[1]))(params, X))


def test_empty_and_scalar_leaves():
    params = {
        "w": W1,
        "scale": jnp.float32(0.5),
        "none": jnp.zeros((0, 8)),
        "wide": jnp.zeros((4, 0)),
    }

    def f(p, x, w, a):
        y = a(x) @ w(p["w"] * p["scale"])
        empty = a(jnp.zeros((6, 0))) @ w(p["none"]) + jnp.zeros((6, 8))
        return y + empty, a(x) @ w(p["wide"])

    def twin(p, x):  # an empty axis has no largest value: nothing to round
        return f(p, x, lambda w: weight(w) if w.size else w, lambda x: token(x) if x.size else x)

    report = check(f, params, ["scale+w", "none", "wide"], twin=twin)
    assert {r.site for r in report.rows} == {"scale+w", "none", "wide"}


def test_numpy_and_python_leaves():
    params = {"w1": np.asarray(W1), "b": np.asarray(B), "w2": np.asarray(W2), "scale": 0.5}

    def f(p, x):
        return mlp(p["w1"] * p["scale"], p["b"], p["w2"], x)

    want = jax.jit(lambda p, x: mlp(p["w1"] * 0.5, p["b"], p["w2"], x, weight, token))(params, X)
    assert_same(jc.quantize_aware(f, "w8a8")(params, X), want)
    assert_same(jc.quantize_aware(f, "w8a8")(params, np.asarray(X)), want)
    assert [s.name for s in jc.sites(f)(params, X)] == ["scale+w1", "w2"]
    jc.report(f, "w8a8")(params, X)
    grad = jax.grad(lambda p: jnp.sum(jc.quantize_aware(f, "w8a8")(p, X) ** 2))(params)
    assert jnp.ndim(grad["scale"]) == 0 and float(grad["scale"]) != 0


# ---------------------------------------------------------------------- computed from parameters

SQUARE = {"w": normal(6, 4, 4), "v": normal(7, 4, 4), "g": normal(8, 4)}


def test_tied_weights():
    # x @ w, then y @ w.T: one array, quantized along the axis that each sums over
    report = check(
        lambda p, x, w, a: a(jnp.tanh(a(x) @ w(p["w"]))) @ w(p["w"].T), {"w": W1}, ["w", "w#1"]
    )
    assert report.bytes_before == W1.nbytes
    assert [r.bytes_after for r in report.rows] == [W1.size + 4 * 8, 0]


def test_weight_norm():
    def f(p, x, w, a):
        v = p["v"]
        return a(x) @ w(p["g"][None] * v / jnp.linalg.norm(v, axis=0, keepdims=True))

    check(f, {"v": SQUARE["v"], "g": SQUARE["g"]}, ["g+v"], tolerance=SUM)  # the norm is a sum


def test_products_concatenations_and_slices():
    p = SQUARE
    check(
        lambda p, x, w, a: a(x) @ w(jnp.concatenate([p["w"], p["v"]], 1)),
        {"w": p["w"], "v": p["v"]},
        ["v+w"],
    )
    check(
        lambda p, x, w, a: [a(x) @ w(p["w"][:, :2]), a(x) @ w(p["w"][:, 2:])],
        {"w": p["w"]},
        ["w", "w#1"],
    )
    check(
        lambda p, x, w, a: [a(x) @ w(part) for part in jnp.split(p["w"], 2, axis=1)],
        {"w": p["w"]},
        ["w", "w#1"],
    )
    check(lambda p, x, w, a: a(x) @ w(p["w"] * p["v"]), {"w": p["w"], "v": p["v"]}, ["v+w"])
    check(
        lambda p, x, w, a: a(x) @ w(p["w"].reshape(2, 2, 4).transpose(2, 0, 1).reshape(4, 4)),
        {"w": p["w"]},
        ["w"],
    )
    check(
        lambda p, x, w, a: a(x) @ w(jnp.stack([p["w"], p["v"]])[1]),
        {"w": p["w"], "v": p["v"]},
        ["v+w"],
    )


def test_masks():
    mask = (jnp.arange(32).reshape(4, 8) % 3 > 0).astype(jnp.float32)
    check(lambda p, x, w, a: a(x) @ w(p["w"] * mask), {"w": W1}, ["w"])
    check(lambda p, x, w, a: a(x) @ w(jnp.where(mask > 0, p["w"], 0.0)), {"w": W1}, ["w"])
    check(
        lambda p, x, w, a: a(x) @ w(p["w"] * p["mask"]),
        {"w": W1, "mask": mask},
        ["mask+w"],
    )


def test_lora():
    params = {"w": W1, "a": normal(9, 4, 2), "b": normal(10, 2, 8)}
    # merged: the product a @ b is computed from parameters only, so it stays exact
    check(
        lambda p, x, w, t: t(x) @ w(p["w"] + p["a"] @ p["b"]), params, ["a", "a+b+w"], tolerance=SUM
    )
    # in two steps: each adapter is a site of its own
    report = check(
        lambda p, x, w, t: t(x) @ w(p["w"]) + t(t(x) @ w(p["a"])) @ w(p["b"]),
        params,
        ["w", "a", "b"],
    )
    assert {r.site: r.bytes_after for r in report.rows} == {
        "w": 32 + 4 * 8, "a": 8 + 4 * 2, "b": 16 + 4 * 8
    }  # fmt: skip


def test_a_merged_weight_that_is_read_twice_is_stored_once():
    params = {"w": SQUARE["w"], "v": SQUARE["v"]}

    def f(p, x, w, a):
        merged = p["w"] + p["v"]
        return a(jnp.tanh(a(x) @ w(merged))) @ w(merged)

    report = check(f, params, ["v+w", "v+w#1"])
    assert [r.bytes_after for r in report.rows] == [16 + 4 * 4, 0]


def test_embeddings():
    params = {"e": normal(11, 10, 4), "w": W1}
    ids = jnp.array([[1, 2], [3, 9]])
    rows = lambda e: weight(e, -1)  # noqa: E731

    def twin(p, ids):
        return token(rows(p["e"])[ids]) @ weight(p["w"])

    f = lambda p, ids: p["e"][ids] @ p["w"]  # noqa: E731
    assert [s.name for s in jc.sites(f)(params, ids)] == ["e", "w"]
    assert_same(jc.quantize_aware(f, "w8a8")(params, ids), jax.jit(twin)(params, ids))
    tied = lambda p, ids: p["e"][ids] @ p["e"].T  # noqa: E731
    want = lambda p, ids: token(rows(p["e"])[ids]) @ rows(p["e"]).T  # noqa: E731
    for recipe in ("w8a8", "w4a8-g32"):  # the table decides for the head too
        assert_same(jc.quantize_aware(tied, recipe)(params, ids), jax.jit(want)(params, ids))
