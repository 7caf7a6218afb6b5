# SPDX-License-Identifier: Apache-2.0
"""Products of integers whose ranges are found while they run: MatMulInteger."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .convert import Converter, shrunk
from .decode import numbers_of
from .graph import Value
from .quantized import Quantized
from .side import Side, keeps, left_tensor, right_tensor


def dynamic(cv: Converter, a: Side, b: Side, dtype: np.dtype) -> str | None:
    """MatMulInteger and the scales afterwards, in the order in which the function has them."""
    qa, qb = a.quantized, b.quantized
    assert qa is not None and qb is not None
    if cv.target == "tensorrt" or qb.zero is not None or not _outside(qa, a) or not _outside(qb, b):
        return None
    zero = np.zeros(()) if qa.zero is None or qa.measured else qa.zero
    if isinstance(zero, Value) or (zero := shrunk(zero)).size != 1:
        return None
    order_b = (*b.batch, *b.summed, *b.free)
    shape = (*b.sizes(b.batch), math.prod(b.sizes(b.summed)), math.prod(b.sizes(b.free)))
    own: list[str] = []  # the zero point of a right operand that is no constant
    if qb.constant:
        small = qb.storage(cv.opset)
        if small is None or small.name not in ("int8", "int4", "int2"):
            return None
        codes = np.transpose(qb.numbers, order_b).reshape(shape).astype(small)
        weight = cv.graph.constant(codes, qb.site)
        weight = weight if small.name == "int8" else cv.cast(weight, np.int8)
        scale = cv.graph.constant(
            _wide(np.transpose(np.asarray(qb.scale), order_b), b), f"{qb.site}.scale"
        )
    else:
        if qb.low < -128 or qb.high > 127:
            return None
        found = numbers_of(cv, qb)
        shifted = cv.elementwise("Add", [found, np.float32(128)], found.shape, np.float32)
        numbers = cv.elementwise("Cast", [shifted], found.shape, np.uint8, to=cv.dtype(np.uint8))
        own = [cv.graph.constant(np.uint8(128))]
        weight, scale = cv.tensor(numbers, order_b), thin(cv, qb.scale, order_b)
        if len(b.summed) != 1 or len(b.free) != 1:
            weight = cv.reshaped(weight, shape)
            scale = cv.reshaped(scale, [*b.sizes(b.batch), 1, -1])
    order_a = (*a.batch, *a.free, *a.summed)
    if qa.raw is not None and isinstance(qa.scale, Value) and not a.batch:
        left, point = _by_rows(cv, a, qa, order_a), 128
    else:
        codes, point = unsigned(cv, qa)
        left, point = left_tensor(cv, a, codes), point + int(zero.reshape(()))
    unit, point = qa.measured or ("", cv.graph.constant(np.uint8(point)))
    total = cv.cast(cv.graph.emit("MatMulInteger", [left, weight, point, *own]), np.float32)
    if unit:  # the form of DynamicQuantizeMatMul
        out = cv.graph.emit("Mul", [total, cv.graph.emit("Mul", [unit, scale])])
        return out if dtype == np.float32 else cv.cast(out, dtype)
    rows = thin(cv, qa.scale, order_a)
    if not keeps(a) and not (len(a.free) == 1 and len(a.summed) == 1):
        rows = cv.reshaped(rows, [*a.sizes(a.batch), -1, 1])
    out = cv.graph.emit("Mul", [cv.graph.emit("Mul", [total, rows]), scale])
    return out if dtype == np.float32 else cv.cast(out, dtype)


def _by_rows(cv: Converter, a: Side, q: Quantized, order: tuple[int, ...]) -> str:
    """uint8 codes by one QuantizeLinear, with a scale for each row."""
    assert q.raw is not None
    width = math.prod(a.sizes(a.summed))
    x = cv.tensor(q.raw, order)
    x = x if len(order) == 2 else cv.reshaped(x, [-1, width])
    codes = quantized_by_first_axis(cv, x, _rows(cv, q.scale, a))
    if len(order) == 2:
        return codes
    flat = a.sizes(a.free) if keeps(a) else [math.prod(a.sizes(a.free))]
    return cv.reshaped(codes, [*flat, width])


def quantized_by_first_axis(cv: Converter, x: str, scale: str) -> str:
    """uint8 codes, 128 for 0, of a tensor with a scale for each index of its first axis."""
    scale = cv.reshaped(scale, [-1])
    size = cv.graph.emit("Shape", [scale])
    points = cv.graph.emit("Expand", [cv.graph.constant(np.uint8(128)), size])
    return cv.graph.emit("QuantizeLinear", [x, scale, points], axis=0)


def _rows(cv: Converter, scale: Value, a: Side) -> str:
    """The tensor of one scale for each index of the free axes."""
    held = tuple(1 if i in a.summed else d for i, d in enumerate(scale.shape))
    if scale.held != held:  # shared by rows too
        goal = [held[i] for i in np.argsort(scale.perm)]
        scale = dataclasses.replace(
            scale, name=cv.graph.emit("Expand", [scale.name, cv.sizes(goal)]), held=held
        )
    return thin(cv, scale, (*a.free, *a.summed))


def _wide(scale: np.ndarray, b: Side) -> np.ndarray:
    """Scales [*batch, 1, columns] of a weight [*batch, *summed, *free], equal along the sum."""
    n, k = len(b.batch), len(b.summed)
    first = scale[(slice(None),) * n + (0,) * k]
    return np.ascontiguousarray(first).reshape(*b.sizes(b.batch), 1, -1).astype(np.float32)


def thin(cv: Converter, scale: Any, order: tuple[int, ...]) -> str:
    """The tensor of scales with size 1 where they are shared."""
    if not isinstance(scale, Value):
        return cv.graph.constant(np.transpose(shrunk(scale), order).astype(np.float32))
    scale = cv.written(scale)
    perm = tuple(scale.perm[i] for i in order)
    if perm == tuple(range(len(perm))):
        return scale.name
    return cv.graph.emit("Transpose", [scale.name], perm=perm)


def _outside(q: Quantized, side: Side) -> bool:
    """Whether scales are the same along what is summed."""
    if isinstance(q.scale, Value):
        return all(q.scale.held[i] == 1 for i in side.summed)
    scale = np.asarray(q.scale)
    return all(not (scale != scale.take([0], axis=i)).any() for i in side.summed)


def unsigned(cv: Converter, q: Quantized) -> tuple[Value, int]:
    """(uint8 codes of an activation, what was added to its numbers)."""
    if q.stored is not None:
        return q.stored, q.shift
    numbers, shift = numbers_of(cv, q), 0 if q.low >= 0 else 128
    while isinstance(numbers, Value) and numbers.cast_of is not None:
        numbers = numbers.cast_of  # whole numbers, whatever they are held in
    add = cv.graph.constant(np.asarray(shift, numbers.dtype))

    def code(name: str) -> str:
        return cv.cast(cv.graph.emit("Add", [name, add]) if shift else name, np.uint8)

    return cv.elementwise(code, [numbers], numbers.shape, np.uint8), shift


def whole(cv: Converter, a: Side, b: Side, dtype: np.dtype) -> str | None:
    """A product of integers: MatMulInteger of bytes; else MatMul in the dtype of the result."""
    small = all(np.dtype(s.x.dtype).name in ("int8", "uint8") for s in (a, b)) and dtype == np.int32
    if not small:
        return None
    left, *point = _bytes(cv, a)
    right, *other = _bytes(cv, b) if isinstance(b.x, Value) else (b,)  # constants: `passes.py`
    point = point or [cv.graph.constant(np.uint8(0))]  # says that the left one is uint8
    names = [left_tensor(cv, left, left.x), right_tensor(cv, right, np.dtype(right.x.dtype))]
    return cv.graph.emit("MatMulInteger", [*names, *point, *other])


def _bytes(cv: Converter, side: Side) -> tuple:
    """(an operand of int8 in uint8, its zero point), as kernels are fast and exact for; others as
    they are."""
    if side.x.dtype != np.int8:
        return (side,)
    wide = cv.elementwise("Cast", [side.x], side.x.shape, np.int32, to=cv.dtype(np.int32))
    shifted = cv.elementwise(
        "Add", [wide, np.broadcast_to(np.int32(128), wide.shape)], wide.shape, np.int32
    )
    codes = cv.elementwise("Cast", [shifted], wide.shape, np.uint8, to=cv.dtype(np.uint8))
    return side._replace(x=codes), cv.graph.constant(np.uint8(128))
