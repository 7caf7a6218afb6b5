# SPDX-License-Identifier: Apache-2.0
"""Packs codes of 1 to 8 bits into bytes.

Code i of a row is bits [i*b, i*b + b) of a little-endian bit stream along the last axis: low bits
first, rows filled up with zero bits. Negative codes are two's complement. This is the order of
ONNX sub-byte tensors (rows that fill whole bytes) and, with u = q + 2^(b-1), of compressed-tensors
from version 0.18.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._errors import FormatError


def pack(codes: Any, bits: int) -> jax.Array:
    """Packs the codes along their last axis.

    Args:
        codes: int8 or uint8[..., n]; only the low bits are kept.
        bits: bits per code, 1 to 8.

    Returns:
        uint8[..., ceil(n * bits / 8)].

    Raises:
        FormatError: if the codes are not int8 or uint8, have no axis, or bits is not 1 to 8.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress import formats
        >>> [hex(b) for b in formats.pack(jnp.array([1, -2, 7, -8], jnp.int8), 4).tolist()]
        ['0xe1', '0x87']
    """
    codes = jnp.asarray(codes)
    _check(codes, bits, (jnp.int8, jnp.uint8), "pack")
    return _packed(codes, bits)


# One program for an array instead of one for each operation.
@functools.partial(jax.jit, static_argnums=1, inline=True)
def _packed(codes: jax.Array, bits: int) -> jax.Array:
    codes = lax.bitcast_convert_type(codes, jnp.uint8)
    if 8 % bits:
        codes = _flatten_last(_split(codes, bits, width=1))
        bits = 1
    fields = 8 // bits
    gap = -codes.shape[-1] % fields
    codes = lax.pad(codes, np.uint8(0), [(0, 0, 0)] * (codes.ndim - 1) + [(0, gap, 0)])
    return _join(codes.reshape(*codes.shape[:-1], codes.shape[-1] // fields, fields), width=bits)


def unpack(packed: Any, bits: int, size: int, dtype: Any) -> jax.Array:
    """Takes apart what `pack` made.

    Args:
        packed: uint8[..., ceil(size * bits / 8)].
        bits: bits per code, 1 to 8.
        size: number of codes in a row.
        dtype: of the codes: int8 extends the sign, uint8 does not.

    Returns:
        dtype[..., size].

    Raises:
        FormatError: if `packed` is not uint8, does not hold rows of that size, bits is not 1 to 8,
            or dtype is not int8 or uint8.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress import formats
        >>> formats.unpack(jnp.array([0xE1, 0x87], jnp.uint8), 4, 4, jnp.int8)
        Array([ 1, -2,  7, -8], dtype=int8)
    """
    packed = jnp.asarray(packed)
    _check(packed, bits, (jnp.uint8,), "unpack")
    if dtype not in (jnp.int8, jnp.uint8):
        raise FormatError(f"unpack gives codes of dtype int8 or uint8, asked for {dtype}.")
    if packed.shape[-1] != -(-size * bits // 8):
        raise FormatError(
            f"{size} codes of {bits} bits fill {-(-size * bits // 8)} bytes, "
            f"but the last axis of {packed.shape} holds {packed.shape[-1]}."
        )
    return _unpacked(packed, bits, size, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
def _unpacked(packed: jax.Array, bits: int, size: int, dtype: Any) -> jax.Array:
    if bits in _WORDS:
        codes = _spread(packed, bits, extend=dtype == jnp.int8)
        codes = lax.slice_in_dim(codes, 0, size, axis=-1)
        return lax.bitcast_convert_type(codes, dtype)
    width = 1 if 8 % bits else bits
    fields = _flatten_last(_split(packed, 8 // width, width))
    fields = lax.slice_in_dim(fields, 0, size * bits // width, axis=-1)
    if width != bits:
        fields = _join(fields.reshape(*fields.shape[:-1], size, bits), width)
    if dtype == jnp.int8 and bits < 8:
        high = lax.bitcast_convert_type(fields << np.uint8(8 - bits), jnp.int8)
        return high >> np.int8(8 - bits)
    return lax.bitcast_convert_type(fields, dtype)


def packed_nbytes(shape: tuple[int, ...], bits: int) -> int:
    """Returns how many bytes codes of that shape take when packed along the last axis."""
    *rows, last = shape
    return math.prod(rows) * -(-last * bits // 8)


# A word holds the codes of a byte, one in each of its bytes.
_WORDS = {4: np.uint16, 2: np.uint32}


def _spread(packed: jax.Array, bits: int, extend: bool) -> jax.Array:
    """uint8[..., n] -> uint8[..., n * 8 / bits]: one code per byte, with its sign if `extend`.

    Whole words are computed and then seen as bytes; they are little-endian on every platform of
    XLA. On CPUs the bytes are written before they are used, because XLA does not vectorize what it
    fuses with the view; elsewhere the unpacking is fused into what reads the codes.
    """
    word = _WORDS[bits]
    x = packed.astype(word)
    starts = range(0, 8, bits)
    masks = [word((2**bits - 1) << start) for start in starts]
    parts = [(x & mask) << word(i * (8 - bits)) for i, mask in enumerate(masks)]
    x = functools.reduce(lax.bitwise_or, parts)
    if extend:  # the highest bit of a code, times 11...10, fills the bits above it
        high = sum(2 ** (bits - 1) << 8 * i for i in range(len(masks)))
        x = x | ((x & word(high)) * word(2 * (2 ** (8 - bits) - 1)))
    codes = lax.bitcast_convert_type(x, jnp.uint8)
    codes = lax.platform_dependent(codes, cpu=lax.optimization_barrier, default=lambda c: c)
    return _flatten_last(codes)


def _split(x: jax.Array, fields: int, width: int) -> jax.Array:
    """uint8[...] -> uint8[..., fields]: the low bits of each byte, `width` at a time."""
    shifts = np.arange(0, fields * width, width, dtype=np.uint8)
    shifts = shifts.reshape((1,) * x.ndim + (fields,))
    return (x[..., None] >> shifts) & np.uint8(2**width - 1)


def _join(fields: jax.Array, width: int) -> jax.Array:
    """uint8[..., fields] -> uint8[...]: the inverse of `_split`; drops bits above `width`."""
    mask = np.uint8(2**width - 1)
    parts = (
        (lax.index_in_dim(fields, i, axis=-1, keepdims=False) & mask) << np.uint8(i * width)
        for i in range(fields.shape[-1])
    )
    return functools.reduce(lax.bitwise_or, parts)


def _flatten_last(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _check(x: jax.Array, bits: int, dtypes: tuple[Any, ...], what: str) -> None:
    if bits not in range(1, 9):
        raise FormatError(f"{what} handles codes of 1 to 8 bits, asked for {bits!r}.")
    if x.dtype not in dtypes or x.ndim == 0:
        names = " or ".join(jnp.dtype(d).name for d in dtypes)
        raise FormatError(
            f"{what} takes {names} with at least one axis, got {x.dtype} of shape {x.shape}."
        )
