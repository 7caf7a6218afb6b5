# SPDX-License-Identifier: Apache-2.0
"""From ranges to scales, and from scales to rounded values: the arithmetic of a `Quantizer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import formats
from ..formats._base import divide, multiply, safe_scale
from ..formats._rounding import to_integer
from . import ranges

if TYPE_CHECKING:
    from .quantizer import Quantizer

# A value at the edge of a range may be outside by the rounding of the scale.
_EDGE = np.float32(1 + 2.0**-21)


class Scales(NamedTuple):
    """What multiplies the grid of a format, over the axes that do not share it.

    Attributes:
        scale: as the format stores it.
        zero_point: float32 integers, or None.
        global_scale: float32, or None.
        divisor: what values are divided by before they are rounded, where that is not the scale.
    """

    scale: jax.Array
    zero_point: jax.Array | None = None
    global_scale: jax.Array | None = None
    divisor: jax.Array | None = None


def find(
    v: jax.Array, q: Quantizer, shared: tuple[int, ...], sync: tuple[str, ...], grouped: bool,
    g: jax.Array | None = None,
) -> Scales:  # fmt: skip
    """Returns the scales of float32 v over the shared axes, which stay as ones.

    `g` is the second-level scale, of formats that have one, where it is not that of v.
    """
    fmt = q.format
    if fmt.two_level and g is None:
        g = fmt.global_scale(ranges.absmax(v, tuple(range(v.ndim)), sync))
        sync = () if grouped else sync  # a block lies on one device, the tensor on all
    divisor = None
    if not v.size:
        low = high = ranges.absmax(v, shared, ())
    elif not q.symmetric:
        if q.range == "percentile":
            low, high = ranges.percentile(v, shared, sync, float(q.range_value or 100), False)
        else:
            low, high = ranges.minmax(v, shared, sync)
    elif q.range == "absmean":
        high = ranges.mean(lax.abs(v), shared, sync)
    elif q.range == "twn":
        high, threshold = ranges.twn(v, shared, sync)
        divisor = safe_scale(threshold, 0.5)
    elif q.range == "rms":
        high = np.float32(q.range_value) * jnp.sqrt(ranges.mean(v * v, shared, sync))
    elif q.range == "percentile":
        _, high = ranges.percentile(v, shared, sync, float(q.range_value or 100), True)
    elif q.range == "kl":
        high = ranges.kl(v, shared, sync, fmt)
    elif q.range == "fixed":
        top = q.top if q.range_value is None else q.range_value
        high = jnp.full([1 if i in shared else n for i, n in enumerate(v.shape)], top, v.dtype)
    elif q.convention == "signed":
        high = ranges.signed_absmax(v, shared, sync)
    else:
        high = ranges.absmax(v, shared, sync)
    if q.symmetric:
        low = None
    factors = ranges.MSE_FACTORS if q.range == "mse" else getattr(fmt, "search", (1.0,))
    if len(factors) > 1 and v.size:
        return _least_squares(v, q, shared, sync, low, high, g, factors)
    scales = _of(q, low, high, g)
    return scales if divisor is None else scales._replace(divisor=divisor)


def to_grid(
    v: jax.Array, q: Quantizer, s: Scales, key: Any, rounding: str, found: bool = False
) -> jax.Array:
    """Returns v / scale rounded to the grid of the format, zero point included.

    `found` says that the scales were found from v by `find`.
    """
    fmt = q.format
    if found and _covers(q) and rounding == "half_even":
        return to_integer(divide(v, (s.scale,)), rounding, key)
    factors = (s.divisor,) if s.divisor is not None else fmt.factors(s.scale, s.global_scale)
    if fmt.two_level:  # a scale that is rounded to zero makes zeros
        # The barrier keeps XLA from computing the scales anew for each value.
        (f,) = lax.optimization_barrier(factors)
        factors = (lax.select(f == 0, lax.full_like(f, np.inf), f),)
    grid = divide(v, factors)
    if s.zero_point is not None:
        grid = lax.add(to_integer(grid, rounding, key), _broadcast(s.zero_point, v.shape))
        return fmt.round(grid)
    return fmt.round(grid) if rounding == "half_even" else fmt.round(grid, rounding, key)


def _covers(q: Quantizer) -> bool:
    """Whether a range leaves no value of the grid outside, so that nothing has to be clamped."""
    fmt = q.format
    whole = type(fmt) is formats.Integer and fmt.min <= -fmt.max  # others round in their own way
    return whole and q.range == "absmax" and q.convention == "max" and not q.power_of_two


def from_grid(grid: jax.Array, q: Quantizer, s: Scales) -> jax.Array:
    """Returns the float32 values of grid numbers."""
    if s.zero_point is not None:
        grid = lax.sub(grid, _broadcast(s.zero_point, grid.shape))
    return multiply(grid, q.format.factors(s.scale, s.global_scale))


def inside(v: jax.Array, q: Quantizer, s: Scales) -> jax.Array:
    """Returns where v lies in the range that its scales cover, edges included."""
    fmt = q.format
    low, high = min(fmt.min, -q.top if fmt.min < 0 else 0.0), max(fmt.max, q.top)
    factors = fmt.factors(s.scale, s.global_scale)
    if s.zero_point is None:
        ends = (multiply(lax.full_like(factors[0], end), factors) for end in (low, high))
    else:
        ends = (
            multiply(end - s.zero_point, factors) for end in (np.float32(low), np.float32(high))
        )
    low, high = (_broadcast(end * _EDGE, v.shape) for end in ends)
    return (v >= low) & (v <= high)


def _of(q: Quantizer, low: jax.Array | None, high: jax.Array, g: Any) -> Scales:
    """Returns the scales of a range: of (-high, high) if low is None."""
    fmt = q.format
    if low is not None:
        scale = to_power_of_two(safe_scale(lax.sub(high, low), fmt.max - fmt.min), q.power_of_two)
        zero = fmt.round(lax.sub(lax.full_like(low, fmt.min), lax.div(low, scale)))
        return Scales(scale, zero)
    if q.convention == "signed":
        return Scales(to_power_of_two(safe_scale(high, fmt.min, signed=True), q.power_of_two))
    if q.convention == "half" or q.power_of_two:
        return Scales(to_power_of_two(safe_scale(high, q.top), q.power_of_two))
    return Scales(fmt.find_scale(high, g), None, g)


def to_power_of_two(scale: jax.Array, rule: str | None) -> jax.Array:
    """Returns the scale, or the power of two that the rule makes of it (same sign)."""
    if rule is None:
        return scale
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    mantissa = bits & np.int32(0x7FFFFF)
    # "round" is nearest in the exponent: sqrt(2) is the middle.
    least = {"ceil": 1, "round": 0x3504F3 + 1, "floor": 1 << 23}[rule]
    up = (mantissa >= np.int32(least)).astype(jnp.int32) << np.int32(23)
    power = lax.bitcast_convert_type((bits & ~np.int32(0x7FFFFF)) + up, jnp.float32)
    return lax.select(jnp.isfinite(scale), power, scale)


def _least_squares(
    v: jax.Array, q: Quantizer, shared: tuple[int, ...], sync: tuple[str, ...],
    low: jax.Array | None, high: jax.Array, g: Any, factors: tuple[float, ...],
) -> Scales:  # fmt: skip
    """Returns the scales of the range times that factor which errs least; the first of equals."""

    def scales(factor: jax.Array) -> Scales:
        return _of(q, None if low is None else low * factor, high * factor, g)

    def error(s: Scales) -> jax.Array:
        e = from_grid(to_grid(v, q, s, None, "half_even"), q, s) - v
        e = jnp.sum(e * e, axis=shared, keepdims=True)
        return lax.psum(e, sync) if sync else e

    def step(carry, factor):
        least, best = carry
        e = error(scales(_factor(factor, high)))
        better = e < least
        return (lax.select(better, e, least), lax.select(better, _factor(factor, e), best)), None

    first = error(scales(_factor(np.float32(factors[0]), high)))
    every = _factor(factors[0], first)
    start = first, lax.select(first < np.inf, every, every)  # varies over mesh axes like `first`
    (_, best), _ = lax.scan(step, start, np.asarray(factors[1:], np.float32))
    return scales(best)


def _factor(factor: Any, like: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(factor, jnp.float32), like.shape)


def _broadcast(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(a, shape, tuple(range(len(shape))))
