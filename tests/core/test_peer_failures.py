# SPDX-License-Identifier: Apache-2.0
"""What other libraries got wrong, measured; each test names what happened there.

References are NumPy where a cache of JAX could hide the fault.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress import Recipe, Rule, quantize_aware
from tests.twins import ROUNDING, assert_same, assert_twins, fake, names, normal, token, weight

W, X = normal(8, 16, seed=1), normal(4, 8, seed=2)
INT4 = Recipe([Rule("*", "int4")])
SPELLINGS = {
    "matmul": lambda x, w: x @ w,
    "jnp.dot": jnp.dot,
    "lax.dot": lax.dot,
    "inner": lambda x, w: jnp.inner(x, w.T),
    "einsum": lambda x, w: jnp.einsum("bi,io->bo", x, w),
    "tensordot": lambda x, w: jnp.tensordot(x, w, 1),
    "user jit": jax.jit(lambda x, w: x @ w),
    "vmap": lambda x, w: jax.vmap(lambda r: r @ w)(x),
    "bind": lambda x, w: lax.dot_general_p.bind(
        x,
        w,
        dimension_numbers=(((1,), (0,)), ((), ())),
        precision=None,
        preferred_element_type=jnp.dtype("float32"),
        out_sharding=None,
    ),
}


def int4(w, axis=0):
    return fake(w, axis, top=7.0)


def numpy_int4(w):
    """`int4` per column in NumPy, where no cache of JAX reaches."""
    w = np.asarray(w)
    s = np.abs(w).max(0, keepdims=True) / np.float32(7)
    return np.round(w / s) * s


@pytest.fixture(params=SPELLINGS)
def spell(request):
    return SPELLINGS[request.param]


# 6: float first, then quantized, same shapes: silently not quantized (error exactly 0).
def test_float_first_then_quantized(spell):
    spell(X, W), jax.jit(spell)(X, W)
    q = quantize_aware(lambda w, x: spell(x, w), INT4)
    want = np.asarray(X) @ numpy_int4(W)
    np.testing.assert_allclose(q(W, X), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(q)(W, X), want, rtol=1e-5, atol=1e-5)


# 7: quantized first, then float: float code returns int4 numbers until caches are cleared.
def test_quantized_first_then_float(spell):
    jax.clear_caches()
    q = quantize_aware(lambda w, x: spell(x, w), INT4)
    q(W, X), jax.jit(q)(W, X), jax.grad(lambda w: q(w, X).sum())(W)
    want = np.asarray(X) @ np.asarray(W)
    for f in (spell, jax.jit(spell)):
        np.testing.assert_allclose(f(X, W), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        jax.grad(lambda w: spell(X, w).sum())(W),
        np.repeat(np.asarray(X).sum(0)[:, None], 16, 1),
        rtol=1e-5,
        atol=1e-5,
    )


# 4, 7: the same for a whole step that differentiates inside.
def test_steps_leak_in_neither_direction():
    @jax.jit
    def step(w, x):
        return w - 0.1 * jax.grad(lambda w: ((x @ w) ** 2).sum())(w)

    want = step(W, X)
    got = quantize_aware(step, INT4)(W, X)
    twin = jax.jit(lambda w, x: w - 0.1 * jax.grad(lambda w: ((x @ int4(w)) ** 2).sum())(w))
    assert_same(got, twin(W, X))
    assert_same(step(W, X), want)
    assert float(jnp.abs(got - want).max()) > 1e-2


# 8: scans are not unrolled.
def test_a_scan_stays_one_scan():
    q = quantize_aware(
        lambda w, x: lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=30)[0], INT4
    )
    text = str(jax.make_jaxpr(q)(normal(8, 8), X))
    assert text.count("scan[") == 1 and text.count("dot_general[") == 1


# 10: stacked parameters were left in float, or got the activation's format.
@pytest.mark.parametrize("recipe", ["w4a8-g32", INT4])
def test_stacked_scan_parameters(recipe):
    stack = normal(3, 8, 8) * 0.4
    f = lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]  # noqa: E731
    act = token if recipe == "w4a8-g32" else lambda x: x  # groups of 32 do not fit 8 rows

    def twin(w, x):
        return lax.scan(lambda x, w: (jnp.tanh(act(x) @ int4(w)), None), x, w)[0]

    assert_twins(quantize_aware(f, recipe), twin, stack, X, gradient=ROUNDING)


# 11: a weight sharded along its contraction was left in float; its shape is not the parameter's.
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit])
def test_contraction_sharded_weight(jit):
    mesh = jax.make_mesh((4,), ("d",), (AxisType.Auto,), devices=jax.devices()[:4])
    f = jax.shard_map(
        lambda w, x: lax.psum(x @ w, "d"),
        mesh=mesh,
        in_specs=(P("d"), P(None, "d")),
        out_specs=P(),
    )
    got = jit(quantize_aware(f, INT4))(W, X)
    np.testing.assert_allclose(got, np.asarray(X) @ numpy_int4(W), rtol=1e-5, atol=1e-5)


# 12: w.T: float when eager, quantized under jit.
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit])
def test_tied_transposed_weight(jit):
    f = lambda w, x: jnp.tanh(x @ w) @ w.T  # noqa: E731
    twin = lambda w, x: jnp.tanh(x @ int4(w)) @ int4(w.T)  # noqa: E731
    assert names(f, W, X) == ["arg0", "arg0#1"]
    assert_same(jit(quantize_aware(f, INT4))(W, X), jax.jit(twin)(W, X))


# 13: weight norm and a concatenation: silently float.
def test_weight_norm_and_concatenation():
    p = {"v": W, "g": normal(16, seed=3), "b": normal(8, 4, seed=4)}

    def make(p):
        v = p["v"] / jnp.linalg.norm(p["v"], axis=0, keepdims=True) * p["g"][None]
        return jnp.concatenate([v, p["b"]], axis=1)

    f = lambda p, x: x @ make(p)  # noqa: E731
    assert names(f, p, X) == ["b+g+v"]
    assert_twins(quantize_aware(f, INT4), lambda p, x: x @ int4(make(p)), p, X)


# 14: activation x activation of a parameter's shape: AssertionError.
def test_product_of_activations_with_the_shape_of_a_parameter():
    w, x = normal(4, 4, seed=1), normal(4, 4, seed=2)
    f = lambda w, x: (x @ x) @ w  # noqa: E731
    assert_twins(quantize_aware(f, INT4), lambda w, x: (x @ x) @ int4(w), w, x)


# 15: three operands: "Unsupported einsum format".
def test_einsum_of_three_operands():
    p = {"a": normal(8, 3, seed=1), "b": normal(3, 16, seed=2)}
    f = lambda p, x: jnp.einsum("bi,ir,ro->bo", x, p["a"], p["b"], optimize=[(0, 1), (0, 1)])  # noqa: E731
    got = quantize_aware(f, INT4)(p, X)
    want = np.asarray(X) @ numpy_int4(p["a"]) @ numpy_int4(p["b"])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# 16: a convolution with a constant filter: AssertionError.
def test_constant_filter():
    blur = jnp.ones((1, 1, 3)) / 3
    smooth = lambda x: lax.conv_general_dilated(x[:, None], blur, (1,), "SAME")[:, 0]  # noqa: E731
    f = lambda w, x: smooth(x) @ w  # noqa: E731
    assert_twins(quantize_aware(f, INT4), lambda w, x: smooth(x) @ int4(w), W, X)


# 18: preferred_element_type and precision were dropped.
def test_preferred_element_type():
    w, x = W.astype(jnp.bfloat16), X.astype(jnp.bfloat16)
    f = lambda w, x: jnp.matmul(  # noqa: E731
        x, w, preferred_element_type=jnp.float32, precision="highest"
    )
    q = quantize_aware(f, "w8a8")
    assert q(w, x).dtype == jnp.float32
    text = str(jax.make_jaxpr(q)(w, x))
    assert "preferred_element_type=float32" in text and "Precision.HIGHEST" in text


# 19: jvp: "can't apply forward-mode autodiff to a custom_vjp function".
def test_forward_mode():
    q, twin = quantize_aware(lambda w, x: x @ w, INT4), lambda w, x: x @ int4(w)
    tangent = lambda f: jax.jit(lambda w, x: jax.jvp(f, (w, x), (w, x)))(W, X)  # noqa: E731
    assert_same(tangent(q), tangent(twin))
    assert_same(jax.jit(jax.jacfwd(q))(W, X), jax.jit(jax.jacfwd(twin))(W, X))


class Block(nn.Module):
    quantized: bool = False

    @nn.compact
    def __call__(self, x, _):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (8, 8))
        dot = (lambda x, w: token(x) @ weight(w)) if self.quantized else jnp.matmul
        return x + jnp.tanh(dot(x, kernel)), None


class Stack(nn.Module):
    quantized: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return block(self.quantized)(x, None)[0]


# 20, 21: nn.scan with nn.remat; stacked parameters got scales of the wrong shape.
def test_linen_scan_and_remat():
    variables = Stack().init(jax.random.key(0), X)
    f = lambda v, x: Stack().apply(v, x)  # noqa: E731
    twin = lambda v, x: Stack(quantized=True).apply(v, x)  # noqa: E731
    (site,) = jc.sites(f)(variables, X)
    assert site.name.startswith("params/") and site.name.endswith("/kernel")
    assert site.stack == (3,)
    assert_twins(quantize_aware(f, "w8a8"), twin, variables, X, gradient=ROUNDING)


# 5: a Linen Dense.
def test_linen_dense():
    layer = nn.Dense(16)
    variables = layer.init(jax.random.key(0), X)
    twin = lambda v, x: token(x) @ weight(v["params"]["kernel"]) + v["params"]["bias"][None]  # noqa: E731
    assert_twins(quantize_aware(layer.apply, "w8a8"), twin, variables, X)


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.linear(x))


# 22: nnx.scan over stacked layers: "Cannot extract graph node from different trace level".
def test_nnx_scan_over_stacked_layers():
    layers = nnx.vmap(Layer, in_axes=0)(nnx.Rngs(jax.random.split(jax.random.key(0), 3)))
    graph, state = nnx.split(layers)

    def f(state, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return layer(x)

        return run(nnx.merge(graph, state), x)

    def twin(state, x):
        p = nnx.to_pure_dict(state)["linear"]

        def body(x, p):
            return jnp.tanh(token(x) @ weight(p["kernel"]) + p["bias"][None]), None

        return lax.scan(body, x, p)[0]

    (site,) = jc.sites(f)(state, X)
    assert site.stack == (3,) and "linear/kernel" in site.name
    q = quantize_aware(f, "w8a8")
    assert_same(jax.jit(q)(state, X), jax.jit(twin)(state, X), ROUNDING)
    loss = lambda f: lambda s: jnp.sum(f(s, X) ** 2)  # noqa: E731
    got, want = (jax.jit(jax.grad(loss(g)))(state) for g in (q, twin))
    assert_same(jax.tree.leaves(got), jax.tree.leaves(want), 2 * ROUNDING)


# 23: an ensemble under vmap equals a loop.
def test_vmap_over_an_ensemble():
    ensemble = jnp.stack([W, 2 * W, W**2])
    q = quantize_aware(lambda w, x: jnp.tanh(x @ w), "w8a8")
    got = jax.jit(jax.vmap(q, (0, None)))(ensemble, X)
    assert_same(got, jnp.stack([jax.jit(q)(w, X) for w in ensemble]), ROUNDING)


# 24: jax.checkpoint inside.
def test_checkpoint():
    f = lambda w, x: jax.checkpoint(lambda w: jnp.sin(x @ w))(w)  # noqa: E731
    assert_twins(quantize_aware(f, INT4), lambda w, x: jnp.sin(x @ int4(w)), W, X)


# 26: numpy leaves: TypeError.
def test_numpy_leaves():
    q = quantize_aware(lambda p, x: x @ p["w"], INT4)
    got = q({"w": np.asarray(W)}, np.asarray(X))
    np.testing.assert_allclose(got, np.asarray(X) @ numpy_int4(W), rtol=1e-5, atol=1e-5)


# 27: embedding tables stayed float32; LayerNorm does here too, and is listed.
def test_embedding_and_layer_norm():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.LayerNorm()(nn.Embed(10, 8)(ids))

    ids = jnp.array([1, 2, 7])
    variables = Model().init(jax.random.key(0), ids)
    f = Model().apply

    def twin(v, ids):
        p = v["params"]
        p = {**p, "Embed_0": {"embedding": weight(p["Embed_0"]["embedding"], 1)}}
        return f({"params": p}, ids)

    assert names(f, variables, ids) == ["params/Embed_0/embedding"]
    assert_twins(quantize_aware(f, "w8a8"), twin, variables, ids)
    assert "LayerNorm_0/scale" in str(jc.report(f, "w8a8")(variables, ids))


# 31: ±127 maps to codes ±127 with scale 1: -128 is not used.
def test_symmetric_scale():
    w = jnp.array([[127.0], [-127.0], [3.0]])
    assert_same(quantize_aware(lambda w, x: x @ w, "w8a16")(w, jnp.eye(3)), w)
