# SPDX-License-Identifier: Apache-2.0
"""The order of bits of `formats.pack` in NumPy: for the host, where nothing has to be compiled."""

from __future__ import annotations

import numpy as np


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs the low bits of codes along their last axis, low bits first.

    Args:
      codes: int8 or uint8[..., n].
      bits: 1 to 8.

    Returns:
      uint8[..., ceil(n * bits / 8)].

    >>> [hex(b) for b in pack(np.array([1, -2, 7, -8], np.int8), 4)]
    ['0xe1', '0x87']
    """
    codes = np.ascontiguousarray(codes).view(np.uint8)
    if 8 % bits:
        ones = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
        return np.packbits(ones.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")
    fields = 8 // bits
    gap = -codes.shape[-1] % fields
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, gap)]) & np.uint8(2**bits - 1)
    packed = codes[..., ::fields].copy()
    for i in range(1, fields):
        packed |= codes[..., i::fields] << np.uint8(i * bits)
    return packed


def unpack(packed: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Takes apart what `pack` made.

    Args:
      packed: uint8[..., at least ceil(size * bits / 8)].
      bits: 1 to 8.
      size: number of codes in a row.

    Returns:
      uint8[..., size]; signs are not extended.
    """
    if 8 % bits:
        ones = np.unpackbits(packed, axis=-1, count=size * bits, bitorder="little")
        ones = ones.reshape(*packed.shape[:-1], size, bits)
        return np.packbits(ones, axis=-1, bitorder="little")[..., 0]
    fields = 8 // bits
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * fields), np.uint8)
    for i in range(fields):
        codes[..., i::fields] = packed >> np.uint8(i * bits) & np.uint8(2**bits - 1)
    return codes[..., :size]


def signed(codes: np.ndarray, bits: int) -> np.ndarray:
    """The int8 of codes in two's complement of so many bits."""
    return (codes << np.uint8(8 - bits)).view(np.int8) >> np.int8(8 - bits)
