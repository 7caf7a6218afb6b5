# SPDX-License-Identifier: Apache-2.0
"""`Blocks` and `Tiles`: how an array is cut into groups of values that share a scale.

Axes are counted from the end, so that what holds for an array holds for its slices along leading
axes. `levels_of` and `view` say the same with axes counted from the front, for those who move them.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Cuts axes of an array, flattened in the order given, into blocks of consecutive values.

    Attributes:
        axis: the axes to flatten and cut, negative.
        size: values in a block; the last block is filled up with zeros.
    """

    axis: tuple[int, ...]
    size: int

    def split(self, x: jax.Array) -> jax.Array:
        """Returns x with its axes replaced, where the first of them was, by (blocks, size)."""
        order, before, length, after = self._parts(x.shape)
        flat = lax.reshape(lax.transpose(x, order), (*before, length, *after))
        if gap := -length % self.size:
            pads = [(0, gap if i == len(before) else 0, 0) for i in range(flat.ndim)]
            flat = lax.pad(flat, np.zeros((), x.dtype), pads)
        return lax.reshape(flat, self.split_shape(x.shape))

    def merge(self, v: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Undoes `split` of an array of that shape; drops the filling."""
        order, before, length, after = self._parts(shape)
        flat = lax.reshape(v, (*before, -(-length // self.size) * self.size, *after))
        flat = lax.slice_in_dim(flat, 0, length, axis=len(before))
        permuted = lax.reshape(flat, tuple(shape[a] for a in order))
        return lax.transpose(permuted, tuple(np.argsort(order).tolist()))

    def split_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of `split` of an array of that shape."""
        _, before, length, after = self._parts(shape)
        return (*before, -(-length // self.size), self.size, *after)

    def inner_axis(self, ndim: int) -> int:
        """Returns the axis of `split` that runs inside a block, for an array of `ndim` axes."""
        return min(a % ndim for a in self.axis) + 1

    def inner_axes(self, ndim: int) -> tuple[int, ...]:
        """Returns the axes of `split` that run inside a block, for an array of `ndim` axes."""
        return (self.inner_axis(ndim),)

    def _parts(self, shape: tuple[int, ...]) -> tuple[Any, Any, int, Any]:
        """Returns (axes permuted, sizes before, length, sizes after the flattened axes)."""
        axes = tuple(a % len(shape) for a in self.axis)
        kept = [a for a in range(len(shape)) if a not in axes]
        before = [a for a in kept if a < min(axes)]
        after = [a for a in kept if a > min(axes)]
        sizes = [[shape[a] for a in part] for part in (before, axes, after)]
        return (*before, *axes, *after), sizes[0], math.prod(sizes[1]), sizes[2]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Cuts an array into two-dimensional blocks: first along some axes, then along others.

    Attributes:
        columns: how the array is cut first.
        rows: how what `columns` makes of it is cut.
    """

    columns: Blocks
    rows: Blocks

    def split(self, x: jax.Array) -> jax.Array:
        """Returns x with both sets of axes replaced by (blocks, size)."""
        return self.rows.split(self.columns.split(x))

    def merge(self, v: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Undoes `split` of an array of that shape; drops the filling."""
        return self.columns.merge(self.rows.merge(v, self.columns.split_shape(shape)), shape)

    def split_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of `split` of an array of that shape."""
        return self.rows.split_shape(self.columns.split_shape(shape))

    def inner_axes(self, ndim: int) -> tuple[int, ...]:
        """Returns the axes of `split` that run inside a block, for an array of `ndim` axes."""
        between = ndim - len(self.columns.axis) + 2
        row = self.rows.inner_axis(between)
        kept = [a for a in range(between) if a - between not in self.rows.axis]
        column = kept.index(self.columns.inner_axis(ndim))
        return tuple(sorted((row, column if column < row - 1 else column + 2)))


Label = int | tuple[str, int]  # an axis of the array, or ("blocks" | "inside", number of the cut)
Levels = list[tuple[tuple[int, ...], int]]  # of each cut its axes, in order, and its size


def levels_of(blocks: Blocks | Tiles | None, ndim: int) -> Levels:
    """Returns the cuts of an array of `ndim` axes, with axes of the array that are not negative."""
    if blocks is None:
        return []
    if isinstance(blocks, Blocks):
        return [(tuple(a % ndim for a in blocks.axis), blocks.size)]
    levels = levels_of(blocks.columns, ndim)
    between = view(levels, ndim)
    rows = tuple(between[a] for a in blocks.rows.axis)
    return [*levels, (rows, blocks.rows.size)]  # type: ignore[list-item]


def from_levels(levels: Levels, ndim: int) -> Blocks | Tiles | None:
    """Inverse of `levels_of`."""
    if not levels:
        return None
    axes, size = levels[0]
    columns = Blocks(tuple(a - ndim for a in axes), size)
    if len(levels) == 1:
        return columns
    between = view(levels[:1], ndim)
    axes, size = levels[1]
    return Tiles(columns, Blocks(tuple(between.index(a) - len(between) for a in axes), size))


def view(levels: Levels, ndim: int) -> list[Label]:
    """Returns what each axis of `split` of an array of `ndim` axes is.

    >>> view([((1,), 32)], 3)
    [0, ('blocks', 0), ('inside', 0), 2]
    """
    labels: list[Label] = list(range(ndim))
    for k, (axes, _) in enumerate(levels):
        places = [labels.index(a) for a in axes]
        kept = [label for i, label in enumerate(labels) if i not in places]
        labels = [*kept[: min(places)], ("blocks", k), ("inside", k), *kept[min(places) :]]
    return labels
