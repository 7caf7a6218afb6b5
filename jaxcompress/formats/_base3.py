# SPDX-License-Identifier: Apache-2.0
"""Packs ternary codes, five to a byte: 3^5 = 243 of 256, 1.6 bits a value.

    byte = sum_i (c_i + 1) 3^i, i = 0 ... 4, c_i in {-1, 0, 1}

Byte j of a row holds its codes 5 j to 5 j + 4 along the last axis, the first as the lowest digit.
Rows are filled up with zero digits. The bytes 243 to 255 do not occur.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._errors import FormatError

_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)


def pack_base3(codes: Any) -> jax.Array:
    """Packs the codes along their last axis.

    Args:
        codes: int8[..., n] of -1, 0 and 1.

    Returns:
        uint8[..., ceil(n / 5)].

    Raises:
        FormatError: if the codes are not int8 or have no axis.

    Example:
        >>> import jax.numpy as jnp, jaxcompress as jc
        >>> jc.formats.ternary_base3.pack(jnp.array([1, -1, 0, 0, 1, 1], jnp.int8))
        Array([200,   2], dtype=uint8)
    """
    codes = jnp.asarray(codes)
    if codes.dtype != jnp.int8 or codes.ndim == 0:
        raise FormatError(
            "pack takes ternary codes as int8 with at least one axis, "
            f"got {codes.dtype} of shape {codes.shape}."
        )
    return _packed(codes)


# One program for an array instead of one for each operation.
@functools.partial(jax.jit, inline=True)
def _packed(codes: jax.Array) -> jax.Array:
    digits = (codes + np.int8(1)).astype(jnp.uint8)
    gap = -codes.shape[-1] % 5
    digits = lax.pad(digits, np.uint8(0), [(0, 0, 0)] * (codes.ndim - 1) + [(0, gap, 0)])
    digits = digits.reshape(*codes.shape[:-1], digits.shape[-1] // 5, 5)
    powers = lax.broadcast_in_dim(_POWERS, digits.shape, (digits.ndim - 1,))
    return jnp.sum(digits * powers, axis=-1, dtype=jnp.uint8)


def unpack_base3(packed: Any, size: int) -> jax.Array:
    """Takes apart what `pack_base3` made.

    Args:
        packed: uint8[..., ceil(size / 5)].
        size: number of codes in a row.

    Returns:
        int8[..., size].

    Raises:
        FormatError: if `packed` is not uint8 or does not hold rows of that size.

    Example:
        >>> import jax.numpy as jnp, jaxcompress as jc
        >>> jc.formats.ternary_base3.unpack(jnp.array([200, 2], jnp.uint8), 6)
        Array([ 1, -1,  0,  0,  1,  1], dtype=int8)
    """
    packed = jnp.asarray(packed)
    if packed.dtype != jnp.uint8 or packed.ndim == 0 or packed.shape[-1] != -(-size // 5):
        raise FormatError(
            f"{size} ternary codes, five a byte, are uint8 with {-(-size // 5)} on the last axis, "
            f"got {packed.dtype} of shape {packed.shape}."
        )
    return _unpacked(packed, size)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _unpacked(packed: jax.Array, size: int) -> jax.Array:
    powers = lax.broadcast_in_dim(_POWERS, (*packed.shape, 5), (packed.ndim,))
    digits = lax.broadcast_in_dim(packed, powers.shape, range(packed.ndim)) // powers % np.uint8(3)
    digits = digits.reshape(*packed.shape[:-1], packed.shape[-1] * 5)
    return lax.slice_in_dim(digits, 0, size, axis=-1).astype(jnp.int8) - np.int8(1)
