# SPDX-License-Identifier: Apache-2.0
"""`Quantized`: numbers of a grid, scales and zero points, and how they are written for ONNX.

    value = (numbers - zero) * scale                       DequantizeLinear
    numbers = saturate(round_half_even(x / scale) + zero)  QuantizeLinear

What is constant is stored in the smallest type of ONNX that holds the numbers of the format.
Reference: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from .graph import SINCE, Graph, Value

_TYPES = (  # (dtype, lowest, highest, opset)
    ("int2", -2, 1, 25),
    ("uint2", 0, 3, 25),
    ("int4", -8, 7, 21),
    ("uint4", 0, 15, 21),
    ("int8", -128, 127, 10),
    ("uint8", 0, 255, 10),
)


@dataclasses.dataclass(eq=False)
class Quantized:
    """An operand of a site before it is decoded.

    Attributes:
      numbers: of the grid, in the layout of the value: an array, or a value that holds them.
      scale: float32, broadcasts to the shape: an array (perhaps a view) or a value.
      zero: like `scale`, in the unit of the numbers; None for 0.
      low, high: the least and the largest number of the format.
      integers: whether numbers are whole.
      dtype: name of the dtype of codes that are no integers.
      powers: whether scales are powers of two by definition of the format.
      site: name of the site that reads it.
      raw: what was rounded, where that is left to whoever reads it: `numbers` is then None.
      stored: a value of codes, which QuantizeLinear gave for one scale of the tensor: numbers plus
        `shift`, uint8 or int8; else None.
      shift: what is added to numbers in `stored`.
      measured: names of the scale and the zero point of `stored`, where the model computes them.
    """

    numbers: Any
    scale: Any
    zero: Any
    low: float
    high: float
    integers: bool
    dtype: str
    powers: bool
    site: str
    raw: Value | None = None
    stored: Value | None = None
    shift: int = 0
    measured: list[str] = dataclasses.field(default_factory=list)

    @property
    def constant(self) -> bool:
        """Whether all of it is known when the model is written."""
        parts = self.numbers, self.scale, self.zero, self.raw
        return all(not isinstance(x, Value) for x in parts)

    def storage(self, opset: int) -> np.dtype | None:
        """The smallest type for the numbers; None if there is none."""
        if not self.integers:
            known = opset >= SINCE.get(self.dtype, np.inf) or self.dtype == "float4_e2m1fn"
            return np.dtype(getattr(ml_dtypes, self.dtype)) if known else None
        for name, low, high, since in _TYPES:
            if low <= self.low and self.high <= high and opset >= since:
                return np.dtype(getattr(ml_dtypes, name, name))
        return None


@dataclasses.dataclass
class Packed:
    """A constant as DequantizeLinear takes it: codes, scales, zero points, and its attributes."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    attributes: dict[str, Any]

    def decode(self, graph: Graph, stem: str) -> str:
        """Writes DequantizeLinear; the name of its result."""
        names = [graph.constant(self.codes, stem), graph.constant(self.scale, f"{stem}.scale")]
        if self.zero is not None:
            names.append(graph.constant(self.zero, f"{stem}.zero_point"))
        return graph.emit("DequantizeLinear", names, **self.attributes)

    def multiplied(self, graph: Graph, stem: str) -> str | None:
        """The same by Cast and Mul, which runtimes compute once, when they load the model."""
        size = self.attributes.get("block_size")
        if size is not None or (self.zero is not None and self.zero.astype(np.float32).any()):
            return None
        shape = [1] * self.codes.ndim
        if self.attributes:
            shape[self.attributes["axis"]] = -1
        codes = graph.constant(self.codes, stem)
        out = graph.emit("Cast", [codes], to=onnx.TensorProto.FLOAT)
        return graph.emit("Mul", [out, graph.constant(self.scale.reshape(shape), f"{stem}.scale")])


def pack(
    q: Quantized, order: tuple[int, ...], shape: tuple[int, ...], opset: int, small: bool = False
) -> Packed | None:
    """A constant transposed by `order` and reshaped, for DequantizeLinear.

    `small` stores scales that are powers of two in 8 bits, which runtimes do not read yet.

    None where ONNX has no such scales: other ones than of the tensor, along one axis, or of
    blocks along one axis.
    """
    dtype = q.storage(opset)
    if dtype is None:
        return None

    def laid_out(x: Any) -> np.ndarray:
        whole = np.broadcast_to(np.asarray(x), np.shape(q.numbers))
        return np.transpose(whole, order).reshape(shape)

    codes = laid_out(q.numbers)
    scale, attributes = _structure(laid_out(q.scale), opset)
    if scale is None:
        return None
    zero = None
    if q.zero is not None:
        zeros = laid_out(q.zero)
        zero = _pick(zeros, attributes, scale.shape)
        if not np.array_equal(_spread(zero, attributes, zeros.shape), zeros):
            return None
        zero = zero.astype(np.float32).astype(dtype)
    if zero is None and q.integers:  # kernels want one
        zero = np.zeros(scale.shape, dtype)
    scale = scale.astype(np.float32)
    if small and q.powers and opset >= SINCE["float8_e8m0fnu"] and zero is None:
        scale = scale.astype(ml_dtypes.float8_e8m0fnu)
        attributes = {**attributes, "output_dtype": onnx.TensorProto.FLOAT}
    return Packed(codes.astype(dtype), scale, zero, attributes)


def _structure(scale: np.ndarray, opset: int) -> tuple[np.ndarray | None, dict[str, int]]:
    """(scales as they are stored, attributes of DequantizeLinear) of scales of every value."""
    if not scale.size or (scale == scale.flat[0]).all():
        return np.asarray(scale.flat[0] if scale.size else 1.0), {}
    varying = [a for a in range(scale.ndim) if (scale != scale.take([0], axis=a)).any()]
    if len(varying) == 1:
        found = {"axis": varying[0]}
        return _pick(scale, found, ()), found
    if opset < 21:
        return None, {}
    for axis in range(scale.ndim):
        size = block(scale, axis)
        if size > 1:
            found = {"axis": axis, "block_size": size}
            return _pick(scale, found, ()), found
    return None, {}


def block(scale: np.ndarray, axis: int) -> int:
    """How many neighbours along an axis share a scale: the largest such divisor; 1 for none."""
    n = scale.shape[axis]
    rows = np.moveaxis(scale, axis, 0)
    changes = np.flatnonzero((rows[1:] != rows[:-1]).any(axis=tuple(range(1, scale.ndim)))) + 1
    size = int(np.gcd.reduce(np.append(changes, n)))
    return size if size < n else 1


def _pick(x: np.ndarray, attributes: dict[str, int], shape: tuple) -> np.ndarray:
    """One of the values that share a scale, for each scale."""
    if not attributes:
        return np.asarray(x.flat[0])
    axis, size = attributes["axis"], attributes.get("block_size")
    if size:
        return np.ascontiguousarray(x.take(np.arange(0, x.shape[axis], size), axis=axis))
    index = tuple(slice(None) if a == axis else 0 for a in range(x.ndim))
    return np.ascontiguousarray(x[index])


def _spread(x: np.ndarray, attributes: dict[str, int], shape: tuple) -> np.ndarray:
    """Inverse of `_pick`."""
    if not attributes:
        return np.broadcast_to(x, shape)
    axis, size = attributes["axis"], attributes.get("block_size")
    if size:
        return np.repeat(x, size, axis=axis)
    return np.broadcast_to(x.reshape([-1 if a == axis else 1 for a in range(len(shape))]), shape)
