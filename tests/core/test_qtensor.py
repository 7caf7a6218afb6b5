# SPDX-License-Identifier: Apache-2.0
"""QTensor: what it stores, what it stands for, and that it is an ordinary pytree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import formats
from jaxcompress._core.blocks import Blocks
from jaxcompress._core.qtensor import QTensor, nbytes


def example(fmt="int4", shape=(6, 5), scale_shape=(1, 5), zero_point=None, **kwargs):
    fmt = formats.get(fmt)
    rng = np.random.default_rng(0)
    codes = rng.integers(fmt.min, fmt.max + 1, shape).astype(fmt.dtype)
    scale = rng.uniform(0.5, 2, scale_shape).astype(np.float32)
    arrays = jnp.asarray(codes), jnp.asarray(scale), zero_point
    return codes, scale, QTensor.from_codes(*arrays, format=fmt, dtype="float32", **kwargs)


@pytest.mark.parametrize("fmt", ["int2", "int3", "int4", "int5", "int8", "uint4", "uint8"])
def test_attributes_and_values(fmt):
    codes, scale, q = example(fmt)
    np.testing.assert_array_equal(q.codes, codes)
    np.testing.assert_array_equal(q.scale, scale)
    assert q.codes.dtype == q.format.dtype and q.format is formats.get(fmt)
    assert (q.shape, q.ndim, q.size, q.dtype) == ((6, 5), 2, 30, np.float32)
    assert q.zero_point is None
    assert q.nbytes == 6 * -(-5 * q.format.bits // 8) + 4 * 5
    np.testing.assert_array_equal(q.dequantize(), codes.astype(np.float32) * scale)


def test_zero_points_are_packed_like_codes():
    zero = jnp.arange(5.0).reshape(1, 5)
    codes, scale, q = example("uint4", zero_point=zero)
    np.testing.assert_array_equal(q.zero_point, zero)
    assert q.zero_point.dtype == jnp.uint8
    assert q.nbytes == 6 * 3 + 4 * 5 + 3
    want = (codes.astype(np.float32) - np.arange(5, dtype=np.float32)) * scale
    np.testing.assert_array_equal(q.dequantize(), want)


def test_dequantizes_to_its_dtype():
    codes, scale, _ = example()
    q = QTensor.from_codes(jnp.asarray(codes), scale, format="int4", dtype=jnp.bfloat16)
    assert q.dequantize().dtype == jnp.bfloat16 == q.dtype


def test_float_codes():
    codes = jnp.array([1.5, -448.0], jnp.float8_e4m3fn)
    q = QTensor.from_codes(codes, jnp.ones(1), format="float8_e4m3fn", dtype="float32")
    np.testing.assert_array_equal(q.dequantize(), [1.5, -448.0])
    assert q.nbytes == 2 + 4


# The order given in `axis` decides which values are consecutive; the place is that of the lowest.
@pytest.mark.parametrize("axis, size", [((-3,), 2), ((-1,), 3), ((-3, -2), 4), ((-1, -3), 6),
                                        ((-2,), 2), ((-3, -2, -1), 7)])  # fmt: skip
def test_blocks_against_a_numpy_loop(axis, size):
    x = np.arange(1, 61, dtype=np.float32).reshape(4, 3, 5)
    blocks = Blocks(axis, size)
    split = np.asarray(blocks.split(jnp.asarray(x)))
    assert split.shape == blocks.split_shape(x.shape)
    inner = blocks.inner_axis(3)
    assert split.shape[inner] == size
    flat = np.moveaxis(split, (inner - 1, inner), (0, 1)).reshape(-1, *np.delete(
        split.shape, (inner - 1, inner)))  # fmt: skip
    lengths = [x.shape[a] for a in axis]
    for i in range(flat.shape[0]):
        if i < np.prod(lengths):
            index = [slice(None)] * 3
            for a, where in zip(axis, np.unravel_index(i, lengths), strict=True):
                index[a] = where
            np.testing.assert_array_equal(flat[i], x[tuple(index)])
        else:
            np.testing.assert_array_equal(flat[i], 0)
    np.testing.assert_array_equal(blocks.merge(jnp.asarray(split), x.shape), x)


def test_blocks_scale_consecutive_values():
    codes = jnp.ones((4, 2), jnp.int8)
    scale = jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]])
    q = QTensor.from_codes(codes, scale, format="int4", dtype="float32", blocks=Blocks((-2,), 2))
    np.testing.assert_array_equal(q.dequantize(), [[1, 2], [1, 2], [3, 4], [3, 4]])


def test_is_a_pytree_through_jit_scan_and_vmap():
    codes, scale, q = example("int3", (7, 6, 5), (7, 1, 5))
    want = codes.astype(np.float32) * scale
    leaves, tree = jax.tree.flatten(q)
    assert [leaf.dtype for leaf in leaves] == [jnp.uint8, jnp.float32]
    assert jax.tree.unflatten(tree, leaves).shape == (7, 6, 5)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert paths == [".packed", ".scale"]

    def body(carry, one):
        assert one.shape == (6, 5)
        return carry, one.dequantize()

    np.testing.assert_array_equal(jax.jit(lambda q: q.dequantize())(q), want)
    np.testing.assert_array_equal(jax.lax.scan(body, 0, q)[1], want)
    np.testing.assert_array_equal(jax.vmap(QTensor.dequantize)(q), want)
    shape = jax.eval_shape(lambda q: q, q)
    assert (shape.shape, shape.nbytes) == (q.shape, q.nbytes)


def test_grouped_stack_can_be_scanned():
    codes, scale, q = example("int4", (3, 4, 5), (3, 2, 1, 5), blocks=Blocks((-2,), 2))
    want = codes.astype(np.float32) * np.repeat(scale.reshape(3, 2, 5), 2, axis=1)
    np.testing.assert_array_equal(q.dequantize(), want)
    np.testing.assert_array_equal(jax.lax.scan(lambda c, q: (c, q.dequantize()), 0, q)[1], want)


def test_nbytes_of_a_tree():
    _, _, q = example("int4")
    tree = {
        "q": q,  # 6 * 3 + 20
        "bf16": jnp.zeros((3, 5), jnp.bfloat16),  # 30
        "int4": jnp.zeros(3, jnp.int4),  # 2
        "bool": np.zeros(9, bool),  # 9
        "later": jax.ShapeDtypeStruct((2, 2), jnp.float8_e5m2),  # 4
        "scalar": np.float64(1),  # 8
        "none": None,
    }
    assert nbytes(tree) == 38 + 30 + 2 + 9 + 4 + 8
    assert nbytes(jax.ShapeDtypeStruct((5,), jnp.float4_e2m1fn)) == 3
    assert nbytes(jax.random.key(0)) == 8
    assert nbytes({}) == 0
