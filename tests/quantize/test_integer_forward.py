# SPDX-License-Identifier: Apache-2.0
"""Products of integers: against int64 NumPy, and at sites against float fake quantization."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress import Quantizer, Recipe, Rule
from jaxcompress._quantize import flat, where_integer
from jaxcompress._quantize.grouped_dot import grouped_product, in_groups
from jaxcompress._quantize.integer_dot import Codes, Conv, Dot, codes_of, product
from tests.twins import assert_same, normal, token, weight

# Sums of up to 128 products in float32 against exact ones, and scales multiplied in another order.
SUMS = 2e-6


# ---------------------------------------------------------------------- the product alone


def random_codes(rng, shape, shared, affine):
    """int8 codes with scales that are powers of two, so that float32 results are exact."""
    small = tuple(1 if d in shared else n for d, n in enumerate(shape))
    zero = rng.integers(-128, 128, small).astype(np.int32) if affine else None
    scale = np.float32(2.0) ** rng.integers(-3, 4, small)
    return Codes(rng.integers(-128, 128, shape).astype(np.int8), scale, zero)


def exact(c):
    """(codes - zero points) in int64."""
    return np.int64(c.codes) - (0 if c.zero_point is None else np.int64(c.zero_point))


DOTS = {  # dimension numbers, shapes, the same as einsum
    "matrices": ((((1,), (0,)), ((), ())), (5, 8), (8, 3), "ik,kj->ij"),
    "transposed weight": ((((2,), (1,)), ((), ())), (2, 5, 8), (3, 8), "aik,jk->aij"),
    "weight first": ((((0,), (1,)), ((), ())), (8, 3), (5, 8), "ki,jk->ij"),
    "two axes": ((((1, 2), (1, 0)), ((), ())), (5, 4, 6), (6, 4, 3), "ikl,lkj->ij"),
    "batch": ((((2,), (1,)), ((0,), (2,))), (4, 5, 8), (3, 8, 4), "bik,jkb->bij"),
    "one row": ((((1,), (0,)), ((), ())), (1, 8), (8, 3), "ik,kj->ij"),
    "vector": ((((0,), (0,)), ((), ())), (8,), (8, 3), "k,kj->j"),
}
AFFINE = list(itertools.product((False, True), repeat=2))


@pytest.mark.parametrize("name", DOTS)
def test_dot_is_exact(name):
    numbers, left, right, spec = DOTS[name]
    rng = np.random.default_rng(0)
    for affine in AFFINE:
        lhs, rhs = (
            random_codes(rng, shape, numbers[0][i], affine[i])
            for i, shape in enumerate((left, right))
        )
        got = jax.jit(product, static_argnums=0)(Dot(numbers, "float32"), lhs, rhs)
        want = np.einsum(
            spec, exact(lhs) * np.float64(lhs.scale), exact(rhs) * np.float64(rhs.scale)
        )
        np.testing.assert_array_equal(got, want)


def conv_in_loops(x, w, strides, padding, dilation, into, groups):
    """x float64[n, h, w, c], w float64[h, w, c / groups, o]; `into` is the dilation of x."""
    n, h, width, c = x.shape
    wide = np.zeros((n, (h - 1) * into + 1, (width - 1) * into + 1, c))
    wide[:, ::into, ::into] = x
    wide = np.pad(wide, ((0, 0), *padding, (0, 0)))
    kh, kw, ci, o = w.shape
    reach = [(k - 1) * d + 1 for k, d in zip((kh, kw), dilation)]
    size = [(s - r) // t + 1 for s, r, t in zip(wide.shape[1:3], reach, strides)]
    out = np.zeros((n, *size, o))
    for i, j, a, b in np.ndindex(*size, kh, kw):
        row, col = i * strides[0] + a * dilation[0], j * strides[1] + b * dilation[1]
        for g in range(groups):
            inputs, outputs = (
                slice(g * ci, (g + 1) * ci),
                slice(g * o // groups, (g + 1) * o // groups),
            )
            out[:, i, j, outputs] += wide[:, row, col, inputs] @ w[a, b, :, outputs]
    return out


CONVS = {  # strides, padding, dilation of the kernel, of the input, groups
    "same": ((1, 1), ((1, 1), (1, 1)), (1, 1), 1, 1),
    "strided": ((2, 1), ((1, 0), (0, 2)), (1, 1), 1, 1),
    "dilated": ((1, 1), ((2, 2), (1, 1)), (2, 1), 1, 1),
    "transposed": ((1, 1), ((1, 1), (2, 1)), (1, 1), 2, 1),
    "grouped": ((1, 2), ((1, 1), (0, 0)), (1, 1), 1, 2),
}


@pytest.mark.cover
@pytest.mark.parametrize("layout", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")])
@pytest.mark.parametrize("name", CONVS)
def test_conv_is_exact(name, layout):
    strides, padding, dilation, into, groups = CONVS[name]
    turn = (lambda a: a) if layout[0] == "NHWC" else (lambda a: np.transpose(a, (0, 3, 1, 2)))
    turn_w = (lambda a: a) if layout[0] == "NHWC" else (lambda a: np.transpose(a, (3, 2, 0, 1)))
    rng = np.random.default_rng(1)
    for affine in AFFINE:
        lhs = random_codes(rng, (2, 4, 5, 4), (1, 2, 3), affine[0])
        rhs = random_codes(rng, (3, 2, 4 // groups, 6), (0, 1, 2), affine[1])
        inputs = [jax.tree.map(f, x) for f, x in ((turn, lhs), (turn_w, rhs))]
        shapes = [x.codes.shape for x in inputs]
        params = {
            "window_strides": strides, "padding": padding, "lhs_dilation": (into, into),
            "rhs_dilation": dilation, "feature_group_count": groups, "batch_group_count": 1,
            "precision": None,
            "dimension_numbers": lax.conv_dimension_numbers(*shapes, layout),
        }  # fmt: skip
        got = product(Conv(tuple(sorted(params.items())), "float32"), *inputs)
        x, w = exact(lhs) * np.float64(lhs.scale), exact(rhs) * np.float64(rhs.scale)
        want = conv_in_loops(x, w, strides, padding, dilation, into, groups)
        np.testing.assert_array_equal(got, turn(want))


PACKED = [
    Quantizer("int8"), Quantizer("uint8"), Quantizer("uint8", range="absmax"), Quantizer("int4"),
    Quantizer("uint4"), Quantizer("int3", range="minmax"), Quantizer("int8", range="minmax"),
    Quantizer("ternary"), Quantizer("binary"), Quantizer("int8", "tensor"),
    Quantizer("uint8", "tensor"),
]  # fmt: skip


@pytest.mark.parametrize("q", PACKED, ids=lambda q: f"{q.format.name}-{q.range}-{q.granularity}")
def test_codes_of_a_packed_weight_are_its_values(q):
    w = normal(16, 6) + 0.3
    packed = q.quantize(w, axis=0)
    codes = codes_of(packed)
    assert codes.codes.dtype == jnp.int8
    np.testing.assert_array_equal(codes.decode("float32"), packed.dequantize())


@pytest.mark.parametrize("q", [Quantizer("int8", "group:4"), Quantizer("float8_e4m3fn")])
def test_what_is_no_integer_times_a_scale_has_no_codes(q):
    assert codes_of(q.quantize(normal(16, 6), axis=0)) is None


@pytest.mark.parametrize("bits", [4, 8, 3])
def test_product_with_a_weight_in_groups(bits):
    rng = np.random.default_rng(2)
    x = random_codes(rng, (2, 3, 24), (2,), False)
    w = Quantizer(f"int{bits}", "group:8").quantize(normal(24, 5), axis=0)
    got = jax.jit(grouped_product)(x, w)
    values = np.float64(w.codes) * np.repeat(np.float64(w.scale)[:, 0], 8, 0)
    assert_same(got, jnp.float32((np.float64(x.codes) @ values) * x.scale), SUMS)


@pytest.mark.parametrize(
    "w",
    [
        Quantizer("int4").quantize(normal(24, 6), axis=0),  # no groups
        Quantizer("uint4", "group:8").quantize(normal(24, 6), axis=0),  # zero points
        Quantizer("int4", "group:2").quantize(normal(24, 6), axis=1),  # groups of columns
        Quantizer("int4", "group:5", indivisible="pad").quantize(normal(24, 6), axis=0),
        Quantizer("mxfp4").quantize(normal(32, 6), axis=0),
    ],
)
def test_other_weights_are_not_in_groups(w):
    assert not in_groups(w)


GROUPS = "w4a8-g32"


def grouped_case(*lead):
    """(function, packed parameters, input, what NumPy finds in float64)."""
    w = normal(64, 40)
    packed = {"w": Quantizer("int4", "group:32").quantize(w, axis=0)}
    x = normal(*lead, 64)
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    values = np.float64(packed["w"].codes) * np.repeat(np.float64(packed["w"].scale)[:, 0], 32, 0)
    return (lambda p, x: x @ p["w"]), packed, x, np.round(x / scale) @ values * scale


@pytest.mark.parametrize("lead", [(64,), (8, 16)])
def test_packed_groups_are_multiplied_as_integers(lead):
    fn, packed, x, want = grouped_case(*lead)
    auto = jax.jit(jc.quantize_aware(fn, GROUPS)).lower(packed, x)
    text = auto.as_text()
    assert "xi8>" in text and "stablehlo.while" in text  # a loop over products of int8
    np.testing.assert_allclose(auto.compile()(packed, x), want, rtol=2e-6, atol=2e-5)
    floats = jax.jit(jc.quantize_aware(fn, GROUPS, integer=False)).lower(packed, x)
    assert "stablehlo.while" not in floats.as_text()
    np.testing.assert_allclose(floats.compile()(packed, x), want, rtol=2e-6, atol=2e-5)


def test_packed_groups_differentiate_and_compose():
    fn, packed, x, want = grouped_case(8, 16)
    aware = jc.quantize_aware(fn, GROUPS)
    dense = packed["w"].dequantize()
    dx = jax.grad(lambda x: jnp.sum(aware(packed, x) * want))(x)
    np.testing.assert_allclose(dx, want @ np.float64(dense).T, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(
        jax.jvp(lambda x: aware(packed, x), (x,), (x,))[1], x @ dense, rtol=1e-5, atol=1e-4
    )
    mapped = jax.vmap(aware, (None, 0))(packed, jnp.asarray(x)[:, :, None])[:, :, 0]
    np.testing.assert_allclose(mapped, want, rtol=2e-6, atol=2e-5)
    scanned = jax.lax.scan(lambda c, x: (c, aware(packed, x)), 0, x)[1]
    np.testing.assert_allclose(scanned, want, rtol=2e-6, atol=2e-5)


def test_groups_of_weights_that_are_not_packed_train_in_floats():
    fn, packed, x, _ = grouped_case(64)
    w = {"w": normal(64, 40)}

    def value_and_grad(integer):
        aware = jc.quantize_aware(fn, GROUPS, integer=integer)
        return jax.jit(jax.value_and_grad(lambda w: jnp.sum(aware(w, x) ** 2)))(w)

    jax.tree.map(np.testing.assert_array_equal, value_and_grad("auto"), value_and_grad(False))


def test_long_sums_stay_in_floats():
    # 2^31 / 127^2 = 133144 products of int8 may be summed in int32.
    f = jc.quantize_aware(lambda w, x: x @ w, "w8a8", integer="auto")
    inner = jc.quantize_aware(lambda w, x: x @ w, "w8a8", integer=True)
    with pytest.raises(jc.RecipeError, match="no product of integers"):
        inner(jnp.ones((133145, 1)), jnp.ones((1, 133145)))
    assert float(f(jnp.ones((133145, 1)), jnp.ones((1, 133145)))[0, 0]) == pytest.approx(133145)
    out = inner(jnp.ones((133144, 1)), jnp.ones((1, 133144)))
    assert float(out[0, 0]) == pytest.approx(133144, rel=1e-6)  # the largest sum there is


# ---------------------------------------------------------------------- sites


W = {"a": normal(16, 32, seed=1) / 4, "b": normal(32, 8, seed=2) / 4}
X = normal(3, 5, 16, seed=3)
T = normal(3, 5, 8, seed=4)


def net(p, x):
    return (jnp.sin(x @ p["a"]) @ p["b"]) ** 2


def twin(p, x):
    return (token(jnp.sin(token(x) @ weight(p["a"]))) @ weight(p["b"])) ** 2


def every(f, residuals="int8"):
    return jc.quantize_aware(f, "w8a8", integer=True, residuals=residuals)


def flipped(got, want):
    """Within the rounding of sums: a sum that is rounded otherwise may flip a code downstream."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        far = np.abs(a - b) > SUMS * np.abs(b).max()
        assert (far.mean() < 0.02 or a.size == 1) and np.abs(a - b).max() <= 0.02 * np.abs(b).max()


DERIVATIVES = {
    "value": lambda f: f(W, X),
    "grad": lambda f: jax.grad(lambda p, x: (f(p, x) * T).sum(), (0, 1))(W, X),
    "jvp": lambda f: jax.jvp(f, (W, X), (jax.tree.map(jnp.cos, W), jnp.cos(X))),
    "data only": lambda f: jax.grad(lambda x: (f(W, x) * T).sum())(X),
    "weights only": lambda f: jax.jvp(lambda p: f(p, X), (W,), (W,)),
    "linearize": lambda f: jax.linearize(f, W, X)[1](W, X),
    "remat": lambda f: jax.grad(lambda p: (jax.checkpoint(f)(p, X) * T).sum())(W),
    "vmap": lambda f: jax.vmap(jax.grad(lambda p, x: (f(p, x) * T[0]).sum()), (None, 0))(W, X),
    "per example weights": lambda f: jax.vmap(f)(jax.tree.map(lambda w: jnp.stack([w] * 3), W), X),
}


@pytest.mark.parametrize(
    ("name", "residuals"),
    [*((name, "int8") for name in DERIVATIVES), ("grad", "float"), ("jvp", "float")],
)
def test_sites_are_float_fake_quantization(name, residuals):
    of = DERIVATIVES[name]
    flipped(jax.jit(lambda: of(every(net, residuals)))(), jax.jit(lambda: of(twin))())


def test_one_site_by_the_straight_through_formula():
    """dx = g q(w)^T and dw = q(x)^T g, to the rounding of sums; forward mode agrees."""
    w, x, g = W["a"], X[0], normal(5, 32, seed=9)
    y, back = jax.vjp(every(lambda w, x: x @ w), w, x)
    qx, qw = np.asarray(token(x), np.float64), np.asarray(weight(w), np.float64)
    assert_same(y, jnp.float32(qx @ qw), SUMS)
    dw, dx = back(g)
    assert_same(dw, jnp.float32(qx.T @ np.float64(g)), SUMS)
    assert_same(dx, jnp.float32(np.float64(g) @ qw.T), SUMS)
    _, dy = jax.jvp(every(lambda w, x: x @ w), (w, x), (w, x))
    assert_same(dy, jnp.float32(np.float64(x) @ qw + qx @ np.float64(w)), SUMS)


QUANTIZERS = {
    "tensor": (Quantizer("int8"), Quantizer("int8", "tensor")),
    "example": (Quantizer("int8", "tensor"), Quantizer("int8", "example")),
    "asymmetric": (Quantizer("int8"), Quantizer("uint8", "tensor")),
    "asymmetric weight": (Quantizer("uint4"), Quantizer("int8", "token", range="minmax")),
    "clipped": (Quantizer("int4", range="mse"), Quantizer("int8", "token", range="rms")),
    "ternary": (Quantizer("ternary"), Quantizer("int8", "token")),
    "full": (Quantizer("int8_full", convention="signed"), Quantizer("int8", convention="half")),
}
DIMS = ("NHWC", "HWIO", "NHWC")


def conv(w, x):
    return lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=DIMS)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_range_and_granularity(name):
    q, a = QUANTIZERS[name]
    recipe = Recipe([Rule("*", q, a)])
    g = normal(3, 5, 32, seed=9)

    def dot(p, x):
        return ((x @ p) * g).sum(), x @ p

    def by_hand(p, x):
        y = a.fake_quantize(x, 2) @ q.fake_quantize(p, 0)
        return (y * g).sum(), y

    got = jax.value_and_grad(jc.quantize_aware(dot, recipe, integer=True), (0, 1), has_aux=True)
    assert_same(got(W["a"], X), jax.value_and_grad(by_hand, (0, 1), has_aux=True)(W["a"], X), 1e-5)
    if a.granularity.kind in ("example", "tensor"):
        w, x = normal(3, 2, 4, 6, seed=5), normal(2, 5, 4, 4, seed=6)
        got = jax.vjp(jc.quantize_aware(conv, recipe, integer=True), w, x)
        want = jax.vjp(
            lambda w, x: conv(q.fake_quantize(w, (2, 0, 1)), a.fake_quantize(x, (3, 1, 2))), w, x
        )
        assert_same((got[0], got[1](got[0])), (want[0], want[1](got[0])), 1e-5)


def integer_dots(f, *args):
    """Dots and convolutions of int8 in the compiled program, and in what it is compiled from."""
    lowered = jax.jit(f).lower(*args)
    before = re.findall(r"(?:dot_general|convolution).*xi8>.*xi8>.*xi32>", lowered.as_text())
    text = lowered.compile().as_text()
    types = dict(re.findall(r"%?([\w.-]+) = (\w+)\[", text))
    dots = re.findall(r"= s32\[[^=]* (?:dot|convolution)\(([^)]*)\)", text)
    names = [re.findall(r"%([\w.-]+)", operands) for operands in dots]
    return sum(all(types[n] == "s8" for n in pair) for pair in names), len(before)


def test_compiled_program_multiplies_int8():
    step = lambda f: jax.grad(lambda p, x: f(p, x).sum())  # noqa: E731
    assert integer_dots(step(every(net)), W, X) == (2, 2)
    assert integer_dots(step(jc.quantize_aware(net, "w8a8", integer=False)), W, X) == (0, 0)
    w, x = normal(3, 3, 16, 32), normal(1, 6, 6, 16)
    assert integer_dots(every(conv), w, x)[0] == 1


def test_small_products_are_left_in_floats_and_large_ones_are_not():
    auto, off = (jc.quantize_aware(net, "w8a8", integer=i) for i in ("auto", False))
    assert integer_dots(auto, W, X)[1] == 0
    np.testing.assert_array_equal(auto(W, X), off(W, X))
    w, x = jnp.ones((64, 64)), jnp.ones((4, 16, 64))
    assert integer_dots(jc.quantize_aware(lambda w, x: x @ w, "w8a8"), w, x)[1] == 1


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_platforms_without_measurements_stay_in_floats(platform):
    (site,) = jc.sites(lambda w, x: x @ w)(jnp.ones((512, 512)), jnp.ones((512, 512)))
    op = Dot(site.params["dimension_numbers"], "float32")
    assert where_integer.pays(op, site, False, "cpu")
    assert not where_integer.pays(op, site, False, platform)


def test_residuals_are_codes():
    def kept(residuals):
        f = jax.vjp(every(lambda p, x: x @ p, residuals), W["a"], X)[1]
        return sorted(str(x.dtype) for x in jax.tree.leaves(f) if x.size > 40)

    assert kept("int8") == ["int8", "int8"]
    assert kept("float") == ["float32", "float32"]


def test_second_derivatives_work_or_raise():
    def curved(f):
        return jax.jit(lambda x: jax.jvp(jax.grad(lambda x: f(W, x).sum()), (x,), (jnp.cos(x),))[1])

    one = lambda p, x: (x @ p["a"]) ** 3  # noqa: E731
    want = curved(lambda p, x: (token(x) @ weight(p["a"])) ** 3)(X)
    assert_same(curved(every(one, "float"))(X), want, 1e-5)
    assert_same(curved(jc.quantize_aware(one, "w8a8", integer=False))(X), want, 1e-5)
    with pytest.raises(jc.SiteError, match=r'second derivative.*residuals="float"'):
        curved(every(one))(X)
    both = lambda f: jax.hessian(lambda x: f(W, x[None])[0].sum())  # noqa: E731
    with pytest.raises(jc.SiteError, match="integer=False"):
        both(every(one))(X[0, 0])
    linear = jax.grad(lambda p: jax.grad(lambda x: (x**2).sum())(X).sum() + every(one)(p, X).sum())
    linear(W)  # the second derivative of something else


def test_scan_over_layers_keeps_codes():
    stack = normal(3, 16, 16, seed=7) / 4

    def layers(p, x, q=lambda w: w, a=lambda x: x):
        return lax.scan(lambda x, w: (jnp.sin(a(x) @ q(w)), None), x, p)[0]

    loss = lambda f: lambda p, x: f(p, x).sum()  # noqa: E731
    hand = lambda p, x: layers(p, x, weight, token)  # noqa: E731
    f = every(layers)
    flipped(jax.jit(jax.grad(loss(f)))(stack, X), jax.jit(jax.grad(loss(hand)))(stack, X))
    kept = [x for x in jax.tree.leaves(jax.vjp(f, stack, X)[1]) if x.shape == (3, 16, 16)]
    assert [str(x.dtype) for x in kept] == ["int8"]


def test_shard_map_over_the_contracted_axis():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    specs = {"mesh": mesh, "in_specs": (P("model", None), P(None, "model")), "out_specs": P()}

    def parallel(w, x):
        return lax.psum(x @ w, "model")

    def loss(f):
        return jax.jit(jax.value_and_grad(lambda w, x: (f(w, x) ** 2).sum(), (0, 1)))

    w, x = W["a"], X[0]
    got = loss(every(jax.shard_map(parallel, **specs)))(w, x)
    assert_same(got, loss(lambda w, x: token(x) @ weight(w))(w, x), 1e-5)


@pytest.mark.parametrize("kind", ["static", "ema", "learned"])
def test_stored_and_learned_ranges(kind):
    a = Quantizer("int8", "tensor", range=kind)
    q = Quantizer("int8", "tensor", range="learned") if kind == "learned" else Quantizer("int8")
    recipe = Recipe([Rule("*", q, a)])
    out = []
    for integer in (True, False):
        init, apply = jc.quantize_aware_with_state(net, recipe, integer=integer)
        state = init(W, X)

        def loss(learned, p, x, apply=apply, state=state):
            y, new = apply(type(state)(learned, state.statistics), p, x)
            return (y * T).sum(), new.statistics

        out.append(
            jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(state.learned, W, 1.2 * X)
        )
    flipped(*out)


def test_asymmetric_stored_range():
    a = Quantizer("uint8", "tensor", range="static")
    recipe = Recipe([Rule("*", Quantizer("int8"), a)])
    f = lambda w, x: x @ w  # noqa: E731
    (init, on), (_, off) = (
        jc.quantize_aware_with_state(f, recipe, integer=i) for i in (True, False)
    )
    state = init(W["a"], X + 1)
    assert_same(on(state, W["a"], X)[0], off(state, W["a"], X)[0], 1e-5)
    assert integer_dots(lambda w, x: on(state, w, x)[0], W["a"], X)[1] == 1


def test_quantized_gradients_go_with_an_integer_forward():
    recipe = Recipe([Rule("*", "int8", "int8", gradient="int8")])
    on, off = (
        jax.jit(jax.value_and_grad(jc.quantize_aware(lambda w, x: (x @ w * normal(3, 5, 32)).sum(),
                recipe, integer=i), (0, 1)))
        for i in (True, False)
    )  # fmt: skip
    assert_same(on(W["a"], X), off(W["a"], X), 1e-5)
    assert integer_dots(on, W["a"], X)[1] == 1


def test_packed_weights_run_the_integers_of_training():
    f = every(lambda p, x: x @ p["a"])
    packed = {"a": Quantizer("int8").quantize(W["a"], axis=0)}
    np.testing.assert_array_equal(f(packed, X), f({"a": W["a"]}, X))
    assert integer_dots(f, packed, X)[1] == 1
    grouped = {"a": Quantizer("int8", "group:4").quantize(W["a"], axis=0)}
    assert integer_dots(f, grouped, X)[1] == 0  # scales of another kind than the recipe's
    assert_same(f(grouped, X), token(X) @ grouped["a"].dequantize(), SUMS)


def test_transforms_outside_see_the_site():
    q = every(net)
    assert [(s.name, s.op) for s in jc.sites(q)(W, X)] == [
        ("a", "dot_general"),
        ("b", "dot_general"),
    ]
    out, seen = jc.tap(q, "a")(W, X)
    assert_same(seen["a"], token(X))
    flipped(out, twin(W, X))
    with pytest.raises(jc.SiteError, match="`a` is already quantized by another recipe"):
        jc.quantize_aware(q, "w4a16-g32")(W, X)
    batched = jax.vmap(q, (None, 0))  # its tracing moved batch dimensions into the site
    assert [s.name for s in jc.sites(batched)(W, X)] == ["a", "b"]
    flipped(jc.tap(batched, "b")(W, X)[0], jax.vmap(twin, (None, 0))(W, X))


def test_a_whole_step_differentiates_integers():
    def step(p, x):
        loss, g = jax.value_and_grad(lambda p: net(p, x).sum())(p)
        return jax.tree.map(lambda p, g: p - 0.1 * g, p, g), loss

    def by_hand(p, x):
        loss, g = jax.value_and_grad(lambda p: twin(p, x).sum())(p)
        return jax.tree.map(lambda p, g: p - 0.1 * g, p, g), loss

    flipped(jax.jit(every(step))(W, X), jax.jit(by_hand)(W, X))
    assert integer_dots(every(step), W, X) == (2, 2)


def test_export_for_any_batch():
    """The size is unknown when the choice is made: floats by default, integers if told."""
    args = W["a"], jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 16"), jnp.float32)
    dot = lambda w, x: x @ w  # noqa: E731
    for integer, count in (("auto", 0), (True, 1)):
        f = jc.quantize_aware(dot, "w8a8", integer=integer)
        exported = jax.export.export(jax.jit(f))(*args)
        assert exported.mlir_module().count("xi8>) -> tensor<?x32xi32>") == count
        assert_same(exported.call(W["a"], X[0]), token(X[0]) @ weight(W["a"]), SUMS)


def test_options_are_checked():
    with pytest.raises(
        jc.RecipeError, match=r"integer='yes': expected one of \('auto', True, False\)"
    ):
        jc.quantize_aware(net, "w8a8", integer="yes")
    with pytest.raises(jc.RecipeError, match=r"residuals='int4': expected one of"):
        jc.quantize_aware(net, "w8a8", residuals="int4")
    with pytest.raises(jc.RecipeError, match=r"`w8a16` has no product of integers.*w8a8"):
        jc.quantize_aware(net, "w8a16", integer=True)(W, X)


# ---------------------------------------------------------------------- layout


@pytest.mark.cover
@pytest.mark.parametrize("sizes", [(6, 4, 3), (40, 30, 2), (4, 6, 50)])
@pytest.mark.parametrize("turned", [False, True])
def test_layouts_are_the_same_product(sizes, turned):
    """Values and gradients of both ways to write a product, against NumPy."""
    m, k, n = sizes
    x, w = normal(2, m, k), normal(*((n, k) if turned else (k, n)), seed=1)
    g = normal(2, m, n, seed=2)
    numbers = (((2,), (1 if turned else 0,)), ((), ()))
    a, b, c = (np.asarray(v, np.float64) for v in (x, w.T if turned else w, g))
    dw = np.einsum("amk,amn->kn", a, c)
    for write in (flat.dot, flat.dot_for_right):
        y, back = jax.vjp(lambda x, w: write(x, w, numbers, None, jnp.float32), x, w)  # noqa: B023
        dx, got = back(g)
        want = [a @ b, c @ b.T, dw.T if turned else dw]
        assert_same([y, dx, got], [jnp.float32(v) for v in want], 1e-5)


def test_float_sites_are_laid_out_and_may_be_differentiated_twice():
    w, x = normal(64, 64) / 8, normal(2, 32, 64, seed=1)
    f = jc.quantize_aware(lambda w, x: jnp.sum((x @ w) ** 3), "w8a8", integer=False)
    hand = lambda w, x: jnp.sum((token(x) @ weight(w)) ** 3)  # noqa: E731
    twice = lambda f: jax.jit(jax.jvp, static_argnums=0)(jax.grad(f), (w, x), (w, x))  # noqa: E731
    assert_same(twice(f), twice(hand), 1e-5)
    assert re.search(r"tensor<64x64xf32>, tensor<64x64xf32>", jax.jit(f).lower(w, x).as_text())
