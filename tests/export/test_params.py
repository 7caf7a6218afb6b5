# SPDX-License-Identifier: Apache-2.0
"""Parameters on disk: exact round trips, the layout as other readers see it, files and shards."""

import collections
import dataclasses
import json
import os
import struct
from typing import Any, NamedTuple

import flax
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from safetensors import safe_open
from trees import assert_same, stored
from twins import normal

import jaxcompress as jc
from jaxcompress._core.qtensor import Blocks, Tiles
from jaxcompress._files import safetensors

F = jc.formats
FORMATS = [
    *F.TABLE.values(),
    F.fixed_point(6, 4),
    F.fixed_point(12, 3, signed=False),
    F.minifloat(3, 2, bias=5),
    F.minifloat(4, 3, infinities=True, nan="ieee", subnormals=False),
    F.codebook([-1, 0, 0.3, 7]),
    F.codebook([-1, 0.5], scaled=False),
    F.codebook_from_data(jnp.sin(jnp.arange(50.0)), 3),
    F.mx("e3m2", scale_rule="ceil", block=16),
    F.mx(F.minifloat(3, 2, bias=5)),
    F.mx(F.p3109_draft(4), block=8),
    F.block_float(5, 16),
    F.block_float(12, 16),
]


@pytest.fixture(params=["file", "folder", "shards"])
def trip(request, tmp_path):
    """Saves and loads a tree in one of the three ways."""

    def run(tree, **kwargs):
        path = tmp_path / ("m.safetensors" if request.param == "file" else "m")
        jc.save_params(tree, path, max_shard_bytes=40 if request.param == "shards" else 10**9)
        return jc.load_params(path, **kwargs)

    return run


def weight(shape=(32, 48), dtype=jnp.float32):
    return normal(*shape, seed=1, dtype=dtype)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_every_format(fmt, tmp_path):
    q = stored(fmt)
    jc.save_params(q, tmp_path / "q")
    assert_same(jc.load_params(tmp_path / "q"), q)


@pytest.mark.parametrize("fmt", ["uint4", "mxfp4", "nvfp4", "float8_e4m3fn"])
def test_lazy(fmt, tmp_path):
    q = jax.jit(lambda w: jc.Quantizer(fmt).quantize(w, 0))(weight())
    jc.save_params(q, tmp_path / "q")
    lazy = jc.load_params(tmp_path / "q", lazy=True)
    for leaf in jax.tree.leaves(lazy):
        assert type(leaf) is np.ndarray and not leaf.flags.writeable
    assert_same(jax.tree.map(jnp.asarray, lazy), q)
    np.testing.assert_array_equal(lazy.dequantize(), q.dequantize())
    with open(tmp_path / "q/model.safetensors", "r+b") as file:  # what is on the disk shows
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    changed = [
        np.any(np.asarray(a).view(np.uint8) != np.asarray(b).view(np.uint8))
        for a, b in zip(*map(jax.tree.leaves, (lazy, q)))
        if np.ndim(a)
    ]
    assert sum(changed) == 1
    jc.load_params(tmp_path / "q", lazy=True)
    with pytest.raises(jc.ArtifactError, match="does not have its checksum"):
        jc.load_params(tmp_path / "q")


@pytest.mark.parametrize(
    ("quantizer", "shape", "axis"),
    [
        (jc.Quantizer("uint4", "group:8"), (32, 5), 0),  # zero points
        (jc.Quantizer("uint3"), (7, 5), 0),
        (jc.Quantizer("int8", jc.per_block(16, 8)), (32, 48), 0),
        (jc.Quantizer("int4", "group:24", indivisible="pad"), (32, 7), 0),
        (jc.Quantizer("int4", "group:128", indivisible="pad"), (9, 7), 0),
        (jc.Quantizer("int8", "group:6"), (3, 3, 4, 5), (2, 0, 1)),
        (jc.Quantizer("int8", "tensor"), (3, 0, 4), 0),
        (jc.Quantizer("int8", jc.per_block(128, 128), indivisible="pad"), (1, 1), 0),
    ],
    ids=lambda x: f"{x.format.name}-{x.granularity}" if isinstance(x, jc.Quantizer) else None,
)
def test_every_layout_of_scales(quantizer, shape, axis, trip):
    q = jax.jit(lambda w: quantizer.quantize(w, axis))(weight(shape, jnp.bfloat16))
    assert_same(trip({"q": q}), {"q": q})


def test_stacked_qtensors(trip):
    q = jax.vmap(lambda w: jc.Quantizer("nvfp4").quantize(w, 0))(weight((3, 32, 16)))
    assert_same(trip([q]), [q])
    sliced = jax.tree.map(lambda a: a[1], trip(q))
    assert_same(sliced, jax.tree.map(lambda a: a[1], q))


NUMPY = "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64 complex64"
SMALL = (
    "bfloat16 float8_e4m3fn float8_e5m2 float8_e8m0fnu float8_e3m4 float8_e4m3 float8_e4m3b11fnuz "
    "float8_e4m3fnuz float8_e5m2fnuz float4_e2m1fn float6_e2m3fn float6_e3m2fn int2 int4 uint2 "
    "uint4"
)


@pytest.mark.parametrize("name", [*NUMPY.split(), "complex128", *SMALL.split()])
def test_every_dtype(name, trip):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    bits = {"4": 4, "2": 2}.get(name[-1], 8) if "int" in name else 8 * dtype.itemsize
    bits = {"float4_e2m1fn": 4, "float6_e2m3fn": 6, "float6_e3m2fn": 6}.get(name, bits)
    raw = np.arange(2 ** min(bits, 8), dtype=np.uint8)
    if "int" in name and bits < 8:
        low = -(2 ** (bits - 1)) * (name[0] == "i")
        x = np.arange(low, low + 2**bits).astype(dtype)  # every number
    elif bits <= 8:
        x = raw.astype(bool) if name == "bool" else raw.view(dtype)  # every code, NaN too
    else:
        x = np.repeat(raw, dtype.itemsize).view(dtype)
    tree = {"x": x.reshape(2, -1), "zero": x[0:0].reshape(3, 0), "one": x[1:2].reshape(())}
    tree |= {"scalar": x[1], "columns": x.reshape(2, -1).T}
    if jax.dtypes.canonicalize_dtype(dtype) == dtype and "float6" not in name:
        tree |= {"jax": jnp.asarray(x), "jax one": jnp.asarray(x[1])}
    loaded = trip(tree)
    tree["columns"] = np.ascontiguousarray(tree["columns"])
    assert_same(loaded, tree)


def test_sub_byte_arrays_take_what_nbytes_says(tmp_path):
    tree = {"a": jnp.zeros((100, 100), jnp.int4), "b": np.zeros((64, 8), ml_dtypes.float6_e2m3fn)}
    jc.save_params(tree, tmp_path / "m.safetensors")
    header = safetensors.read_header(tmp_path / "m.safetensors")
    stored = sum(e.end - e.begin for e in header.entries.values())
    assert stored == jc.nbytes(tree) == 5000 + 64 * 6


class Point(NamedTuple):
    x: Any
    y: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any
    name: str = dataclasses.field(default="dense", metadata={"static": True})


def test_containers_and_python_leaves(trip):
    a = jnp.arange(3)
    tree = {
        "list": [a, None, [], ()],
        "tuple": ((a,), {}),
        "a/b": a,
        "a": {"b": a + 1, "": a, "__metadata__": a},  # names that would collide
        "q": jc.Quantizer("int8").quantize(jnp.ones((4, 2)), 0),
        "q:packed": a,
        "__metadata__": a + 2,
        0: True,
        "0": 2**80,
        None: -0.0,
        True: [float("nan"), float("-inf"), 1e-320, 1 + 2j, "text \udc80 \n\0"],
    }
    del tree[0]  # True == 0 + 1, so both can be keys; 1 and True cannot
    tree[0] = False
    assert_same(trip(tree), tree)
    for leaf in (a, 3, None, [], jc.Quantizer("int4").quantize(jnp.ones((4, 2)), 0)):
        assert_same(trip(leaf), leaf)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys(impl, trip):
    keys = jax.random.split(jax.random.key(3, impl=impl), 4)
    assert_same(trip({"k": keys, "one": keys[1]}), {"k": keys, "one": keys[1]})


def test_quant_params_need_no_like(trip):
    stored = jc.Quantizer("int8", "tensor", range="static")
    recipe = jc.Recipe([jc.Rule("*", activation=stored)])
    params = jc.quant_params(lambda w, x: x @ w, recipe)(jnp.eye(2), jnp.ones((1, 2)))
    assert_same(trip({"p": params}), {"p": params})


def test_other_nodes_with_and_without_like(trip):
    params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
    state = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(params)
    tree = {
        "state": state,
        "point": Point(jnp.arange(2), None),
        "layer": Layer(jnp.ones(2), jnp.zeros(2)),
        "frozen": flax.core.freeze({"a": {"b": jnp.ones(1)}}),
        "ordered": collections.OrderedDict(z=jnp.ones(1), a=jnp.zeros(1)),
        "nnx": nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))),
        "q": jc.Quantizer("int4", "group:2").quantize(jnp.ones((4, 2)), 0),
    }
    for like in (tree, jax.eval_shape(lambda: tree)):
        found = trip(tree, like=like)
        assert jax.tree.structure(found) == jax.tree.structure(tree)
        assert type(found["state"][1][0]) is optax.ScaleByAdamState
        assert type(found["frozen"]) is flax.core.FrozenDict
        jax.tree.map(np.testing.assert_array_equal, found, tree)
    plain = trip(tree)
    assert list(plain) == list(tree)
    assert plain["state"][1][0].keys() == {"count", "mu", "nu"}
    assert_same(plain["point"], {"x": tree["point"].x, "y": None})
    assert_same(plain["layer"], {"kernel": tree["layer"].kernel, "bias": tree["layer"].bias})
    assert_same(plain["frozen"], {"a": {"b": jnp.ones(1)}})
    np.testing.assert_array_equal(
        plain["nnx"]["kernel"]["value"], tree["nnx"]["kernel"].get_value()
    )


def test_a_compressed_model_is_loaded_like_the_float_one(trip):
    params = Point(jnp.ones((4, 2)), jnp.zeros(2))
    q = jc.Quantizer("int8").quantize(params.x, 0)
    found = trip(Point(q, params.y), like=params)
    assert type(found) is Point
    assert_same(found.x, q)


A = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("tree", "like", "message"),
    [
        ({"a": A}, {"b": A}, r"`tree` is a dict \(a\) in the file and a dict \(b\) in `like`"),
        ({"a": [A]}, {"a": (A,)}, r"`a` is a list \(0\) in the file and a tuple \(0\) in `like`"),
        ({"a": A}, {"a": A.T}, r"`a` has the shape \(2, 3\) in the file and \(3, 2\) in `like`"),
        (Point(A, A), {"x": A, "y": A}, r"`tree` is a Point \(x, y\) in the file and a dict"),
        ({"a": None}, {"a": A}, "`a` is a NoneType in the file and a"),
        ({"a": A}, {"a": A.astype(jnp.bfloat16)}, "the dtype float32 in the file and bfloat16"),
        (
            jc.Quantizer("int8").quantize(A, 0),
            jc.Quantizer("int4").quantize(A, 0),
            "`tree` is a QTensor of int8 in the file and a QTensor of int4",
        ),
    ],
)
def test_like_that_is_not_alike(tree, like, message, trip):
    with pytest.raises(jc.ArtifactError, match=message):
        trip(tree, like=like)


class Strange:
    pass


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (Strange(), "`a/b` is a Strange, which cannot be saved"),
        (np.array(["x", "y"]), "`a/b` has the dtype <U1, which cannot be saved"),
        (np.array([None]), "`a/b` has the dtype object"),
        (np.zeros(2, ">f4"), "`a/b` has the dtype >f4"),
        (np.zeros(2, [("x", "f4")]), "`a/b` has the dtype"),
        (b"bytes", "`a/b` is a bytes"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), "`a/b` is a ShapeDtypeStruct"),
        ({(1, 2): A}, r"The key \(1, 2\) below `a/b` is a tuple"),
        (
            dataclasses.replace(jc.Quantizer("int8").quantize(A, 0), unused=2),
            "2 codes of a packed row",
        ),
    ],
)
def test_what_cannot_be_saved(leaf, message, tmp_path):
    with pytest.raises(jc.ArtifactError, match=message):
        jc.save_params({"a": {"b": leaf}}, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_formats_without_plain_data_cannot_be_saved(tmp_path):
    fmt = dataclasses.replace(F.int8, name="mine")
    q = jc.Quantizer(fmt).quantize(A, 0)
    with pytest.raises(jc.FormatError, match="mine is not in the table of formats"):
        jc.save_params({"w": q}, tmp_path / "m")


def test_inside_jit(tmp_path):
    with pytest.raises(jc.ArtifactError, match="`w` is traced: save outside of jit"):
        jax.jit(lambda w: jc.save_params({"w": w}, tmp_path / "m"))(A)


def test_too_deep(tmp_path):
    tree = A
    for _ in range(5000):
        tree = [tree]
    with pytest.raises(jc.ArtifactError, match="nested too deeply"):
        jc.save_params(tree, tmp_path / "m")


def test_sharded_arrays_are_gathered(tmp_path):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    where = jax.NamedSharding(mesh, jax.P("x"))
    w = jax.device_put(weight((8, 4)), where)
    jc.save_params(w, tmp_path / "m")
    assert_same(jc.load_params(tmp_path / "m"), weight((8, 4)))


def test_float64_of_jax_is_not_cut(tmp_path):
    with jax.enable_x64(True):
        x = jnp.asarray(np.pi, jnp.float64)
        jc.save_params({"x": x}, tmp_path / "m")
        assert_same(jc.load_params(tmp_path / "m"), {"x": x})
    with pytest.raises(jc.ArtifactError, match="`x` is a JAX array of float64.*jax_enable_x64"):
        jc.load_params(tmp_path / "m")
    assert jc.load_params(tmp_path / "m", lazy=True)["x"] == np.pi


# --- the files as others see them


def test_the_safetensors_package_reads_it(tmp_path):
    q = jc.Quantizer("int4", "group:32").quantize(weight(), axis=0)
    tree = {"layer": {"kernel": q, "bias": jnp.arange(4.0)}, "e": jnp.ones(3, jnp.bfloat16)}
    jc.save_params(tree, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "numpy") as file:
        names = {"layer/kernel:packed", "layer/kernel:scale", "layer/bias", "e"}
        assert set(file.keys()) == names
        np.testing.assert_array_equal(file.get_tensor("layer/kernel:packed"), q.packed)
        np.testing.assert_array_equal(file.get_tensor("layer/kernel:scale"), q.scale)
        np.testing.assert_array_equal(file.get_tensor("layer/bias"), np.arange(4.0))
        about = json.loads(file.metadata()["jaxcompress"])
    assert about["schema_version"] == 1
    assert about["layout"] == "jaxcompress"
    data = (tmp_path / "m.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert (8 + length) % 64 == 0
    assert len(data) == 8 + length + jc.nbytes(tree)


def test_equal_trees_give_equal_files(tmp_path):
    for name in ("a", "b"):
        jc.save_params({"x": weight(), "y": 3}, tmp_path / f"{name}.safetensors")
    a, b = ((tmp_path / f"{n}.safetensors").read_bytes() for n in "ab")
    assert a == b


def test_shards_and_their_index(tmp_path):
    tree = {name: np.full(25, i, np.float32) for i, name in enumerate("abcde")}
    jc.save_params(tree, tmp_path / "m", max_shard_bytes=250)
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict(zip("abcde", [*files[:1] * 2, *files[1:2] * 2, files[2]]))
    assert index["metadata"]["total_size"] == 500
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "m" / file, "numpy") as shard:
            np.testing.assert_array_equal(shard.get_tensor(name), tree[name])
    assert_same(jc.load_params(tmp_path / "m"), tree)


def test_a_layer_in_four_bits_takes_055_bytes_a_weight(tmp_path):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(4096, 4096)).astype(np.float32))
    q = jc.Quantizer("int4", "group:128").quantize(w, axis=0)
    jc.save_params({"kernel": q}, tmp_path / "m")
    size = sum(p.stat().st_size for p in (tmp_path / "m").iterdir())
    assert size <= 0.55 * 4096**2
    assert size >= (4096**2 // 2 + 4096 * 32 * 4)


# --- replacing


def test_an_artifact_is_replaced_and_other_things_are_not(tmp_path):
    path = tmp_path / "m"
    path.mkdir()  # empty: as good as none
    jc.save_params({"a": A, "b": A}, path, max_shard_bytes=10)
    jc.save_params({"c": A}, path)
    assert [p.name for p in path.iterdir()] == ["model.safetensors"]
    (path / "notes.txt").write_text("mine")
    with pytest.raises(jc.ArtifactError, match="holds other things than an artifact: notes.txt"):
        jc.save_params({"d": A}, path)
    assert_same(jc.load_params(path), {"c": A})
    with pytest.raises(jc.ArtifactError, match="exists and is no directory"):
        jc.save_params({"d": A}, path / "notes.txt")
    with pytest.raises(jc.ArtifactError, match="exists and is not a file"):
        (tmp_path / "dir.safetensors").mkdir()
        jc.save_params({"d": A}, tmp_path / "dir.safetensors")
    jc.save_params({"c": A}, tmp_path / "new/m.safetensors")
    jc.save_params({"d": A}, tmp_path / "new/m.safetensors")
    assert_same(jc.load_params(tmp_path / "new/m.safetensors"), {"d": A})
    assert sorted(os.listdir(tmp_path)) == ["dir.safetensors", "m", "new"]


def test_arguments_that_are_wrong(tmp_path):
    with pytest.raises(jc.ArtifactError, match="There is no layout 'gguf'. Available: jaxcompress"):
        jc.save_params(A, tmp_path / "m", layout="gguf")
    with pytest.raises(jc.ArtifactError, match="max_shard_bytes=0"):
        jc.save_params(A, tmp_path / "m", max_shard_bytes=0)
    with pytest.raises(jc.ArtifactError, match="nothing cannot be read: No such file"):
        jc.load_params(tmp_path / "nothing")
    with pytest.raises(jc.ArtifactError, match="has neither model.safetensors nor"):
        jc.load_params(tmp_path)


def test_every_field_of_a_qtensor_is_known():
    """Blocks and Tiles are what a QTensor stores: a new field must be stored too."""
    fields = {f.name for f in dataclasses.fields(jc.QTensor)}
    assert fields == {
        *("packed", "scale", "packed_zero_point", "global_scale"),
        *("format", "dtype", "axis", "unused", "blocks"),
    }
    assert [f.name for f in dataclasses.fields(Blocks)] == ["axis", "size"]
    assert [f.name for f in dataclasses.fields(Tiles)] == ["columns", "rows"]
