# SPDX-License-Identifier: Apache-2.0
"""How a granularity cuts an array, and which axes of the cut array share a scale."""

import math
from collections.abc import Sequence

from .._core.blocks import Blocks, Tiles
from .._errors import FormatError
from .granularity import Granularity


def check(
    shape: Sequence[int], axis: int | Sequence[int], granularity: Granularity, indivisible: str
) -> tuple[int, ...]:
    """Returns the contracted axes, none negative, of an array that can be cut like this.

    Raises:
        FormatError: if an axis is out of range or repeated, or a group does not fit.
    """
    given = (axis,) if isinstance(axis, int) else tuple(axis)
    ndim = len(shape)
    if any(not -ndim <= a < ndim for a in given):
        raise FormatError(f"axis {given} is out of range for an array of shape {shape}.")
    normal = tuple(a % ndim for a in given)
    if len(set(normal)) != len(normal):
        raise FormatError(f"axis {given} names an axis of shape {shape} twice.")
    kept = _kept(ndim, normal)
    for size, axes, what in (
        (granularity.size, normal, f"axis {given}"),
        (granularity.rows if kept else None, kept, f"the other axes {kept}"),
    ):
        length = math.prod(shape[a] for a in axes)
        if size and length % size and indivisible == "error":
            fits = [n for n in range(min(size, length), 0, -1) if length % n == 0][:3]
            raise FormatError(
                f"{granularity} does not fit shape {tuple(shape)}: {what} of length {length} is "
                f"not a multiple of {size}. Sizes that fit: {', '.join(map(str, fits))}; "
                "or say indivisible='pad' or 'channel'."
            )
    return normal


def cut(
    shape: tuple[int, ...], axis: tuple[int, ...], granularity: Granularity, indivisible: str
) -> tuple[Blocks | Tiles | None, tuple[int, ...]]:
    """Returns how the array is cut, or None, and which axes of the cut array share a scale.

    Args:
        shape: of the array.
        axis: its contracted axes, none negative.
        granularity: who shares a scale.
        indivisible: what happens where groups do not fit: "pad" them, or one scale per channel.
    """
    kind, size = granularity.kind, granularity.size
    if kind == "tensor":
        return None, tuple(range(len(shape)))
    if kind == "example":
        return None, tuple(range(1, len(shape)))
    if size is None or not axis:
        return None, axis
    kept = _kept(len(shape), axis)
    rows = granularity.rows if kept else None
    fits = math.prod(shape[a] for a in axis) % size == 0
    fits = fits and (rows is None or math.prod(shape[a] for a in kept) % rows == 0)
    if not (fits or indivisible == "pad"):
        return None, axis
    columns = Blocks(tuple(a - len(shape) for a in axis), size)
    if rows is None:
        return columns, columns.inner_axes(len(shape))
    # The first cut puts two axes where the first contracted one was; what is kept moves apart.
    places = [i + 2 * (a > min(axis)) - (len(kept) + 2) for i, a in enumerate(kept)]
    tiles = Tiles(columns, Blocks(tuple(places), rows))
    return tiles, tiles.inner_axes(len(shape))


def _kept(ndim: int, axis: Sequence[int]) -> tuple[int, ...]:
    return tuple(a for a in range(ndim) if a not in axis)
