# SPDX-License-Identifier: Apache-2.0
"""Codebooks: any finite set of numbers. NF4 is one; k-means learns one from data."""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._errors import FormatError
from ._base import Format
from ._checks import check_floating
from ._rounding import check, uniform

# NormalFloat: the quantiles of a normal distribution, scaled to -1 ... 1.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, repr=False)
class Codebook(Format):
    """The numbers `table`, ascending; the codes are positions in it, as uint8."""

    table: tuple[float, ...]
    default_range: str = "absmax"  # type: ignore[misc]

    def values(self) -> np.ndarray:
        return np.array(self.table)

    @property
    def top(self) -> float:
        return max(abs(self.min), abs(self.max))

    @property
    def table_nbytes(self) -> int:
        return 0 if self.name == nf4.name else 4 * len(self.table)

    def round(self, v: Any, rounding: str = "half_even", key: Any = None) -> jax.Array:
        v = jnp.asarray(v)
        return lax.select(jnp.isnan(v), v, self.from_codes(self._position(v, rounding, key)))

    def to_codes(self, grid: jax.Array) -> jax.Array:
        return self._position(grid, "floor", None).astype(self.dtype)

    def from_codes(self, codes: jax.Array) -> jax.Array:
        table = jnp.asarray(np.array(self.table, np.float32))
        return table.at[codes.astype(jnp.int32)].get(mode="clip")

    def _position(self, v: jax.Array, rounding: str, key: Any) -> jax.Array:
        check(rounding, key)
        table = np.array(self.table, np.float32)
        if rounding in ("half_even", "half_away"):
            return _count(v, _thresholds(table, rounding))
        low = _count(v, _just_below(table[1:]))
        if rounding == "floor":
            return low
        at = lambda i: jnp.asarray(table).at[i].get(mode="clip")  # noqa: E731
        below, above = at(low), at(low + 1)
        step = lax.select(above > below, above - below, lax.full_like(below, 1))
        up = uniform(key, v, rounding) < (v - below) / step
        return low + (up & (above > below)).astype(jnp.int32)

    def settings(self) -> dict[str, Any]:
        scaled = self.default_range == "absmax"
        return {"maker": "codebook", "values": list(self.table), "scaled": scaled}


def codebook(values: Sequence[float], *, scaled: bool = True) -> Codebook:
    """Returns the format of these numbers.

    Args:
        values: 2 to 256 different finite numbers, rounded to float32.
        scaled: whether a `Quantizer` scales arrays so that the largest absolute value meets the
            largest number; if not, it takes the numbers as they are and clips.

    Raises:
        FormatError: if there are too few or too many numbers, or two are equal in float32.

    Example:
        >>> import jaxcompress as jc
        >>> jc.formats.codebook([-1, 0, 0.5, 1]).encode([0.3, -2.0])
        Array([2, 0], dtype=uint8)
    """
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        table = np.sort(np.asarray(values, np.float32).ravel())
    if not 2 <= table.size <= 256 or not np.isfinite(table).all() or (np.diff(table) == 0).any():
        raise FormatError(
            f"A codebook has 2 to 256 different finite float32 numbers, got {table.tolist()}."
        )
    return _make(_name(table), table, "absmax" if scaled else "fixed")


def codebook_from_data(
    x: Any,
    bits: int,
    weights: Any = None,
    *,
    per: str = "tensor",
    key: Any = None,
    steps: int = 50,
) -> Codebook | tuple[Codebook, ...]:
    """Learns a codebook by k-means (Lloyd 1982): the values that lower sum_i h_i (x_i - q(x_i))^2.

    Args:
        x: floating, any shape; concrete.
        bits: 1 to 8; there are 2^bits values.
        weights: importance h of each value, shaped like x, not negative; by default 1.
        per: "tensor", or "channel" for a codebook for each index of the last axis.
        key: PRNG key of random starting points; by default they are quantiles.
        steps: how often values are assigned and averaged.

    Returns:
        A `Codebook` that is used without a scale, or a tuple of them, one per channel.

    Raises:
        FormatError: if an argument is wrong, or x holds fewer than 2 different finite values.

    Example:
        >>> import jax.numpy as jnp, jaxcompress as jc
        >>> jc.formats.codebook_from_data(jnp.array([0.0, 0.1, 5.0, 5.1]), 1).values()
        array([0.05      , 5.05000019])

    References: Han et al. 2016 (Deep Compression), section 3; Kim et al. 2024 (SqueezeLLM),
    equation 5, for the weights.
    """
    check_floating(jnp.asarray(x).dtype, "codebook_from_data")
    if bits not in range(1, 9) or per not in ("tensor", "channel"):
        raise FormatError(
            f"codebook_from_data has 1 to 8 bits per 'tensor' or 'channel', got {bits}, {per!r}."
        )
    x = np.asarray(x, np.float32)
    h = np.ones(x.shape, np.float32) if weights is None else np.asarray(weights, np.float32)
    if h.shape != x.shape or not np.isfinite(x).all() or not (h >= 0).all():
        raise FormatError(
            "codebook_from_data needs finite data and weights of its shape that are not negative, "
            f"got shapes {x.shape} and {h.shape}."
        )
    if per == "channel":
        keys = [None] * x.shape[-1] if key is None else list(jax.random.split(key, x.shape[-1]))
        pairs = zip(np.moveaxis(x, -1, 0), np.moveaxis(h, -1, 0), keys, strict=True)
        return tuple(_kmeans(a.ravel(), b.ravel(), bits, k, steps) for a, b, k in pairs)
    return _kmeans(x.ravel(), h.ravel(), bits, key, steps)


def _kmeans(x: np.ndarray, h: np.ndarray, bits: int, key: Any, steps: int) -> Codebook:
    order = np.argsort(x, kind="stable")
    x, h = x[order].astype(np.float64), h[order].astype(np.float64)
    different = np.unique(x)
    if different.size < 2:
        raise FormatError(f"codebook_from_data found {different.size} different values: need 2.")
    k = min(2**bits, different.size)
    if key is None:
        centers = np.unique(np.quantile(different, (np.arange(k) + 0.5) / k))
    else:
        pick = jax.random.choice(key, different.size, (k,), replace=False)
        centers = np.sort(different[np.asarray(pick)])
    # One-dimensional clusters are runs of the sorted data, so sums are differences of these.
    mass, first = (np.concatenate([[0.0], np.cumsum(a)]) for a in (h, h * x))
    for _ in range(steps):
        edges = np.searchsorted(x, (centers[1:] + centers[:-1]) / 2)
        edges = np.concatenate([[0], edges, [x.size]])
        total, moment = np.diff(mass[edges]), np.diff(first[edges])
        moved = np.where(total > 0, moment / np.where(total > 0, total, 1), centers)
        if np.array_equal(moved, centers):
            break
        centers = moved
    table = np.unique(centers.astype(np.float32))
    if table.size < 2:
        table = np.asarray([x[0], x[-1]], np.float32)
    return _make(_name(table), table, "fixed")


def _name(table: np.ndarray) -> str:
    return f"codebook{table.size}_{zlib.crc32(table.tobytes()):08x}"


def _make(name: str, table: np.ndarray, default_range: str) -> Codebook:
    values, bits = tuple(float(v) for v in table), int(np.ceil(np.log2(table.size)))
    return Codebook(name, bits, values[0], values[-1], jnp.dtype(jnp.uint8), values, default_range)


def _count(v: jax.Array, thresholds: np.ndarray) -> jax.Array:
    """Returns how many thresholds are below each v, int32."""
    if thresholds.size > 15:
        return jnp.searchsorted(jnp.asarray(thresholds), v).astype(jnp.int32)
    count = lax.full_like(v, 0, np.int32)
    for t in thresholds:
        count = count + (v > t).astype(jnp.int32)
    return count


def _thresholds(table: np.ndarray, rounding: str) -> np.ndarray:
    """Returns the largest float32 of each pair of neighbours that still goes to the lower one."""
    exact = (table[1:].astype(np.float64) + table[:-1].astype(np.float64)) / 2
    t = exact.astype(np.float32)
    below = np.nextafter(t, np.float32(-np.inf))
    t = np.where(t > exact, below, t)
    odd = np.arange(exact.size) % 2 == 1  # the upper neighbour has the even code
    upwards = odd if rounding == "half_even" else exact > 0
    return np.where((t == exact) & upwards, _just_below(t), t)


def _just_below(t: np.ndarray) -> np.ndarray:
    """Returns the next lower float32. Not a subnormal one, which XLA would take for zero."""
    below = np.nextafter(t, np.float32(-np.inf))
    return np.where(t == 0, -np.finfo(np.float32).smallest_normal, below)


nf4 = _make("nf4", np.array(_NF4, np.float32), "absmax")
