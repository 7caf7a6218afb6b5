# SPDX-License-Identifier: Apache-2.0
"""Products of fp8, MX and NVFP4 on their codes, against float64, and where programs hold them."""

import re

import jax
import jax.export as jax_export
import jax.numpy as jnp
import numpy as np
import pytest
from twins import default, draw

import jaxcompress as jc
from jaxcompress._core import _compat
from jaxcompress._core.transform import transformed_function
from jaxcompress._quantize.aware import QuantizeAware
from jaxcompress._quantize.native import Native, product

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
FP8 = ("float8_e4m3fn", "float8_e5m2")
BLOCKS = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp4", "nvfp4")


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


@pytest.fixture(scope="module")
def params():
    return {"up": draw(2, 64, 96), "down": draw(3, 96, 32)}


X = draw(1, 8, 64)


def in_floats(fn, recipe):
    """The quantized function with products of floats on every platform."""
    return transformed_function(fn, QuantizeAware(jc.recipes.get(recipe), integer=False), 0)


def text(fn, *args, platform):
    return jax_export.export(jax.jit(fn), platforms=[platform])(*args).mlir_module()


def native_dots(module):
    """How many products of codes a program has."""
    eight = re.findall(r"dot_general.*\(tensor<[^>]*f8E[^>]*>, tensor<[^>]*f8E", module)
    return len(eight) + len(re.findall(r'composite "xla.scaled_dot"', module))


@pytest.mark.parametrize(
    "name, spelled",
    [
        *((name, "hijb,kj->hibk") for name in (*FP8, *BLOCKS)),
        *((name, "bij,bjk->bik") for name in ("float8_e4m3fn", "mxfp8_e4m3", "nvfp4")),
        *((name, "j,kj->k") for name in ("float8_e4m3fn", "mxfp4")),
    ],
)
def test_products_of_codes(name, spelled):
    """Every product of two codes is exact in float32; only the order of the sum is free."""
    terms, result = spelled.split("->")
    sizes = {"b": 3, "h": 2, "i": 5, "j": 64, "k": 7}
    a, b = (
        draw(i, *[sizes[c] for c in term]) * 2.0 ** (4 * i)
        for i, term in enumerate(terms.split(","))
    )
    left, right = terms.split(",")
    batch = [c for c in left if c in right and c in result]
    pairs = left.index("j"), right.index("j")
    numbers = (
        ((pairs[0],), (pairs[1],)),
        (tuple(map(left.index, batch)), tuple(map(right.index, batch))),
    )
    quantizer = jc.Quantizer(name)
    lhs, rhs = (quantizer.quantize(x, axis) for x, axis in zip((a, b), pairs))
    spec = Native((("dimension_numbers", numbers),), "float32")
    got = jax.jit(lambda lhs, rhs: product(spec, lhs, rhs))(lhs, rhs)
    l, r = (np.asarray(q.dequantize(), np.float64) for q in (lhs, rhs))  # noqa: E741
    size = np.einsum(spelled, np.abs(l), np.abs(r))
    assert got.shape == size.shape
    assert (np.abs(got - np.einsum(spelled, l, r)) <= 64 * 2.0**-24 * size).all()


@pytest.mark.parametrize("recipe", default(["fp8", "mxfp8", "mxfp4", "nvfp4"], "fp8", "nvfp4"))
def test_platforms(recipe, params):
    """Accelerators multiply codes, in the forward pass only; a CPU the rounded floats."""
    native = recipe == "fp8" or _compat.SCALED_DOT
    fn = jc.quantize_aware(model, recipe)
    grad = jax.grad(lambda p, x: (fn(p, x) ** 2).sum())
    for platform in PLATFORMS:
        want = 2 if native and platform != "cpu" else 0
        assert native_dots(text(fn, params, X, platform=platform)) == want
        assert native_dots(text(grad, params, X, platform=platform)) == want
        assert native_dots(text(in_floats(model, recipe), params, X, platform=platform)) == 0


@pytest.mark.parametrize("recipe", ["fp8", "nvfp4"])
def test_same_bits_on_a_cpu(recipe, params):
    fn, plain = jc.quantize_aware(model, recipe), in_floats(model, recipe)

    def everything(f, params, x):
        def loss(p, x):
            return (f(p, x) ** 2).sum()

        over = jax.vmap(lambda x: f(params, x[None]))(x)
        tangent = jax.jvp(lambda x: f(params, x), (x,), (jnp.ones_like(x),))
        return f(params, x), jax.grad(loss, (0, 1))(params, x), over, tangent

    got, want = (jax.jit(everything, static_argnums=0)(f, params, X) for f in (fn, plain))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_gradient_is_straight_through(params):
    """Of x @ w it is that of q(x) @ q(w), whatever the platform."""
    w = params["up"]
    quantizer = jc.Quantizer("float8_e4m3fn")
    rows = jc.Quantizer("float8_e4m3fn", "token")
    fn = jc.quantize_aware(lambda w, x: x @ w, "fp8")
    dw, dx = jax.grad(lambda w, x: (fn(w, x) * jnp.cos(X[:, :1])).sum(), (0, 1))(w, X)
    g = jnp.broadcast_to(jnp.cos(X[:, :1]), (8, 96))
    np.testing.assert_allclose(dw, rows.fake_quantize(X, 1).T @ g, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, g @ quantizer.fake_quantize(w, 0).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", default(["fp8", "mxfp4"], "mxfp4"))
def test_artifacts(recipe, params, tmp_path):
    """The stored program of packed weights has both forms, and the bits of the function here."""
    fn = jc.quantize_aware(model, recipe)
    artifact = jc.export.stablehlo(fn, params, X, path=tmp_path / "a")
    np.testing.assert_array_equal(artifact.run(X), jax.jit(fn)(params, X))
    assert jc.export.verify(artifact, fn, params, [X]).equal
    program = jax_export.deserialize(bytearray((tmp_path / "a" / "program.bin").read_bytes()))
    native = recipe == "fp8" or _compat.SCALED_DOT
    assert native_dots(program.mlir_module()) >= 2 * native
    assert artifact.nbytes < 0.5 * jc.nbytes(params) + 100_000


def test_other_transforms_see_the_sites(params):
    fn = jc.quantize_aware(model, "fp8")
    _, seen = jc.tap(fn, "*", output=True)(params, X)
    assert set(seen) == {"up", "down"}
    np.testing.assert_allclose(seen["down"], in_floats(model, "fp8")(params, X), rtol=1e-6)
    masks = {"up": jnp.ones((64, 96), bool), "down": jnp.zeros((96, 32), bool)}
    assert not jc.prune.masked(fn, masks)(params, X).any()


def test_where_codes_cannot_be_multiplied(params):
    """Convolutions, other formats, blocks that do not fit, sums over devices: floats everywhere."""
    image, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 8))
    numbers = ("NHWC", "HWIO", "NHWC")

    def conv(w, x):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)

    cases = [
        (jc.quantize_aware(conv, "fp8"), kernel, image),
        (jc.quantize_aware(model, "mxfp6"), params, X),
        (jc.quantize_aware(lambda w, x: x @ w, "mxfp8"), jnp.ones((40, 8)), jnp.ones((2, 40))),
    ]
    for fn, p, x in cases:
        assert native_dots(text(fn, p, x, platform="cuda")) == 0
