# SPDX-License-Identifier: Apache-2.0
"""The packing on the host is that of `formats.pack`, and of a loop over bits."""

import numpy as np
import pytest

from jaxcompress import formats
from jaxcompress.export import _bits


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("size", [0, 1, 13, 32])
def test_pack_and_unpack(bits, size):
    codes = np.random.default_rng(bits).integers(-128, 128, (3, size), np.int8)
    low = codes.view(np.uint8) & (2**bits - 1)
    packed = _bits.pack(codes, bits)
    stream = sum(int(c) << bits * i for i, c in enumerate(low[1]))
    assert packed[1].tobytes() == stream.to_bytes(-(-size * bits // 8), "little")
    np.testing.assert_array_equal(packed, formats.pack(codes, bits))
    np.testing.assert_array_equal(_bits.unpack(packed, bits, size), low)
    want = np.where(low >= 2 ** (bits - 1), low.astype(int) - 2**bits, low)
    np.testing.assert_array_equal(_bits.signed(low, bits), want)
