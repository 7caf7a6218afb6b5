# SPDX-License-Identifier: Apache-2.0
"""`Rounder`: how weights that share a scale are rounded, which is all that solvers know of formats.

Solvers work on weights as `[in, out]`, so that one step handles a contiguous row: values along the
first axis share a scale. Scales are any pytree; its leaves have a one where values share them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ..formats import Format
from ..formats._base import divide, multiply, safe_scale
from ..formats._rounding import to_integer
from . import checks
from .lead import over_lead


class Rounder(Protocol):
    """Finds scales and rounds. Hashable: it is a static argument of `jit`.

    Attributes:
        format: the number format of the codes.
        coupled: whether `find` looks at several outputs together; they are then never separated.
    """

    @property
    def format(self) -> Format: ...

    @property
    def coupled(self) -> bool: ...

    def shared(self, w: jax.Array) -> Any:
        """Returns what all scales of the array float32[in, out] share, or None."""

    def find(self, v: jax.Array, shared: Any) -> Any:
        """Returns the scales of v, float32[n, out], one for each output: leaves [1, out]."""

    def to_grid(self, v: jax.Array, scales: Any) -> jax.Array:
        """Returns v in steps of its scale, rounded to the grid of the format, zero point included.

        Args:
            v: float32[n, out].
            scales: of `find`; leaves [1, out] or [n, out].
        """
        ...

    def from_grid(self, grid: jax.Array, scales: Any) -> jax.Array:
        """Returns the values that grid numbers stand for, float32[n, out]."""
        ...


class Scales(NamedTuple):
    """What multiplies the grid of a format.

    Attributes:
        scale: as the format stores it.
        zero_point: float32 integers, or None.
        global_scale: float32, or None.
    """

    scale: jax.Array
    zero_point: jax.Array | None = None
    global_scale: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Scaled:
    """The plain rounder: scales follow the values as the format has it by default.

        absmax   s = max|w| / max(grid)
        minmax   s = (max w - min w) / (max(grid) - min(grid)), 0 in range; with a zero point
        absmean  s = mean|w|, for ternary and binary weights
        fixed    s = 1

    Args:
        format: number format.
        symmetric: False for a zero point (integer formats only).
    """

    format: Format
    symmetric: bool = True
    coupled = False

    def __post_init__(self):
        if self.format.default_range == "minmax":
            object.__setattr__(self, "symmetric", False)
        if not self.symmetric:
            self.format._check_affine()

    def shared(self, w: jax.Array) -> Any:
        return self.format.global_scale(jnp.max(jnp.abs(w))) if self.format.two_level else None

    def find(self, v: jax.Array, shared: Any) -> Scales:
        fmt = self.format
        if not self.symmetric:
            low = jnp.minimum(jnp.min(v, axis=0, keepdims=True), 0)
            high = jnp.maximum(jnp.max(v, axis=0, keepdims=True), 0)
            scale = safe_scale(high - low, fmt.max - fmt.min)
            return Scales(scale, fmt.round(fmt.min - low / scale))
        if fmt.default_range == "fixed":
            return Scales(jnp.ones((1, v.shape[1]), jnp.float32))
        middle = jnp.mean if fmt.default_range == "absmean" else jnp.max
        extent = middle(jnp.abs(v), axis=0, keepdims=True)
        if shared is not None:
            shared = jnp.broadcast_to(shared, extent.shape)
        return Scales(fmt.find_scale(extent, shared), None, shared)

    def to_grid(self, v: jax.Array, scales: Scales) -> jax.Array:
        fmt = self.format
        factors = fmt.factors(scales.scale, scales.global_scale)
        if fmt.two_level:  # a scale that is rounded to zero makes zeros
            factors = tuple(jnp.where(f == 0, jnp.inf, f) for f in factors)
        v = divide(v, factors)
        if scales.zero_point is not None:
            v = to_integer(v, "half_even", None) + scales.zero_point
        return fmt.round(v)

    def from_grid(self, grid: jax.Array, scales: Scales) -> jax.Array:
        if scales.zero_point is not None:
            grid = grid - scales.zero_point
        return multiply(grid, self.format.factors(scales.scale, scales.global_scale))


def rounder_of(rounder: Format | Rounder) -> Rounder:
    """Returns the plain rounder of a format; a rounder as it is."""
    return Scaled(rounder) if isinstance(rounder, Format) else rounder


def find_scales(w: Any, rounder: Format | Rounder, *, group_size: int | None = None) -> Any:
    """Returns the scales of weights, those of rounding to nearest.

    Args:
        w: float[*lead, out, in].
        rounder: number format, or how values that share a scale are rounded.
        group_size: consecutive inputs that share a scale; by default all. The last group may be
            shorter, and is then filled up with zeros.

    Returns:
        The scales of the rounder, leaves [*lead, out, groups].

    Raises:
        FormatError: if w is not such an array.

    Example:
        >>> from jaxcompress import formats
        >>> find_scales([[7.0, 1.0, 14.0, 0.0]], formats.int4, group_size=2).scale
        Array([[1., 2.]], dtype=float32)
    """
    return _find(checks.weights(w, group_size), rounder_of(rounder), group_size)


def round_to(
    w: Any, rounder: Format | Rounder, scales: Any, *, group_size: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the codes and the values of weights rounded to nearest with these scales.

    Args:
        w: float[*lead, out, in].
        rounder: number format, or how values that share a scale are rounded.
        scales: leaves [*lead, out, groups], as of `find_scales`.
        group_size: consecutive inputs that share a scale; by default all.

    Returns:
        codes of the dtype of the format and values in float32, both [*lead, out, in].

    Example:
        >>> from jaxcompress import formats
        >>> w = [[7.0, 1.2, 14.0, 0.0]]
        >>> round_to(w, formats.int4, find_scales(w, formats.int4))[1]
        Array([[ 8.,  2., 14.,  0.]], dtype=float32)
    """
    return _round(checks.weights(w, group_size), scales, rounder_of(rounder), group_size)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _find(w: jax.Array, rounder: Rounder, group_size: int | None) -> Any:
    def one(w: jax.Array) -> Any:
        return outputs_first(table(w.T, rounder, group_size, rounder.shared(w.T)))

    return over_lead(one, w.ndim - 2)(w)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _round(w: jax.Array, scales: Any, rounder: Rounder, group_size: int | None) -> Any:
    def one(w: jax.Array, scales: Any) -> tuple[jax.Array, jax.Array]:
        codes, values = nearest(w.T, outputs_first(scales), rounder, group_size)
        return codes.T, values.T

    return over_lead(one, w.ndim - 2)(w, scales)


def table(w: jax.Array, rounder: Rounder, group_size: int | None, shared: Any) -> Any:
    """Returns the scales of w, float32[in, out], leaves [groups, out]."""
    size = group_size or w.shape[0]
    groups = filled(w, size).reshape(-1, size, w.shape[1])
    if groups.shape[0] == 1:
        return rounder.find(groups[0], shared)
    found = jax.vmap(lambda v: rounder.find(v, shared))(groups)
    return jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), found)


def nearest(
    w: jax.Array, scales: Any, rounder: Rounder, group_size: int | None
) -> tuple[jax.Array, jax.Array]:
    """Returns codes and values of w, float32[in, out], by scales with leaves [groups, out]."""
    n, size = w.shape[0], group_size or w.shape[0]

    def one(v: jax.Array, s: Any) -> tuple[jax.Array, jax.Array]:
        s = jax.tree.map(lambda a: a[None], s)
        grid = rounder.to_grid(v, s)
        return rounder.format.to_codes(grid), rounder.from_grid(grid, s)

    groups = filled(w, size).reshape(-1, size, w.shape[1])
    out = jax.vmap(one)(groups, scales)
    codes, values = (a.reshape(-1, a.shape[-1])[:n] for a in out)
    return codes, values


def filled(w: jax.Array, size: int) -> jax.Array:
    """Returns w with zeros behind its rows, so that their number is a multiple of the size."""
    gap = -w.shape[0] % size
    return jnp.pad(w, ((0, gap), (0, 0))) if gap else w


def outputs_first(scales: Any) -> Any:
    """Returns scales [out, groups] of scales [groups, out], and the other way round."""
    return jax.tree.map(lambda a: a.T, scales)


def groups_of(length: int, group_size: int | None) -> int:
    """Returns how many groups there are along so many inputs."""
    return 1 if group_size is None else math.ceil(length / group_size)
