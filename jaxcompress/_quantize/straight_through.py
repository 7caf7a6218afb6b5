# SPDX-License-Identifier: Apache-2.0
"""Rounding an array as a `Quantizer` says, and its derivative: the straight-through estimator.

    y = q(x)        dy = dx where x is in the range, 0 outside (Bengio et al. 2013)

Ranges that follow the very values that are quantized have nothing outside, and the tangent is
exactly dx. Ranges that clip on purpose (`ranges.CLIPPING`) take their edges as inside.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from .._core.blocks import Blocks, Tiles
from .._core.qtensor import QTensor
from . import layout, scales
from .integer_dot import Codes, codes_from_grid

if TYPE_CHECKING:
    from .quantizer import Quantizer


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def jaxcompress_fake_quantize(
    x: jax.Array, key: Any, quantizer: Quantizer, axis: tuple[int, ...], sync: tuple[str, ...]
) -> jax.Array:
    """The primal of `Quantizer.fake_quantize`. Its name marks it in jaxprs."""
    v, s, blocks = _scaled(x, quantizer, axis, sync)
    grid = scales.to_grid(v, quantizer, s, key, quantizer.rounding, True)
    out = scales.from_grid(grid, quantizer, s)
    out = out if blocks is None else blocks.merge(out, x.shape)
    return lax.convert_element_type(out, x.dtype)


@jaxcompress_fake_quantize.defjvp
def _straight_through(quantizer, axis, sync, primals, tangents):
    out, tangent = jaxcompress_fake_quantize(*primals, quantizer, axis, sync), tangents[0]
    if quantizer.clips:
        x = lax.stop_gradient(primals[0])
        v, s, blocks = _scaled(x, quantizer, axis, sync)
        mask = scales.inside(v, quantizer, s)
        mask = mask if blocks is None else blocks.merge(mask, x.shape)
        tangent = lax.select(mask, tangent, lax.full_like(tangent, 0))
    return out, tangent


# One jit each, so that a repeated shape is traced once. `quantize` and `scales` are jitted too
# because XLA rounds a division by a constant differently inside a jit than outside.
fake_quantize = jax.jit(jaxcompress_fake_quantize, static_argnums=(2, 3, 4))


@functools.partial(jax.jit, static_argnums=(2, 3))
def quantize(x: jax.Array, key: Any, quantizer: Quantizer, axis: tuple[int, ...]) -> QTensor:
    """Returns x in storage: what `Quantizer.quantize` does once the arguments are checked."""
    fmt = quantizer.format
    v, s, blocks = _scaled(x, quantizer, axis, ())
    codes = fmt.to_codes(scales.to_grid(v, quantizer, s, key, quantizer.rounding, True))
    codes = codes if blocks is None else blocks.merge(codes, x.shape)
    g = None if s.global_scale is None else s.global_scale.reshape(())
    return QTensor.from_codes(
        codes, s.scale, s.zero_point,
        format=fmt, dtype=x.dtype, blocks=blocks, global_scale=g,
    )  # fmt: skip


def _codes_of(
    x: jax.Array, quantizer: Quantizer, axis: tuple[int, ...], sync: tuple[str, ...]
) -> Codes:
    """The integers that `fake_quantize` rounds x to, with scales along whole axes."""
    v, s, _ = _scaled(x, quantizer, axis, sync)
    grid = scales.to_grid(v, quantizer, s, None, quantizer.rounding, True)
    return codes_from_grid(grid, s.scale, s.zero_point, quantizer.format)


def _decode(x: jax.Array, codes: Codes) -> jax.Array:
    """The numbers of `codes` with the derivative of x, which they were found from."""
    return codes.decode(x.dtype)


_codes_of.__name__ = _decode.__name__ = "jaxcompress_fake_quantize"  # as `_core/analyze.py` knows
codes_of = jax.jit(_codes_of, static_argnums=(1, 2, 3))
_decoded = jax.custom_jvp(_decode)
_decoded.defjvp(lambda primals, tangents: (_decoded(*primals), tangents[0]))
decoded = jax.jit(_decoded)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def find_scales(
    x: jax.Array, quantizer: Quantizer, axis: tuple[int, ...], sync: tuple[str, ...]
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the scales and zero points of x, as `Quantizer.scales` does."""
    _, s, _ = _scaled(x, quantizer, axis, sync)
    scale = functools.reduce(lax.mul, quantizer.format.factors(s.scale, s.global_scale))
    return scale, s.zero_point


def _scaled(
    x: jax.Array, quantizer: Quantizer, axis: tuple[int, ...], sync: tuple[str, ...]
) -> tuple[jax.Array, scales.Scales, Blocks | Tiles | None]:
    """Returns x in float32 and cut into blocks, its scales, and the blocks."""
    blocks, shared = layout.cut(x.shape, axis, quantizer.granularity, quantizer.indivisible)
    v = lax.convert_element_type(x, jnp.float32)
    v = v if blocks is None else blocks.split(v)
    return v, scales.find(v, quantizer, shared, sync, blocks is not None), blocks
