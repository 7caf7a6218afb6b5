# SPDX-License-Identifier: Apache-2.0
"""What a QTensor is beside its arrays, as plain data, and whether arrays and data fit."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from .. import formats
from .._core.blocks import Blocks, Tiles
from .._core.qtensor import QTensor
from .._errors import ArtifactError

_STATIC = ("format", "dtype", "axis", "unused", "blocks")
LEAVES = ("packed", "scale", "packed_zero_point", "global_scale")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
# A hostile file must not make `dequantize` fill up blocks that are far larger than the array.
_LARGEST_FILLING = 1024


def to_data(q: QTensor, name: str) -> dict[str, Any]:
    """Format, dtype, packed axis, unused codes in a packed row, and blocks.

    Raises:
      ArtifactError: the QTensor cannot be read again from that; `name` says which it is.
    """
    data = {
        "format": formats.to_data(q.format),
        "dtype": str(q.dtype),
        "axis": q.axis,
        "unused": q.unused,
        "blocks": None if q.blocks is None else dataclasses.asdict(q.blocks),
    }
    leaves = {field: getattr(q, field) for field in LEAVES}
    copy = from_data(json.loads(json.dumps(data)), leaves, name)
    for field in _STATIC:
        if getattr(copy, field) != getattr(q, field):
            raise ArtifactError(f"`{name}` has the {field} {getattr(q, field)}: cannot be saved.")
    return data


def from_data(data: dict[str, Any], leaves: dict[str, Any], name: str) -> QTensor:
    """The QTensor of what `to_data` returns and its arrays.

    Raises:
      ArtifactError: data and arrays do not fit, or are none of a QTensor; `name` says which it is.
    """
    if data.keys() != set(_STATIC) or data["dtype"] not in _DTYPES:
        raise ArtifactError(f"The description of the QTensor `{name}` is damaged.")
    try:
        fmt = formats.get(data["format"])
        blocks = _blocks(data["blocks"])
    except (TypeError, ValueError, OverflowError) as error:  # FormatError is a ValueError
        raise ArtifactError(f"The description of the QTensor `{name}` is wrong: {error}") from None
    q = QTensor(
        **{field: leaves[field] for field in LEAVES},
        format=fmt,
        dtype=jnp.dtype(data["dtype"]),
        axis=data["axis"],
        unused=data["unused"],
        blocks=blocks,
    )
    if problem := _problem(q):
        raise ArtifactError(f"The QTensor `{name}` of {fmt.name} does not fit together: {problem}.")
    return q


def _blocks(data: Any) -> Any:
    """The Blocks, Tiles or None of plain data; anything else is a ValueError."""
    if data is None:
        return None
    if not isinstance(data, dict):
        raise ValueError(f"blocks are {type(data).__name__}")
    if data.keys() == {"columns", "rows"}:
        columns, rows = (_blocks(data[part]) for part in ("columns", "rows"))
        if not isinstance(columns, Blocks) or not isinstance(rows, Blocks):
            raise ValueError("tiles are two cuts into blocks")
        return Tiles(columns, rows)
    axis: Any = data.get("axis")
    size = data.get("size")
    whole = isinstance(axis, list | tuple) and all(type(a) is int for a in axis)
    if len(data) != 2 or not whole or type(size) is not int or size < 1:
        raise ValueError(f"blocks of {size!r} values along {axis!r}")
    return Blocks(tuple(axis), size)


def _problem(q: QTensor) -> str | None:
    """What does not fit, in words."""
    arrays = {field: getattr(q, field) for field in LEAVES}
    for field, a in arrays.items():
        optional = field in ("packed_zero_point", "global_scale")
        if a is None and optional:
            continue
        if not hasattr(a, "shape") or not hasattr(a, "dtype"):
            return f"{field} is no array"
    ndim, axis, unused = len(q.packed.shape), q.axis, q.unused
    if type(axis) is not int or not -ndim <= axis < 0:
        return f"its packed axis is {axis!r}"
    if type(unused) is not int or not 0 <= unused < q.format.unit[0]:
        return f"{unused!r} codes of a packed row are unused"
    if wrong := _codes_problem(q.packed, axis, q.shape[axis], q):
        return f"packed {wrong}"
    shape = q.shape
    if q.blocks is not None:
        blocks: Any = q.blocks
        parts = (blocks.columns, blocks.rows) if isinstance(blocks, Tiles) else (blocks,)
        for part in parts:
            axes = part.axis
            if (
                len(set(axes)) < len(axes)
                or not axes
                or not all(-len(shape) <= a < 0 for a in axes)
            ):
                return f"{axes} are no axes of {shape}"
            shape = part.split_shape(shape)
        if math.prod(shape) > max(2**24, _LARGEST_FILLING * q.size):
            return f"its blocks would fill up {q.shape} to {shape}"
    scale = q.scale
    if not (jnp.issubdtype(scale.dtype, jnp.floating) or scale.dtype == jnp.uint8):
        return f"scale has the dtype {scale.dtype}"
    if not _broadcasts(scale.shape, shape):
        return f"scale has the shape {scale.shape}, which does not go with {shape}"
    zero = q.packed_zero_point
    if zero is not None:
        if not scale.shape or (wrong := _codes_problem(zero, -1, scale.shape[-1], q)):
            return f"packed_zero_point {wrong if scale.shape else 'goes with no scale'}"
        if zero.shape[:-1] != scale.shape[:-1]:
            return f"packed_zero_point has the shape {zero.shape}, scale {scale.shape}"
    top = q.global_scale
    if top is not None:
        if not jnp.issubdtype(top.dtype, jnp.floating):
            return f"global_scale has the dtype {top.dtype}"
        if top.ndim > len(shape) or math.prod(top.shape) > max(math.prod(shape), 1):
            return f"global_scale has the shape {top.shape}"
    return None


def _codes_problem(packed: Any, axis: int, count: int, q: QTensor) -> str | None:
    dtype = q.format.dtype if q.format.code_bits >= 8 else np.dtype(np.uint8)
    length = q.format.packed_nbytes((count,)) // dtype.itemsize
    if packed.dtype != dtype or not packed.shape or packed.shape[axis] != length or count < 0:
        return f"is {packed.dtype}{list(packed.shape)}, expected {dtype} and {length} along {axis}"
    return None


def _broadcasts(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    if len(small) > len(large):
        return False
    return all(a in (1, b) for a, b in zip(reversed(small), reversed(large)))
