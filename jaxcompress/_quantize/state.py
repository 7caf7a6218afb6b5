# SPDX-License-Identifier: Apache-2.0
"""Stored ranges: what is kept of an operand, how it follows the data, how values are rounded.

    static   [low, high] as calibrated
    ema      [low, high] = m [low, high] + (1 - m) [min v, max v], the first batch as it is
    v^       s (clip(round(v / s) + z) - z) with s = (high - low) / (qmax - qmin)
    dv^/dv = 1 for low <= v <= high (inclusive), 0 outside

Symmetric ranges have low = -high, s = high / qmax, perhaps rounded to a power of two, and z = 0.
Jacob et al. 2018, section 3.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from . import layout
from .quantizer import Quantizer
from .scales import to_power_of_two

Range = dict[str, jax.Array]  # "low", "high": float32 of `scale_shape`; "count": float32 scalar

_SMALLEST = 2.0**-126  # below this a scale is subnormal, and is flushed to zero


def blocked(
    quantizer: Quantizer, x: jax.Array, axis: Sequence[int]
) -> tuple[jax.Array, tuple[int, ...], Callable[[jax.Array], jax.Array]]:
    """(float32 x as scales are shared, the axes that share one, the way back to x's shape).

    >>> q = Quantizer("int8", "group:2")
    >>> blocked(q, jnp.ones((4, 3)), (0,))[0].shape
    (2, 2, 3)
    """
    axis = quantizer.check(x.shape, axis)
    blocks, shared = layout.cut(x.shape, axis, quantizer.granularity, quantizer.indivisible)
    v = x.astype(jnp.float32)
    if blocks is None:
        return v, shared, lambda out: out.astype(x.dtype)
    return blocks.split(v), shared, lambda out: blocks.merge(out, x.shape).astype(x.dtype)


def blank(shape: Sequence[int]) -> Range:
    """A range that saw nothing yet."""
    ends = {end: jnp.zeros(shape, jnp.float32) for end in ("low", "high")}
    return {**ends, "count": jnp.zeros((), jnp.float32)}


def ends_of(
    v: jax.Array, shared: Sequence[int], symmetric: bool, sync: Sequence[str] = ()
) -> tuple[jax.Array, jax.Array]:
    """Lowest and highest value over the shared axes (kept with size 1), zero included.

    Args:
      sync: mesh axes, inside `shard_map`, over which the range is shared.
    """
    low = jnp.minimum(jnp.min(v, shared, keepdims=True), 0.0)
    high = jnp.maximum(jnp.max(v, shared, keepdims=True), 0.0)
    if sync:
        low, high = lax.pmin(low, tuple(sync)), lax.pmax(high, tuple(sync))
    if symmetric:
        high = jnp.maximum(-low, high)
        low = -high
    return low, high


def averaged(old: Range, low: jax.Array, high: jax.Array, momentum: float) -> Range:
    """The range after one more batch with these ends."""

    def mix(before, now):
        return jnp.where(old["count"] == 0, now, momentum * before + (1 - momentum) * now)

    return {
        "low": mix(old["low"], low),
        "high": mix(old["high"], high),
        "count": old["count"] + 1,
    }


def in_range(quantizer: Quantizer, v: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """v rounded to the grid of a format that is laid over [low, high].

    The tangent passes where low <= v <= high, ends included, in forward and reverse mode; low and
    high are taken as constants.

    Args:
      v: float32, cut by `blocked`.
      low, high: float32, 1 along the axes that share a scale.

    >>> q = Quantizer("int8", "tensor", range="static")
    >>> f = lambda v: in_range(q, v, -jnp.ones(1), jnp.ones(1)).sum()
    >>> jax.grad(f)(jnp.array([0.3, 1.0, 1.1]))
    Array([1., 1., 0.], dtype=float32)
    """
    low, high = lax.stop_gradient((low, high))
    return _in_range(v, low, high, quantizer)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _in_range(v: jax.Array, low: jax.Array, high: jax.Array, quantizer: Quantizer) -> jax.Array:
    codes, scale, zero = codes_in_range(quantizer, v, low, high)
    return codes * scale if zero is None else (codes - zero) * scale


def codes_in_range(
    quantizer: Quantizer, v: jax.Array, low: jax.Array, high: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(codes, scale, zero point or None), all float32, of `in_range`."""
    fmt = quantizer.format
    scale = high / fmt.max if quantizer.symmetric else (high - low) / (fmt.max - fmt.min)
    scale = to_power_of_two(jnp.where(scale < _SMALLEST, 1.0, scale), quantizer.power_of_two)
    if quantizer.symmetric:
        return fmt.round(v / scale), scale, None
    zero = fmt.round(fmt.min - low / scale)
    return fmt.round(jnp.round(v / scale) + zero), scale, zero


@_in_range.defjvp
def _inclusive(quantizer, primals, tangents):
    v, low, high = primals
    if quantizer.symmetric:  # of a full range (int2: -2 ... 1) low reaches further than -high
        low = high * (quantizer.format.min / quantizer.format.max)
    inside = (low <= v) & (v <= high)
    return _in_range(*primals, quantizer), jnp.where(inside, tangents[0], 0.0)
