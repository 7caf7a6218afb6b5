# SPDX-License-Identifier: Apache-2.0
"""The packing on the host is that of `formats.pack`, and of a loop over bits."""

import numpy as np
import pytest

from jaxcompress import formats
from jaxcompress._files import bits


@pytest.mark.cover
@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("size", [0, 1, 13, 32])
def test_pack_and_unpack(width, size):
    codes = np.random.default_rng(width).integers(-128, 128, (3, size), np.int8)
    low = codes.view(np.uint8) & (2**width - 1)
    packed = bits.pack(codes, width)
    stream = sum(int(c) << width * i for i, c in enumerate(low[1]))
    assert packed[1].tobytes() == stream.to_bytes(-(-size * width // 8), "little")
    np.testing.assert_array_equal(packed, formats.pack(codes, width))
    np.testing.assert_array_equal(bits.unpack(packed, width, size), low)
    want = np.where(low >= 2 ** (width - 1), low.astype(int) - 2**width, low)
    np.testing.assert_array_equal(bits.signed(low, width), want)
