# SPDX-License-Identifier: Apache-2.0
"""What a SparseTensor is beside its leaves, as plain data, and whether they fit."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._core.qtensor import QTensor
from .._core.sparse import SparseTensor
from .._errors import ArtifactError


def to_data(s: SparseTensor) -> dict[str, Any]:
    """Shape, pattern and axis."""
    pattern = None if s.pattern is None else list(s.pattern)
    return {"shape": list(s.shape), "pattern": pattern, "axis": s.axis}


def from_data(data: dict[str, Any], values: Any, index: Any, name: str) -> SparseTensor:
    """The SparseTensor of what `to_data` returns and its leaves.

    Raises:
      ArtifactError: they do not fit, or are none of a SparseTensor; `name` says which it is.
    """
    if problem := _problem(data, values, index):
        raise ArtifactError(f"The SparseTensor `{name}` does not fit together: {problem}.")
    pattern = None if data["pattern"] is None else tuple(data["pattern"])
    return SparseTensor(values, index, tuple(data["shape"]), pattern, data["axis"])


def _problem(data: dict[str, Any], values: Any, index: Any) -> str | None:
    """What does not fit, in words."""
    shape: Any = data.get("shape")
    pattern: Any = data.get("pattern")
    axis: Any = data.get("axis")
    whole = type(shape) is list and all(type(n) is int and 0 <= n < 2**60 for n in shape)
    if len(data) != 3 or not whole or not 0 < len(shape) <= 32 or type(axis) is not int:
        return "its description is damaged"
    if not isinstance(values, QTensor) and not hasattr(values, "dtype"):
        return "its values are no array"
    if getattr(index, "dtype", None) != np.uint8 or not jnp.issubdtype(values.dtype, jnp.floating):
        return "index or values have the wrong dtype"
    if pattern is None:
        if index.shape != (-(-math.prod(shape) // 8),) or values.ndim != 1:
            return f"index is {list(index.shape)} and values {list(values.shape)} of {shape}"
        count = int(np.unpackbits(np.asarray(index)).sum())
        return None if count == values.size else f"{values.size} values and {count} places"
    if type(pattern) is not list or len(pattern) != 2 or not all(type(n) is int for n in pattern):
        return "its description is damaged"
    n, m = pattern
    if not 0 < n <= m <= 256 or not -len(shape) <= axis < 0 or shape[axis] % m:
        return f"{n}:{m} along axis {axis} of {shape}"
    small = [*shape]
    small[axis] = shape[axis] // m * n
    packed = [*small[:-1], -(-small[-1] * max(1, (m - 1).bit_length()) // 8)]
    if [*values.shape] != small or [*index.shape] != packed:
        return f"index is {list(index.shape)} and values {list(values.shape)} of {shape}"
    return None
