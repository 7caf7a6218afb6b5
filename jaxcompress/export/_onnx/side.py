# SPDX-License-Identifier: Apache-2.0
"""The operands of a product as MatMul reads them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from . import fpga
from .convert import Converter
from .graph import Value
from .quantized import Packed, Quantized


class Side(NamedTuple):
    """An operand with the axes that are summed, that both have, and the others."""

    x: Any
    summed: tuple[int, ...]
    batch: tuple[int, ...]

    @property
    def free(self) -> tuple[int, ...]:
        return tuple(a for a in range(len(self.x.shape)) if a not in (*self.summed, *self.batch))

    def sizes(self, axes: tuple[int, ...]) -> list:
        return [self.x.shape[a] for a in axes]

    @property
    def quantized(self) -> Quantized | None:
        q = self.x.quantized if isinstance(self.x, Value) else None
        return q if q is not None else None

    @property
    def weight(self) -> bool:
        """Whether it is known when the model is written."""
        return not isinstance(self.x, Value) or (
            self.quantized is not None and self.quantized.constant
        )


def floating(x: Any) -> bool:
    return np.dtype(x.dtype).kind not in "iub"


def plain(cv: Converter, side: Side, dtype: np.dtype) -> Any:
    """The operand in the dtype of the result."""
    x = side.x
    if x.dtype == dtype:
        return x
    if not isinstance(x, Value):
        return np.asarray(x).astype(dtype)
    return cv.elementwise("Cast", [x], x.shape, dtype, to=cv.dtype(dtype))


def keeps(a: Side) -> bool:
    """Whether the left operand needs no reshape for MatMul."""
    return not a.batch and len(a.summed) == 1 and len(a.free) >= 1


def left_tensor(cv: Converter, a: Side, x: Any, width: int | None = None) -> str:
    """The tensor [*batch, rows, sum] of an operand, or of its scales, whose width is 1."""
    order = (*a.batch, *a.free, *a.summed)
    name = cv.tensor(x, order)
    if keeps(a):
        return name
    summed = math.prod(a.sizes(a.summed)) if width is None else width
    if len(a.free) == 1 and len(a.summed) == 1:
        return name
    return cv.reshaped(name, [*a.sizes(a.batch), math.prod(a.sizes(a.free)), summed])


def right_tensor(cv: Converter, b: Side, dtype: np.dtype) -> str:
    """The tensor [*batch, sum, columns] of the right operand; a weight is decoded."""
    order = (*b.batch, *b.summed, *b.free)
    shape = (*b.sizes(b.batch), math.prod(b.sizes(b.summed)), math.prod(b.sizes(b.free)))
    if cv.target == "qonnx" and b.quantized is not None and b.quantized.constant:
        return fpga.weight(cv, b.quantized, order, shape)
    packed = packed_weight(cv, b)
    if packed is not None:
        kernel = packed.attributes.get("axis") == (0 if "block_size" in packed.attributes else 1)
        name = cv.decoded(packed, b.quantized.site, kernel and packed.codes.ndim == 2)  # type: ignore[union-attr]
        return name if dtype == np.float32 else cv.cast(name, dtype)
    x = plain(cv, b, dtype)
    if not isinstance(x, Value):
        return cv.graph.constant(np.transpose(x, order).reshape(shape), "weight")
    name = cv.tensor(x, order)
    if len(b.summed) == 1 and len(b.free) == 1:
        return name
    return cv.reshaped(name, shape)


def packed_weight(cv: Converter, b: Side) -> Packed | None:
    q = b.quantized
    if q is None or not q.constant:
        return None
    order = (*b.batch, *b.summed, *b.free)
    shape = (*b.sizes(b.batch), math.prod(b.sizes(b.summed)), math.prod(b.sizes(b.free)))
    return cv.pack(q, order, shape)
