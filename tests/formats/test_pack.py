# SPDX-License-Identifier: Apache-2.0
"""Packing against NumPy's packbits and golden words of ONNX and compressed-tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import formats
from jaxcompress._errors import FormatError

every_width = pytest.mark.parametrize("bits", range(1, 9))
both_dtypes = pytest.mark.parametrize("dtype", [np.int8, np.uint8])


def random_codes(bits, dtype, shape):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if dtype == np.int8 else (0, 2**bits)
    return np.random.default_rng(bits).integers(low, high, shape).astype(dtype)


def numpy_pack(codes, bits):
    fields = codes.view(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    return np.packbits(fields.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


@pytest.mark.cover(times=2)
@every_width
@both_dtypes
@pytest.mark.parametrize("shape", [(1,), (8,), (3, 7), (2, 3, 16), (4, 0), (0, 5)])
def test_identity_and_stream(bits, dtype, shape):
    codes = random_codes(bits, dtype, shape)
    packed = jax.jit(formats.pack, static_argnums=1)(codes, bits)
    assert packed.dtype == jnp.uint8
    assert packed.nbytes == formats.packed_nbytes(shape, bits)
    if codes.size:
        np.testing.assert_array_equal(packed, numpy_pack(codes, bits))
    back = jax.jit(formats.unpack, static_argnums=(1, 2, 3))(packed, bits, shape[-1], dtype)
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, codes)


# fmt: off
@pytest.mark.parametrize("origin, bits, codes, want", [
    ("ONNX INT4", 4, [1, -2, 7, -8], "e1 87"),
    ("ONNX UINT4", 4, [1, 2, 15], "21 0f"),
    ("ONNX INT2", 2, [1, -2, 0, -1, 1], "c9 01"),
    ("sparse-bitmask", 1, [1, 0, 1, 0, 0, 1, 1, 0, 1, 1, 0, 0], "65 03"),
    ("compressed-tensors int4, + 8", 4, [0, 1, 8, 15, 9, 10, 11, 7], "10 f8 a9 7b"),
    ("compressed-tensors int3, + 4", 3, list(range(8)) * 4,
     "88 c6 fa 88 c6 fa 88 c6 fa 88 c6 fa"),
])
# fmt: on
def test_golden(origin, bits, codes, want):
    packed = formats.pack(jnp.array(codes, jnp.int8), bits)
    assert np.asarray(packed).tobytes().hex(" ") == want


def test_golden_words_of_compressed_tensors():
    packed = formats.pack(jnp.array([0, 1, 8, 15, 9, 10, 11, 7], jnp.uint8), 4)
    assert np.asarray(packed).view("<u4").tolist() == [0x7BA9F810]
    packed = formats.pack(jnp.array(list(range(8)) * 4, jnp.uint8), 3)
    assert np.asarray(packed).view("<u4").tolist() == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]


def test_drops_high_bits_and_maps_over_leading_axes():
    codes = jnp.array([[0x1F, 0x20], [0x31, 0x42]], jnp.uint8)
    packed = jax.vmap(lambda c: formats.pack(c, 4))(codes)
    np.testing.assert_array_equal(packed, [[0x0F], [0x21]])


def test_bad_arguments():
    codes = jnp.zeros((2, 3), jnp.int8)
    with pytest.raises(FormatError, match="pack handles codes of 1 to 8 bits, asked for 9"):
        formats.pack(codes, 9)
    with pytest.raises(FormatError, match=r"pack takes int8 or uint8 .* got int32 of shape \(3,\)"):
        formats.pack(jnp.arange(3), 4)
    with pytest.raises(FormatError, match=r"got int8 of shape \(\)"):
        formats.pack(jnp.int8(1), 4)
    with pytest.raises(FormatError, match="unpack takes uint8 with at least one axis, got int8"):
        formats.unpack(codes, 4, 6, jnp.int8)
    with pytest.raises(FormatError, match=r"9 codes of 4 bits fill 5 bytes, .*\(2, 3\) holds 3"):
        formats.unpack(codes.astype(jnp.uint8), 4, 9, jnp.int8)
    with pytest.raises(FormatError, match="int8 or uint8, asked for int32"):
        formats.unpack(codes.astype(jnp.uint8), 4, 6, "int32")
