# SPDX-License-Identifier: Apache-2.0
"""Ternary codes, five a byte, against a loop over bytes and digits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import draw

import jaxcompress as jc
from jaxcompress import formats
from jaxcompress._errors import FormatError

FMT = formats.ternary_base3
EVERY = np.array(list(itertools.product((-1, 0, 1), repeat=5)), np.int8)  # 243 rows of 5


def loop(codes):
    """From the definition: byte j of a row is the sum of (code 5 j + i, plus 1) times 3^i."""
    *rows, n = codes.shape
    out = np.zeros((*rows, (n + 4) // 5), np.uint8)
    for row in np.ndindex(*rows):
        for k in range(n):
            out[row][k // 5] += (int(codes[row][k]) + 1) * 3 ** (k % 5)
    return out


def test_all_243_bytes():
    packed = jax.jit(FMT.pack)(EVERY)
    assert packed.dtype == jnp.uint8 and packed.shape == (243, 1)
    np.testing.assert_array_equal(packed, loop(EVERY))
    assert sorted(np.ravel(packed).tolist()) == list(range(243))
    back = jax.jit(FMT.unpack, static_argnums=1)(packed, 5)
    assert back.dtype == jnp.int8
    np.testing.assert_array_equal(back, EVERY)
    flat = EVERY.ravel()
    np.testing.assert_array_equal(FMT.unpack(FMT.pack(flat), flat.size), flat)


@pytest.mark.parametrize("shape", [(1,), (4,), (5,), (6,), (3, 7), (2, 3, 11), (4, 0), (0, 5)])
def test_every_length(shape):
    codes = np.random.default_rng(0).integers(-1, 2, shape).astype(np.int8)
    packed = jax.jit(FMT.pack)(codes)
    np.testing.assert_array_equal(packed, loop(codes))
    assert packed.nbytes == FMT.packed_nbytes(shape)
    np.testing.assert_array_equal(FMT.unpack(packed, shape[-1]), codes)


def test_values_are_those_of_two_bits_and_bytes_are_true():
    assert formats.get("ternary_base3") == FMT != formats.ternary
    assert FMT.bits == 1.6 and formats.ternary.bits == 2
    x = draw(0, 64, 103)
    for granularity in ("channel", "group:16"):
        two, three = (jc.Quantizer(f, granularity) for f in ("ternary", "ternary_base3"))
        np.testing.assert_array_equal(three.fake_quantize(x, 0), two.fake_quantize(x, 0))
        stored = three.quantize(x, 0)
        np.testing.assert_array_equal(stored.dequantize(), two.fake_quantize(x, 0))
        np.testing.assert_array_equal(stored.codes, two.quantize(x, 0).codes)
        assert stored.packed.shape == (64, 21) and stored.packed.dtype == jnp.uint8
        scales = 4 * 103 * (1 if granularity == "channel" else 4)
        assert stored.nbytes == 64 * 21 + scales == three.nbytes(x.shape, 0) == jc.nbytes(stored)
        assert two.nbytes(x.shape, 0) == 64 * 26 + scales
    stack = jax.vmap(lambda x: three.quantize(x, 0))(jnp.stack([x, -x]))
    for sign, one in zip((1, -1), jax.lax.map(jc.QTensor.dequantize, stack), strict=True):
        np.testing.assert_array_equal(one, sign * stored.dequantize())


def test_bad_arguments():
    with pytest.raises(FormatError, match=r"ternary codes as int8 .* got uint8 of shape \(3,\)"):
        FMT.pack(jnp.zeros(3, jnp.uint8))
    with pytest.raises(FormatError, match=r"got int8 of shape \(\)"):
        FMT.pack(jnp.int8(1))
    with pytest.raises(FormatError, match=r"11 ternary codes, five a byte, .* 3 .* shape \(2,\)"):
        FMT.unpack(jnp.zeros(2, jnp.uint8), 11)
    with pytest.raises(FormatError, match="got int8"):
        FMT.unpack(jnp.zeros(2, jnp.int8), 10)
