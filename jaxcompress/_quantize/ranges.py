# SPDX-License-Identifier: Apache-2.0
"""Ranges: how far the values go that share a scale. Symmetric ones return an extent a >= 0.

    absmax      a = max|x|
    absmean     a = mean|x|, the scale of ternary (BitNet b1.58) and binary (XNOR-Net) weights
    twn         D = 0.7 mean|x|, a = mean of |x| > D; values up to D become zero (Li and Liu 2016)
    fixed       a = a constant; by default the largest number of the format, so that the scale is 1
    percentile  a = the p-th percentile of |x|, by default p = 99.9
    rms         a = k sqrt(mean x^2), by default k = 3
    mse         a = the multiple of max|x| with the least squared error, of a grid from 0.2 to 2
    kl          a = the fraction of max|x| with the least relative entropy (Migacz 2017)
    minmax      min x and max x, widened to hold 0; asymmetric

percentile and mse may be asymmetric too. What is outside of fixed, percentile, rms, mse and kl is
clipped on purpose, and gets no gradient; the other ranges follow their values.

`shared` are the axes that share a scale, `sync` the mesh axes over which they are cut. Padded
groups are filled with zeros, which count in means and percentiles.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import formats
from .._errors import FormatError
from ..formats import Format

SYMMETRIC = ("absmax", "absmean", "twn", "fixed", "rms", "kl")
EITHER = ("percentile", "mse")
RANGES = (*SYMMETRIC, *EITHER, "minmax")
CLIPPING = ("fixed", "percentile", "rms", "mse", "kl")
DEFAULT_VALUE = {"percentile": 99.9, "rms": 3.0}
# Above 1 for block formats, whose scales may be rounded so that the largest value saturates.
MSE_FACTORS = (1.0, 2.0, 1.5, *(np.arange(79, 15, -1) / 80).tolist())
_KL_BINS, _KL_CANDIDATES = 1024, 64

Axes = tuple[int, ...]


def absmax(v: jax.Array, shared: Axes, sync: tuple[str, ...]) -> jax.Array:
    """Returns max|v| over the shared axes, which stay as ones. Zero for empty arrays."""
    if not v.size:
        return jnp.zeros([1 if i in shared else n for i, n in enumerate(v.shape)], v.dtype)
    a = lax.reduce_max(lax.abs(v), shared)
    a = lax.pmax(a, sync) if sync else a
    return lax.expand_dims(a, shared)


def minmax(v: jax.Array, shared: Axes, sync: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns min v and max v, widened to hold 0."""
    low, high = lax.reduce_min(v, shared), lax.reduce_max(v, shared)
    if sync:
        low, high = lax.pmin(low, sync), lax.pmax(high, sync)
    low, high = lax.min(low, lax.full_like(low, 0)), lax.max(high, lax.full_like(high, 0))
    return lax.expand_dims(low, shared), lax.expand_dims(high, shared)


def signed_absmax(v: jax.Array, shared: Axes, sync: tuple[str, ...]) -> jax.Array:
    """Returns the value of largest absolute value with its sign; the negative one of two."""
    low, high = minmax(v, shared, sync)
    return lax.select(high > -low, high, low)


def mean(v: jax.Array, shared: Axes, sync: tuple[str, ...]) -> jax.Array:
    """Returns the mean over the shared axes, which stay as ones.

    Halves are added until one value is left: an order of summation that is the same in whatever
    program the mean is computed, so that what is trained, packed and served has the same bits.
    """
    count = math.prod(v.shape[a] for a in shared)
    for axis in shared:
        while (size := v.shape[axis]) > 1:
            half = (size + 1) // 2
            if size % 2:
                v = lax.pad(v, np.float32(0), [(0, int(i == axis), 0) for i in range(v.ndim)])
            low, high = (lax.slice_in_dim(v, i, i + half, axis=axis) for i in (0, half))
            v = low + high
    m = v / np.float32(count)
    return lax.pmean(m, sync) if sync else m


def twn(v: jax.Array, shared: Axes, sync: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns the scale and the threshold of Ternary Weight Networks, equations 5 and 6."""
    a = lax.abs(v)
    threshold = np.float32(0.7) * mean(a, shared, sync)
    kept = (a > threshold).astype(v.dtype)
    total, count = mean(a * kept, shared, sync), mean(kept, shared, sync)
    return total / lax.select(count > 0, count, lax.full_like(count, 1)), threshold


def percentile(
    v: jax.Array, shared: Axes, sync: tuple[str, ...], p: float, symmetric: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns (-a, a), or the percentiles 100 - p and p of v widened to hold 0."""
    for name in sync:
        v = lax.all_gather(v, name, axis=shared[0], tiled=True)
    if symmetric:
        a = jnp.percentile(lax.abs(v), p, axis=shared, keepdims=True)
        return -a, a
    low, high = (jnp.percentile(v, q, axis=shared, keepdims=True) for q in (100 - p, p))
    return lax.min(low, lax.full_like(low, 0)), lax.max(high, lax.full_like(high, 0))


def kl(v: jax.Array, shared: Axes, sync: tuple[str, ...], fmt: Format) -> jax.Array:
    """Returns the extent whose quantized histogram of |v| is closest in relative entropy.

    For each candidate, P is the histogram with what is outside added to its last bin, and Q the
    histogram inside with the mass of each number of the format spread over its nonempty bins.
    """
    full = absmax(v, shared, sync)
    kept = [i for i in range(v.ndim) if i not in shared]
    lead = [v.shape[i] for i in kept]
    groups = int(np.prod(lead))
    x = lax.transpose(lax.abs(v), (*kept, *shared)).reshape(groups, v.size // groups)
    top = full.reshape(groups, 1)
    unit = lax.select(top > 0, top, lax.full_like(top, 1))
    bins = jnp.clip((x / unit * np.float32(_KL_BINS)).astype(jnp.int32), 0, _KL_BINS - 1)
    row = lax.broadcasted_iota(jnp.int32, bins.shape, 0)
    histogram = jnp.zeros((groups, _KL_BINS)).at[row, bins].add(1.0)
    histogram = lax.psum(histogram, sync) if sync else histogram
    grid = np.float32(fmt.values()[fmt.values() >= 0])
    center = jnp.asarray((np.arange(_KL_BINS, dtype=np.float32) + 0.5) / _KL_BINS)

    def divergence(t: jax.Array) -> jax.Array:
        inside = (center < t).astype(jnp.float32)[None]
        number = jnp.searchsorted(jnp.asarray(grid), fmt.round(center / t * np.float32(fmt.top)))
        number = jnp.clip(number, 0, grid.size - 1)
        p = histogram * inside
        spread = (
            jnp.zeros((2, groups, grid.size))
            .at[:, :, number]
            .add(jnp.stack([p, (p > 0).astype(jnp.float32)]))
        )
        q = (spread[0] / jnp.maximum(spread[1], 1))[:, number] * (p > 0)
        last = jnp.argmax(jnp.where(center[None] < t, center[None], -1.0), axis=1)[0]
        p = p.at[:, last].add(jnp.sum(histogram * (1 - inside), axis=1))
        p = p / jnp.maximum(jnp.sum(p, axis=1, keepdims=True), 1)
        q = q / jnp.maximum(jnp.sum(q, axis=1, keepdims=True), 1)
        ratio = jnp.log(jnp.maximum(p, 1e-20) / jnp.maximum(q, 1e-10))
        return jnp.sum(jnp.where(p > 0, p * ratio, 0.0), axis=1)

    candidates = jnp.arange(_KL_CANDIDATES, 7, -1, dtype=jnp.float32) / _KL_CANDIDATES
    best = candidates[jnp.argmin(lax.map(divergence, candidates), axis=0)]
    return full * best.reshape([1 if i in shared else n for i, n in enumerate(v.shape)])


def check(
    fmt: Format, rng: str, symmetric: bool, convention: str, power_of_two: str | None
) -> None:
    """Raises FormatError unless the format has such a range, convention and power of two."""
    integer = isinstance(fmt, formats.Integer) and symmetric
    if convention != "max" and not integer:
        raise FormatError(
            f"convention={convention!r} is for integer formats with a symmetric range, "
            f"got {fmt.name} with {rng!r}."
        )
    if convention == "signed" and (rng != "absmax" or not fmt.min < 0):
        raise FormatError(
            "convention='signed' needs a signed format and range='absmax', "
            f"got {fmt.name} and {rng!r}."
        )
    if power_of_two and fmt.block is not None:
        raise FormatError(f"{fmt.name} has scales of its own: leave out power_of_two.")
    if rng in ("absmean", "twn"):
        known = formats.Ternary if rng == "twn" else (formats.Ternary, formats.Binary)
        if not isinstance(fmt, known):
            raise FormatError(
                f"range={rng!r} is for {'ternary' if rng == 'twn' else 'ternary and binary'} "
                f"formats, got {fmt.name}. Use 'absmax'."
            )
