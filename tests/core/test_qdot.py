# SPDX-License-Identifier: Apache-2.0
"""Products with packed weights: every loop gives the product of the array that is packed."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from twins import big_floats, normal

import jaxcompress as jc
from jaxcompress import formats
from jaxcompress._core import qdot

K, N = 256, 1024
PACKED = [
    ("int8", None), ("uint4", "group:128"), ("int3", "group:64"), ("nf4", "group:64"),
    ("nvfp4", None), ("float8_e4m3fn", None), ("mxfp8_e5m2", None), ("binary", None),
    ("int4", "group:4"),
    ("int4", jc.per_block(16, 16)),
]  # fmt: skip


def weight(fmt="int4", granularity="group:32", shape=(K, N), axis=0):
    return jc.Quantizer(fmt, granularity).quantize(normal(*shape), axis=axis)


def close(got, want):
    """Equal but for the order of sums of float32."""
    want = np.asarray(want, np.float64)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def exact(q):
    return np.asarray(q.dequantize(), np.float64)


@pytest.mark.cover(times=2)
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("along", [False, True], ids=["codes_along_channels", "codes_along_sum"])
@pytest.mark.parametrize("fmt, granularity", PACKED, ids=lambda v: str(v))
def test_is_the_product_of_the_array(fmt, granularity, along, rows):
    q, x = weight(fmt, granularity, (N, K) if along else (K, N), int(along)), normal(rows, K)
    fn = jc.with_qtensors(lambda w, x: x @ w.T if along else x @ w)
    want = np.asarray(x, np.float64) @ (exact(q).T if along else exact(q))
    close(fn(q, x), want)


FP8 = [name for name in formats.TABLE if name.startswith("float8") and "e8m0" not in name]


@pytest.mark.parametrize("name", FP8)
def test_every_code_of_fp8_is_taken_apart_as_it_is_cast(name):
    codes = np.arange(256, dtype=np.uint8).view(formats.get(name).dtype)[None]
    q = jc.QTensor.from_codes(jnp.asarray(codes), jnp.ones((1, 1)), format=name, dtype=jnp.float32)
    got, want = jax.jit(lambda q: qdot._in_bytes(q).dequantize())(q), codes.astype(np.float32)
    assert qdot._in_bytes(q).packed.dtype == jnp.uint8
    np.testing.assert_array_equal(got, want)  # NaN where it is NaN
    np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


EINSUMS = [
    ("bsd,dhk->bshk", (2, 1, 256), (256, 8, 128), (0,)),  # heads of a query
    ("bshk,hkd->bsd", (2, 1, 4, 64), (4, 64, 1024), (0, 1)),  # heads joined
    ("vd,bd->bv", (3, 256), (1024, 256), (1,)),  # logits of a tied embedding
    ("dv,bd->vb", (3, 256), (256, 1024), (0,)),  # the weight is the left operand
    ("bd,vd->vb", (3, 256), (1024, 256), (1,)),
    ("d,dv->v", (256,), (256, 1024), (0,)),
    ("hkd,bshk->bsd", (1, 30, 4, 64), (4, 64, 1024), (0, 1)),
    ("dhk,bhk->bd", (3, 4, 64), (1024, 4, 64), (1, 2)),
    ("hdk,bd->hbk", (3, 64), (8, 64, 512), (1,)),  # the sum lies between: no loop
]


@pytest.mark.parametrize("how, shape, of_weight, axis", EINSUMS, ids=[e[0] for e in EINSUMS])
@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_any_dimension_numbers(how, shape, of_weight, axis, fmt):
    q, x = weight(fmt, None, of_weight, axis), normal(*shape)
    swapped = len(how.split(",")[0]) == len(of_weight) and how[0] in "vdh"
    pair = (lambda w, x: (w, x)) if swapped else (lambda w, x: (x, w))
    fn = jc.with_qtensors(lambda w, x: jnp.einsum(how, *pair(w, x)))
    want = np.einsum(how, *pair(exact(q), np.asarray(x, np.float64)))
    close(fn(q, x), want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_results_have_the_dtype_of_the_operation(dtype):
    q, x = weight().astype(dtype), normal(2, K).astype(dtype)
    want = np.asarray(x, np.float64) @ exact(q)
    got = jc.with_qtensors(lambda w, x: x @ w)(q, x)
    assert got.dtype == dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-7, atol=0.05)
    wide = jc.with_qtensors(lambda w, x: jnp.dot(x, w, preferred_element_type="float32"))(q, x)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, want, rtol=0, atol=1e-5 * np.abs(want).max())


# ---------------------------------------------------------------------- transformations


def function(q, x):
    return jnp.sin(x @ q / 30)


TRANSFORMED = {
    "grad": lambda f: jax.grad(lambda q, x: f(q, x).sum(), argnums=1),
    "jvp": lambda f: lambda q, x: jax.jvp(functools.partial(f, q), (x,), (jnp.cos(x),))[1],
    "vmap": lambda f: jax.vmap(f, (None, 0)),
    "vmap of grad": lambda f: jax.vmap(jax.grad(lambda q, x: f(q, x).sum(), 1), (None, 0)),
    "grad of vmap": lambda f: jax.grad(lambda q, x: jax.vmap(f, (None, 0))(q, x).sum(), 1),
    "remat": lambda f: jax.grad(lambda q, x: jax.checkpoint(f)(q, x).sum(), 1),
    "second": lambda f: (
        lambda q, x: jax.jvp(jax.grad(lambda x: f(q, x).sum()), (x,), (jnp.cos(x),))[1]
    ),
    "scan": lambda f: lambda q, x: jax.lax.scan(lambda c, r: (c, f(q, r[None])), 0, x)[1][:, 0],
}


@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.parametrize("rows", [3, 40])
def test_transformations_give_what_they_give_of_the_array(name, rows):
    q, x = weight(), normal(rows, K)
    got = jax.jit(TRANSFORMED[name](jc.with_qtensors(function)))(q, x)
    want = jax.jit(TRANSFORMED[name](function))(q.dequantize(), x)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * float(jnp.abs(want).max()))


def test_a_stack_of_weights_under_vmap():
    qs = jax.vmap(lambda w: jc.Quantizer("int4", "group:32").quantize(w, axis=0))(normal(2, K, N))
    x = normal(2, 3, K)
    got = jax.vmap(jc.with_qtensors(function))(qs, x)
    want = jax.vmap(function)(jax.vmap(lambda q: q.dequantize())(qs), x)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_scales_have_gradients():
    q, x = weight(), normal(3, K)
    of = lambda f: jax.grad(lambda q: f(q, x).sum(), allow_int=True)(q).scale  # noqa: E731
    want = of(lambda q, x: function(q.dequantize(), x))
    np.testing.assert_allclose(of(jc.with_qtensors(function)), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("along", [False, True])
def test_any_number_of_rows_is_exported(along):
    q = weight("int4", None, (N, K) if along else (K, N), int(along))
    fn = jax.jit(jc.with_qtensors(lambda w, x: x @ w.T if along else x @ w))
    rows = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"rows, {K}"), "float32")
    exported = jax.export.export(fn)(q, rows)
    for x in (normal(1, K), normal(40, K)):
        close(exported.call(q, x), np.asarray(x, np.float64) @ (exact(q).T if along else exact(q)))


def test_inside_shard_map():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    q, x = weight(), normal(8, K)
    split = jax.shard_map(
        jc.with_qtensors(function), mesh=mesh, in_specs=(spec(), spec("data")),
        out_specs=spec("data"),
    )  # fmt: skip
    np.testing.assert_allclose(jax.jit(split)(q, x), function(q.dequantize(), x), atol=1e-5)


def test_another_transform_sees_the_product_that_was_written():
    q, x = weight(), normal(3, K)
    fn = jc.with_qtensors(lambda w, x: x @ w)
    (site,) = jc.sites(fn)(q, x)
    assert site.op == "dot_general" and [o.shape for o in site.operands] == [(3, K), (K, N)]
    rounded = jc.quantize_aware(fn, jc.Recipe([jc.Rule("*", activation="int2")]))(q, x)
    want = jc.Quantizer("int2", "token").fake_quantize(x, axis=1) @ q.dequantize()
    np.testing.assert_allclose(rounded, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))


# ---------------------------------------------------------------------- what it is for


@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_the_float_weight_is_never_written(along, rows):
    q, x = weight("int4", None, (N, K) if along else (K, N), int(along)), normal(rows, K)
    matrix, lies_along = qdot._as_matrix(q, (int(along),), (1 - int(along),))
    assert lies_along == along
    loop = jax.make_jaxpr(lambda q, x: qdot._matmul(q, along, x))(matrix, x)
    assert not big_floats(loop.jaxpr, K * N // 2)
    assert big_floats(jax.make_jaxpr(lambda q: q.dequantize())(q).jaxpr, K * N // 2)  # it detects
    fn = jc.with_qtensors(lambda w, x: x @ w.T if along else x @ w)
    memory = jax.jit(fn).lower(q, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * K * N / 2


def test_examples_of_vmap_count_as_rows():
    q = weight()
    kinds = []
    for count in (4, 400):
        fn = jax.vmap(lambda x: qdot._matmul(q, False, x[None])[0])
        text = str(jax.make_jaxpr(fn)(normal(count, K)))
        kinds.append("dot_general" in text)
    assert kinds == [False, True]  # sums of a few rows; blocks of channels
