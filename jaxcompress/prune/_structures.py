# SPDX-License-Identifier: Apache-2.0
"""Units that are pruned together: single weights, blocks, whole channels."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from .._errors import RecipeError, SiteError

Structure = Callable[[tuple[int, ...]], tuple[int, ...]]
"""From the shape of a weight to the size of a unit along each of its axes."""


def unstructured(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Every weight for itself.

    >>> unstructured((8, 4))
    (1, 1)
    """
    return (1,) * len(shape)


def blocks(rows: int, columns: int) -> Structure:
    """Blocks of the last two axes.

    >>> blocks(4, 2)((3, 8, 4))
    (1, 4, 2)
    """
    if rows < 1 or columns < 1:
        raise RecipeError(f"blocks({rows}, {columns}): both sizes must be at least 1.")

    def sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*(1,) * (len(shape) - 2), rows, columns) if len(shape) > 1 else (rows * columns,)

    return sizes


def channels(axis: int = -1, size: int = 1) -> Structure:
    """Whole channels: everything with the same index (or `size` indices in a row) along an axis.

    The heads of an attention layer whose kernel is [d, heads * width] are `channels(-1, width)`.

    >>> channels(-1)((3, 3, 8, 16)), channels(0, size=2)((8, 4))
    ((3, 3, 8, 1), (2, 4))
    """
    if size < 1:
        raise RecipeError(f"channels(size={size}): the size must be at least 1.")

    def sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
        kept = axis % len(shape)
        return tuple(size if a == kept else n for a, n in enumerate(shape))

    return sizes


def unit_sizes(structure: Structure, shape: tuple[int, ...], path: str) -> tuple[int, ...]:
    """The sizes, checked.

    Raises:
      SiteError: they do not divide the shape.
    """
    sizes = tuple(structure(shape))
    if len(sizes) != len(shape) or any(n % u for n, u in zip(shape, sizes)):
        raise SiteError(
            f"units of {list(sizes)} weights do not divide `{path}` {list(shape)}. Choose sizes "
            f'that do, or leave it out with exclude="{path}".'
        )
    return sizes


def pool(scores: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """Mean score of every unit."""
    if math.prod(sizes) == 1:
        return scores
    split = [n for pair in zip(scores.shape, sizes) for n in (pair[0] // pair[1], pair[1])]
    return jnp.mean(scores.reshape(split), axis=tuple(range(1, len(split), 2)))


def spread(mask: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """The mask of weights, from that of units."""
    for axis, size in enumerate(sizes):
        mask = jnp.repeat(mask, size, axis) if size > 1 else mask
    return mask
