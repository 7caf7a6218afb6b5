# SPDX-License-Identifier: Apache-2.0
"""QTensors as arguments: of the functions of JAX, of transformed functions, of checkpoints."""

import json

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from twins import big_floats, normal

import jaxcompress as jc
from jaxcompress._core import qdot
from jaxcompress._core.qtensor import QTensor
from jaxcompress._quantize.storage import packed_params

FORMATS = ["int4", "uint4", "mxfp4", "nvfp4", "nf4", "float8_e4m3fn"]


def quantized(fmt="int4", shape=(64, 32), granularity=None, axis=0):
    return jc.Quantizer(fmt, granularity).quantize(normal(*shape), axis=axis)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def close(a, b):
    """Equal but for the order in which XLA adds up, which depends on what it fuses."""
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(b).max()))


# ---------------------------------------------------------------------- the functions of JAX


def test_methods_mirror_arrays():
    q = quantized("uint4", (4, 32, 6), "group:8", axis=1)
    a = np.asarray(q.dequantize())
    ids = jnp.array([3, 0, 3])
    for got, want in [
        (q.T, a.T),
        (q.transpose(1, 0, 2), a.transpose(1, 0, 2)),
        (q.transpose((0, 2, 1)), a.transpose(0, 2, 1)),
        (q.reshape(4, -1, 8, 6), a.reshape(4, -1, 8, 6)),
        (q[1], a[1]),
        (q[1:3, 8:24, ::2], a[1:3, 8:24, ::2]),
        (q[ids], a[np.asarray(ids)]),
        (q.astype(jnp.bfloat16), jnp.asarray(a).astype(jnp.bfloat16)),
    ]:
        assert isinstance(got, QTensor) and got.shape == want.shape
        np.testing.assert_array_equal(got.dequantize(), want)
    assert jc.nbytes(q.T) == jc.nbytes(q)


def test_numpy_arrays_times_qtensors():
    q, x = quantized("int4", (32, 6)), np.ones((4, 32), np.float32)
    a = np.asarray(q.dequantize())
    for got, want in [(x @ q, x @ a), (q.T @ x.T, a.T @ x.T)]:
        assert isinstance(got, jax.Array)
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_methods_that_cannot_say_so():
    q = quantized("int4", (64, 32), "group:16")
    with pytest.raises(jc.FormatError, match=r"indexing with slice\(8, 24.*groups.*dequantize"):
        q[8:24]
    with pytest.raises(jc.FormatError, match="astype.int32"):
        q.astype(jnp.int32)
    half = jc.QTensor.from_codes(q.codes, q.scale, format="int4", dtype="bfloat16", blocks=q.blocks)
    with pytest.raises(jc.FormatError, match="astype.float32"):
        half.astype(jnp.float32)  # values were rounded to bfloat16 already


def test_rows_out_of_bounds_are_nan_as_in_an_array():
    for fmt in FORMATS:
        q = quantized(fmt, (8, 64), axis=1)
        take = jc.with_qtensors(lambda a, i: jnp.take(a, i, axis=0))
        got = take(q, jnp.array([1, 9]))
        assert np.isnan(got[1]).all()
        np.testing.assert_array_equal(got[0], q.dequantize()[1])


@pytest.mark.parametrize("fmt", FORMATS)
def test_export_round_trip(fmt):
    q, x = quantized(fmt), normal(3, 64, seed=1)
    exported = jax.export.export(jax.jit(lambda q, x: x @ q.dequantize()))(q, x)
    again = jax.export.deserialize(exported.serialize())
    same(again.call(q, x), jax.jit(lambda q, x: x @ q.dequantize())(q, x))


def test_export_stores_learned_codebooks_and_tiles_without_pickle():
    book = jc.formats.codebook_from_data(normal(8, 8), 3)
    tiles = jc.Quantizer("int4", jc.per_block(4, 4)).quantize(normal(8, 8), axis=0)
    tree = {"book": jc.Quantizer(book).quantize(normal(8, 8), axis=0), "tiles": tiles}
    exported = jax.export.export(jax.jit(lambda tree: tree))(tree)
    data = exported.serialize()
    again = jax.export.deserialize(data)
    same(again.call(tree), tree)
    assert again.out_tree == jax.tree.structure(tree)
    start = bytes(data).index(b'{"format"')
    text, _ = json.JSONDecoder().raw_decode(bytes(data)[start:].decode("latin1"))
    assert set(text) == {"format", "dtype", "unused", "blocks", "axis"}
    assert b"\x80\x04" not in bytes(data)[start : start + 500]  # how a pickle starts


def test_a_learned_codebook_counts():
    book = jc.formats.codebook([0.0, 1.0, 3.0, 4.0], scaled=False)
    quantizer = jc.Quantizer(book)
    q = quantizer.quantize(normal(6, 8), axis=0)
    assert q.nbytes == jc.nbytes({"q": q}) == 6 * 2 + 4 + 4 * 4  # codes, scale, table
    assert quantizer.nbytes((6, 8), 0) == q.nbytes
    assert quantized("nf4", (64, 32)).nbytes == 64 * 16 + 4 * 32


def test_tree_functions_and_paths():
    q = quantized("nvfp4")
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path({"w": q})]
    assert paths == ["['w'].packed", "['w'].scale", "['w'].global_scale"]
    doubled = jax.tree.map(lambda x: x * 2 if x.dtype == jnp.float32 else x, q)
    np.testing.assert_array_equal(doubled.dequantize(), 2 * q.dequantize())


def test_donation():
    q = jax.tree.map(jnp.copy, quantized())
    out = jax.jit(lambda q: jax.tree.map(lambda x: x, q), donate_argnums=0)(q)
    assert all(x.is_deleted() for x in jax.tree.leaves(q))
    same(out, quantized())


@pytest.mark.parametrize("fmt", ["int4", "uint4", "nvfp4"])
def test_a_stack_is_scanned_and_mapped(fmt):
    layers = normal(3, 64, 32)
    quantizer = jc.Quantizer(fmt)
    q = jax.vmap(lambda w: quantizer.quantize(w, 0))(layers)
    want = np.stack([quantizer.quantize(w, 0).dequantize() for w in layers])
    np.testing.assert_array_equal(q.dequantize(), want)  # global scales have a leading axis
    np.testing.assert_array_equal(jax.vmap(QTensor.dequantize)(q), want)
    scan = jax.jit(lambda q: lax.scan(lambda c, q: (c, q.dequantize()), 0, q)[1])
    np.testing.assert_array_equal(scan(q), want)
    np.testing.assert_array_equal(q[1].dequantize(), want[1])


# ---------------------------------------------------------------------- devices

MESH = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.cover
@pytest.mark.parametrize("granularity", ["channel", "group:16", "tensor"])
@pytest.mark.parametrize("spec", [P("a", None), P(None, "b"), P("a", "b")])
def test_device_put_and_shard_map(granularity, spec):
    q = quantized("uint4", (64, 32), granularity)
    placed = jax.device_put(q, q.partition(NamedSharding(MESH, spec)))
    same(placed, q)
    assert placed.packed.sharding.spec == P(*spec)
    part = placed.packed.addressable_shards[0].data.nbytes
    assert part * np.prod([MESH.shape[n] for n in spec if n]) == q.packed.nbytes
    np.testing.assert_array_equal(jax.jit(QTensor.dequantize)(placed), q.dequantize())

    def local(q):
        assert q.shape == tuple(n // MESH.shape.get(s, 1) for n, s in zip((64, 32), spec))
        return q.dequantize()

    with jax.set_mesh(MESH):
        run = jax.shard_map(local, in_specs=(q.partition(spec),), out_specs=spec)
        np.testing.assert_array_equal(jax.jit(run)(placed), q.dequantize())

    # inside a function that knows nothing of QTensors
    body = lambda w: w * 2  # noqa: E731
    fn = jax.shard_map(body, mesh=MESH, in_specs=(spec,), out_specs=spec)
    np.testing.assert_array_equal(jax.jit(jc.with_qtensors(fn))(q), 2 * q.dequantize())


def test_a_part_of_a_byte_or_group_cannot_be_split_off():
    q = quantized("int4", (64, 6))
    with pytest.raises(jc.FormatError, match="part of a byte or of a group"):
        q.partition(NamedSharding(MESH, P(None, "b")))  # 3 codes each
    q = quantized("int4", (64, 32), "group:32")
    with pytest.raises(jc.FormatError, match="part of a byte or of a group"):
        q.partition(NamedSharding(MESH, P("a", None)))


def test_orbax_restores_bit_for_bit(tmp_path):
    tree = {fmt: quantized(fmt) for fmt in FORMATS} | {"bias": normal(3)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", tree)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(lambda: tree)
        same(checkpointer.restore(tmp_path / "saved", abstract), tree)


# ---------------------------------------------------------------------- transformed functions


def mlp(p, x):
    x = jnp.tanh(x @ p["up"] + p["bias"])
    return x @ p["down"].T


def stack(p, x):
    def layer(x, w):
        h = jnp.tanh(x @ w["in"])
        return x + h @ w["out"].reshape(32, 64), None

    return lax.scan(jax.checkpoint(layer), x, p)[0]


def tied(p, ids):
    x = p["table"][ids]
    return jnp.tanh(x @ p["w"]) @ p["table"].T


def branches(p, x):
    @jax.jit
    def inner(w, x):
        return lax.cond(x.sum() > 0, lambda w, x: x @ w, lambda w, x: x @ w + 1, w, x)

    def body(c):
        return c[0] + 1, jnp.tanh(inner(p["w"], c[1]))

    return lax.while_loop(lambda c: c[0] < 3, body, (0, x))[1]


@jax.custom_vjp
def product(w, x):
    return x @ w


product.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))


@jax.custom_jvp
def tangent(w, x):
    return x @ w


@tangent.defjvp
def _tangent(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return x @ w, dx @ w + x @ dw


MODELS = {
    "mlp": (mlp, {"up": normal(64, 32), "bias": normal(1, 32), "down": normal(64, 32, seed=2)}),
    "stack": (stack, {"in": normal(3, 64, 32), "out": normal(3, 32, 8, 8)}),
    "tied": (tied, {"table": normal(16, 32), "w": normal(32, 32)}),
    "branches": (branches, {"w": normal(64, 64)}),
    "custom_vjp": (lambda p, x: product(p["w"], jnp.sin(x)), {"w": normal(64, 32)}),
    "custom_jvp": (lambda p, x: tangent(p["w"], jnp.sin(x)), {"w": normal(64, 32)}),
    "half": (lambda p, x: (x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)),
             {"w": normal(64, 32)}),
}  # fmt: skip
PACKED = {"mlp": {"up", "down"}, "stack": {"in", "out"}, "tied": {"table", "w"}}
RECIPES = {
    "w8a8": "w8a8",
    "w4a16-g32": "w4a16-g32",
    "nvfp4": "nvfp4",
    "uint4": jc.Recipe([jc.Rule("*", weight=jc.Quantizer("uint4", "channel"))], "uint4"),
}


def inputs(name):
    return jnp.array([[3, 1], [0, 3]]) if name == "tied" else normal(5, 64, seed=3)


@pytest.mark.cover(times=2)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_train_equals_serve(name, recipe):
    (fn, params), x = MODELS[name], inputs(name)
    recipe = RECIPES[recipe]
    aware = jax.jit(jc.quantize_aware(fn, recipe))
    (packed, _), _ = packed_params(fn, recipe)(params, x)
    found = {k for k, v in packed.items() if isinstance(v, QTensor)}
    assert found == PACKED.get(name, {"w"})
    assert all(v.shape == params[k].shape for k, v in packed.items())
    want = aware(params, x)
    same(aware(packed, x), want)
    # and without the recipe, where it rounds weights only
    if "a16" in str(recipe):
        same(jax.jit(jc.with_qtensors(fn))(packed, x), want)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"branches"}))  # a while loop has none
def test_gradients_of_what_is_beside(name):
    (fn, params), x = MODELS[name], inputs(name)
    (packed, _), _ = packed_params(fn, "w4a16-g32")(params, x)
    plain = jax.tree.map(lambda q: q.dequantize() if isinstance(q, QTensor) else q, packed,
                         is_leaf=lambda q: isinstance(q, QTensor))  # fmt: skip

    def loss(fn):
        return lambda p, x: (fn(p, x).astype(jnp.float32) ** 2).sum()

    ours, theirs = jc.with_qtensors(fn), fn
    if name != "tied":
        close(*(jax.jit(jax.grad(loss(f), 1))(p, x) for f, p in ((ours, packed), (theirs, plain))))
    if "bias" in params:
        got = jax.jit(jax.grad(loss(ours), allow_int=True))(packed, x)["bias"]
        close(got, jax.jit(jax.grad(loss(theirs)))(plain, x)["bias"])


def test_forward_mode_through_a_loop():
    fn, params = MODELS["branches"]
    x = inputs("branches")
    (packed, _), _ = packed_params(fn, "w4a16-g32")(params, x)
    plain = {"w": packed["w"].dequantize()}

    def derivative(fn, p):
        return jax.jvp(lambda x: fn(p, x), (x,), (jnp.ones_like(x),))[1]

    close(derivative(jc.with_qtensors(fn), packed), derivative(fn, plain))


def test_without_qtensors_nothing_changes():
    fn, params = MODELS["stack"]
    x = inputs("stack")
    same(jax.jit(jc.with_qtensors(fn))(params, x), jax.jit(fn)(params, x))


def test_what_cannot_be_packed_stays_in_float():
    def fn(p, x):
        return x @ (p["w"] + p["a"] @ p["b"]) + x @ p["two"] + (x.T @ p["rest"][0:5]).sum() + (
            x @ p["two"].T)  # fmt: skip

    params = {"w": normal(64, 64), "a": normal(64, 2), "b": normal(2, 64), "two": normal(64, 64),
              "rest": normal(6, 64)}  # fmt: skip
    x = normal(5, 64)
    (packed, _), _ = packed_params(fn, "w8a16")(params, x)
    assert not any(isinstance(v, QTensor) for v in packed.values())


def test_a_scan_never_sees_the_stack_in_float():
    fn, params = MODELS["stack"]
    x = inputs("stack")
    (packed, _), _ = packed_params(fn, "w4a16-g32")(params, x)
    size = params["in"].size
    jaxpr = jax.make_jaxpr(jc.with_qtensors(fn))(packed, x).jaxpr
    assert not big_floats(jaxpr, size)
    dequantized = jax.make_jaxpr(lambda q: q.dequantize())(packed["in"]).jaxpr
    assert big_floats(dequantized, size)  # the detector detects


def test_lookups_read_rows_only():
    table = jc.Quantizer("int4").quantize(normal(64, 32), axis=1)
    fn = jc.with_qtensors(lambda t, ids: jnp.sin(t[ids]))
    assert not big_floats(jax.make_jaxpr(fn)(table, jnp.arange(3)).jaxpr, 64 * 32)


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize("granularity", ["channel", "group:128"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_matmul_needs_less_than_half_of_the_float_weight(granularity, transposed):
    n, axis = 2048, 1 if transposed else 0
    q = jc.Quantizer("int4", granularity).quantize(normal(n, n), axis=axis)
    x = normal(16, n, seed=1)
    plain = (lambda w, x: x @ w.T) if transposed else (lambda w, x: x @ w)
    want = jax.jit(plain)(q.dequantize(), x)
    for fn in (jc.with_qtensors(plain), plain):  # with `x @ q` and `q.T` as operators too
        compiled = jax.jit(fn).lower(q, x).compile()
        close(compiled(q, x), want)
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * n * n / 2
    assert qdot._SMALLEST <= n * n


def test_report_of_packed_parameters():
    def fn(p, x):
        return x @ p["w"] + jnp.sin(p["other"]).sum()

    params = {"w": quantized("int4"), "other": quantized("uint4")}
    rows = {r.site: r for r in jc.report(fn, "w4a16-g32")(params, normal(3, 64)).rows}
    assert rows["w"].weight == "int4, packed"
    assert rows["w"].bytes_before == rows["w"].bytes_after == params["w"].nbytes
    assert rows["other"].weight == "uint4, packed"
    assert rows["other"].bytes_after == params["other"].nbytes
    assert "dequantized where it is" in rows["other"].reason
