# SPDX-License-Identifier: Apache-2.0
"""Histograms of |v| that grow with the data, and the thresholds that are read from them.

The bins split [0, 2^e] evenly; when a larger value comes, 2^k bins become one, so that memory is
bounded and no count is lost.

    percentile   the value that 99.99 % of all values do not exceed
    mse          the threshold with the least squared error after rounding
    kl           the threshold whose rounded histogram loses least information

Migacz 2017, 8-bit Inference with TensorRT (kl); Wu et al. 2020, section 3 (percentile, mse).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..formats import Format

BINS = 2048
PERCENTILE = 99.99
_CANDIDATES = 200  # thresholds that mse tries, evenly spaced up to the maximum
_STRIDE = 16  # bins between two thresholds that kl tries
_SMOOTH = 1e-4  # counts in a bin that rounding emptied: the divergence stays finite
_LOWEST = -126

Histogram = dict[str, jax.Array]  # "counts": float32 [*scale_shape, BINS]; "exponent": int32


def empty(shape: Sequence[int]) -> Histogram:
    """A histogram for every scale of that shape."""
    counts = jnp.zeros((*shape, BINS), jnp.float32)
    return {"counts": counts, "exponent": jnp.full(shape, _LOWEST, jnp.int32)}


def add(old: Histogram, v: jax.Array, top: jax.Array, sync: Sequence[str] = ()) -> Histogram:
    """The histogram with the values v added.

    Args:
      v: float32.
      top: max|v| where values share a scale.
      sync: mesh axes, inside `shard_map`, over which the counts are added; `top` is shared.
    """
    shape, channels = top.shape, math.prod(top.shape)
    _, exponent = jnp.frexp(top)
    exponent = jnp.maximum(jnp.where(top > 0, exponent, _LOWEST), old["exponent"])
    rows = jnp.arange(channels).reshape(shape)

    kept = jnp.arange(BINS).reshape((1,) * len(shape) + (BINS,))
    shift = jnp.minimum(exponent - old["exponent"], 31)[..., None]
    moved = _count(rows[..., None], kept >> shift, old["counts"], channels)
    width = jnp.ldexp(jnp.float32(1), exponent) / BINS
    place = jnp.clip((jnp.abs(v) / width).astype(jnp.int32), 0, BINS - 1)
    fresh = _count(rows, place, jnp.ones_like(v), channels)
    fresh = lax.psum(fresh, tuple(sync)) if sync else fresh
    return {"counts": (moved + fresh).reshape((*shape, BINS)), "exponent": exponent}


def _count(rows: jax.Array, place: jax.Array, amount: jax.Array, channels: int) -> jax.Array:
    index = jnp.broadcast_to(rows * BINS, place.shape) + place
    return jnp.zeros(channels * BINS).at[index.ravel()].add(amount.ravel())


def threshold(histogram: Histogram, observer: str, fmt: Format) -> np.ndarray:
    """The threshold of each histogram, float32 of the shape of "exponent"."""
    exponent = np.asarray(histogram["exponent"])
    counts = np.asarray(histogram["counts"], np.float64).reshape(-1, BINS)
    find = {"percentile": _percentile, "mse": _mse, "kl": _kl}[observer]
    edges = np.array([find(row, fmt) if row.any() else 0 for row in counts])
    return np.ldexp(edges / BINS, exponent.ravel()).astype(np.float32).reshape(exponent.shape)


def _percentile(counts: np.ndarray, fmt: Format) -> float:
    share = np.cumsum(counts) / counts.sum()
    return float(np.searchsorted(share, PERCENTILE / 100 - 1e-12) + 1)


def _mse(counts: np.ndarray, fmt: Format) -> float:
    used = np.flatnonzero(counts)
    centers, weights = used + 0.5, counts[used]
    tops = np.linspace(0, used[-1] + 1, _CANDIDATES + 1)[1:]
    scale = (tops / fmt.max)[:, None]
    rounded = np.asarray(fmt.round(jnp.asarray(centers / scale, jnp.float32))) * scale
    return tops[np.argmin(((rounded - centers) ** 2 * weights).sum(1))]


def _kl(counts: np.ndarray, fmt: Format) -> float:
    levels = int(np.sum(fmt.values() >= 0))
    last = np.flatnonzero(counts)[-1] + 1
    tried = [*range(min(levels, last), last, _STRIDE), last]
    return tried[int(np.argmin([_divergence(counts, n, levels) for n in tried]))]


def _divergence(counts: np.ndarray, n: int, levels: int) -> float:
    """KL(P || Q): P is clipped at n bins, Q has its counts spread evenly within each level."""
    inside = counts[:n]
    p = inside.copy()
    p[-1] += counts[n:].sum()
    level = np.arange(n) * levels // n
    occupied = inside > 0
    total = np.bincount(level, inside, levels)
    share = np.maximum(np.bincount(level, occupied, levels), 1)
    q = np.where(occupied, total[level] / share[level], 0)
    seen = p > 0
    p, q = p[seen] / p.sum(), np.maximum(q[seen], _SMOOTH)
    return float(np.sum(p * np.log(p / (q / q.sum()))))
