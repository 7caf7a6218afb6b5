# SPDX-License-Identifier: Apache-2.0
"""QTensors of any format, and equality of pytrees to the bit: types, dtypes, formats, values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from jaxcompress._core.qtensor import Blocks


def stored(fmt, shape=(64, 48)):
    """A QTensor of random codes; blocks of the format along the first axis."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**fmt.code_bits, shape, np.uint16).astype(f"u{fmt.dtype.itemsize}")
    scale = np.ones((1, shape[1]), np.float32)
    blocks = top = None
    if fmt.block is not None:
        scale = rng.integers(0, 255, (shape[0] // fmt.block, 1, shape[1]), np.uint8)
        scale, blocks = scale.view(fmt.scale_dtype), Blocks((-2,), fmt.block)
    if fmt.two_level:
        top = jnp.float32(3)
    return jc.QTensor.from_codes(
        jnp.asarray(codes.view(fmt.dtype)),
        jnp.asarray(scale),
        format=fmt,
        dtype="bfloat16",
        blocks=blocks,
        global_scale=top,
    )


def assert_same(a, b, where="tree"):
    """Fails unless the trees are equal, without the pytree functions of JAX."""
    assert type(a) is type(b) or isinstance(a, jax.Array) and isinstance(b, jax.Array), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        assert list(map(type, a)) == list(map(type, b)), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}/{i}")
    elif dataclasses.is_dataclass(a) and not isinstance(a, jax.Array):
        for field in dataclasses.fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if isinstance(a, jc.QTensor) and field.name in (
                "format",
                "blocks",
                "axis",
                "unused",
                "dtype",
            ):
                assert x == y and type(x) is type(y), f"{where}.{field.name}"
            else:
                assert_same(x, y, f"{where}.{field.name}")
    elif isinstance(a, jax.Array | np.ndarray | np.generic):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(a) == jax.random.key_impl(b), where
            a, b = map(jax.random.key_data, (a, b))
        a, b = map(np.asarray, (a, b))
        if a.dtype.name in ("int2", "int4"):  # the bits above the value are anything
            a, b = a.astype(np.int8), b.astype(np.int8)
        assert a.tobytes() == b.tobytes(), where
    elif isinstance(a, float | complex):
        assert repr(a) == repr(b), where
    else:
        assert a == b, where
