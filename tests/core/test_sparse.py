# SPDX-License-Identifier: Apache-2.0
"""SparseTensor: what is stored, bit by bit, exact round trips, in functions, files and programs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import prune

RNG = np.random.default_rng(0)


def array(shape, dtype=np.float32, pattern=None, axis=-2):
    """Random numbers, about half of them zero; exactly N of M along an axis with a pattern."""
    x = RNG.normal(size=shape)
    if pattern is None:
        return np.where(RNG.random(shape) < 0.4, x, 0).astype(dtype)
    n, m = pattern
    rows = np.moveaxis(x, axis, -1).reshape(-1, m)
    for row in rows:
        row[RNG.permutation(m)[n:]] = 0
    moved = np.moveaxis(x, axis, -1)
    return np.moveaxis(rows.reshape(moved.shape), -1, axis).astype(dtype)


def same(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


dense_of = jax.jit(lambda s: s.dequantize())


@pytest.mark.parametrize("shape", [(8, 6), (3, 5, 7), (13,), (4, 0)], ids=str)
def test_bit_mask(shape):
    dtype = jnp.bfloat16 if shape == (8, 6) else np.float32
    x = array(shape, dtype)
    s = jc.SparseTensor.of(x)
    same(dense_of(s), x)
    flat = x.reshape(-1)
    same(s.values, flat[flat != 0])
    bits = sum(int(v != 0) << i for i, v in enumerate(flat))
    assert np.asarray(s.index).tobytes() == bits.to_bytes(-(-flat.size // 8), "little")
    assert s.nbytes == np.count_nonzero(x) * x.dtype.itemsize + -(-x.size // 8)
    assert (s.shape, s.dtype, s.ndim, s.size) == (x.shape, x.dtype, x.ndim, x.size)


@pytest.mark.parametrize(
    "pattern, shape, axis",
    [
        ((2, 4), (8, 6), -2),
        ((2, 4), (3, 16, 5), -2),
        ((1, 4), (6, 8), -1),
        ((2, 4), (3, 3, 8, 4), -2),
        ((3, 6), (12, 5), 0),
        ((4, 8), (8, 3), -2),
        ((4, 4), (4, 3), -2),
    ],
    ids=str,
)
def test_n_of_m(pattern, shape, axis):
    x = array(shape, pattern=pattern, axis=axis)
    s = jax.jit(lambda x: jc.SparseTensor.of(x, pattern=pattern, axis=axis))(x)
    same(dense_of(s), x)
    n, m = pattern
    bits, small = (m - 1).bit_length(), list(shape)
    small[axis] = shape[axis] // m * n
    assert s.nbytes == 4 * np.prod(small) + np.prod(small[:-1]) * -(-small[-1] * bits // 8)
    # the values of each group in order, and their places, from a loop
    places = np.zeros(small, int)
    for at in itertools.product(*(range(k) for k in small)):
        group = list(at)
        group[axis] = slice(at[axis] // n * m, at[axis] // n * m + m)
        kept = np.flatnonzero(x[tuple(group)])
        places[at] = kept[at[axis] % n]
        assert s.values[at] == x[tuple(group)][kept[at[axis] % n]]
    stream = sum(int(p) << bits * i for i, p in enumerate(places.reshape(-1, small[-1])[0]))
    first = np.asarray(s.index).reshape(-1, s.index.shape[-1])[0].tobytes()
    assert first == stream.to_bytes(-(-small[-1] * bits // 8), "little")


def test_fewer_than_n_a_mask_and_negative_zero():
    x = np.float32([[0.0], [0.0], [5.0], [0.0], [-0.0], [0.0], [0.0], [0.0]])
    same(jc.SparseTensor.of(x, pattern=(2, 4)).dequantize(), np.where(x == 0, np.float32(0), x))
    mask = np.array([[True], [False]] * 4)  # what is kept may be zero, what is not is lost
    for pattern in (None, (2, 4)):
        s = jc.SparseTensor.of(x + 1, mask, pattern=pattern)
        same(s.dequantize(), np.where(mask, x + 1, np.float32(0)))
        assert s.values.size == 4


def int8(v):
    return jc.Quantizer("int8").quantize(v, axis=-2)


W = array((64, 32), pattern=(2, 4))
X = RNG.normal(size=(5, 64)).astype(np.float32)


def fn(p, x):
    return jnp.tanh(x @ p["w"]) @ p["w"].T


def trees():
    return {
        "bit mask": {"w": jc.SparseTensor.of(W)},
        "2:4": {"w": jc.SparseTensor.of(W, pattern=(2, 4))},
        "2:4 of int8": {"w": jc.SparseTensor.of(W, pattern=(2, 4), quantize=int8)},
    }


@pytest.mark.parametrize("name", ["bit mask", "2:4", "2:4 of int8"])
def test_in_functions_files_and_programs(name, tmp_path):
    tree = trees()[name]
    dense = {"w": tree["w"].dequantize()}
    if name == "2:4 of int8":  # values are rounded as those of the dense array would be
        same(dense["w"], jc.Quantizer("int8").quantize(W, axis=0).dequantize())
        assert tree["w"].nbytes == 32 * 32 + 32 * 32 // 4 + 4 * 32
        assert tree["w"].nbytes / W.nbytes < 0.172
    want = np.asarray(jax.jit(fn)(dense, X))
    assert [s.name for s in jc.sites(fn)(tree, X)] == [s.name for s in jc.sites(fn)(dense, X)]
    same(jax.jit(jc.with_qtensors(fn))(tree, X), want)
    # int8 codes are taken as they are, as those of a QTensor of the whole array
    whole = jc.Quantizer("int8").quantize(W, axis=0) if "int8" in name else W
    aware = jax.jit(jc.quantize_aware(fn, "w8a8"))
    same(aware(tree, X), aware({"w": whole}, X))
    for path in (tmp_path / "one.safetensors", tmp_path / "folder"):
        jc.save_params(tree, path, max_shard_bytes=300)
        for lazy in (False, True):
            loaded = jc.load_params(path, lazy=lazy)
            assert loaded["w"].layout == tree["w"].layout
            assert loaded["w"].layout == name if "int8" in name else f"{name} of float32"
            jax.tree.map(same, loaded, tree)
        assert jax.tree.structure(jc.load_params(path)) == jax.tree.structure(tree)
        assert jax.tree.structure(jc.load_params(path, like=tree)) == jax.tree.structure(tree)
    program = jc.export.stablehlo(jc.with_qtensors(fn), tree, X, path=tmp_path / "a")
    np.testing.assert_allclose(program.run(X), want, rtol=1e-6, atol=1e-6)
    (row,) = program.report.rows
    assert row.weight == tree["w"].layout and row.bytes_after == tree["w"].nbytes
    with pytest.raises(jc.ArtifactError, match="`w` is a SparseTensor, which this layout"):
        jc.save_params(tree, tmp_path / "ct", layout="compressed-tensors")


def test_pruned_parameters_of_a_train_step(tmp_path):
    """2:4 in the optimizer and int8 in the function: stored, read again, the same outputs."""
    params = {"w": RNG.normal(size=(64, 32)).astype(np.float32)}
    tx = prune.nm(2, 4)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    params = jax.tree.map(jnp.add, params, updates)
    stored = prune.sparse(params, prune.masks(state), pattern=(2, 4), quantize=int8)
    jc.save_params(stored, tmp_path / "m")
    serve = jax.jit(jc.quantize_aware(lambda p, x: x @ p["w"], "w8a8"))
    same(serve(jc.load_params(tmp_path / "m"), X), serve(params, X))
    assert stored["w"].nbytes < 0.172 * params["w"].nbytes


def test_a_tree_with_what_is_left_alone():
    params = {"w": W, "b": np.ones(3, np.float32), "n": None}
    masks = {"w": W != 0, "b": True, "n": None}
    stored = prune.sparse(params, masks)
    assert stored["b"] is params["b"] and stored["n"] is None
    same(stored["w"].dequantize(), W)


@pytest.mark.parametrize(
    "run, message",
    [
        (lambda: jc.SparseTensor.of(np.ones((4, 2), int)), r"int\d+\[4, 2\]: expected floats"),
        (lambda: jc.SparseTensor.of(W, W[:1] != 0), r"the mask is bool\[1, 32\]"),
        (lambda: jc.SparseTensor.of(W, pattern=(1, 4)), "a group has 2 values .*prune.nm"),
        (lambda: jc.SparseTensor.of(W, pattern=(2, 5)), "2:5 along axis -2 does not fit"),
        (lambda: jc.SparseTensor.of(W, pattern=(5, 4)), "5:4 along axis -2 does not fit"),
        (lambda: jax.jit(jc.SparseTensor.of)(W), "bit mask inside of jit"),
    ],
    ids=["ints", "mask", "too many", "divides", "n > m", "jit"],
)
def test_errors(run, message):
    with pytest.raises(jc.FormatError, match=message):
        run()


def test_files_that_do_not_fit():
    from jaxcompress._files import sparse

    s = trees()["2:4"]["w"]
    good, other = sparse.to_data(s), jc.SparseTensor.of(W)
    for data, values, index, message in (
        (
            good | {"shape": [64, 31]},
            s.values,
            s.index,
            r"index is \[32, 8\] and values \[32, 32\]",
        ),
        (good | {"pattern": [2, 3]}, s.values, s.index, "2:3 along axis -2"),
        (good | {"pattern": 2}, s.values, s.index, "its description is damaged"),
        (good | {"shape": [2**61, 1]}, s.values, s.index, "its description is damaged"),
        (good | {"axis": 0}, s.values, s.index, "2:4 along axis 0"),
        (good, s.values.astype(int), s.index, "wrong dtype"),
        (good, None, s.index, "no array"),
        (good | {"pattern": None}, other.values[1:], other.index, "1023 values and 1024 places"),
    ):
        with pytest.raises(jc.ArtifactError, match=message):
            sparse.from_data(data, values, index, "w")
