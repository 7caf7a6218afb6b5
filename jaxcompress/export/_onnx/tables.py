# SPDX-License-Identifier: Apache-2.0
"""Rows of a quantized table: what is looked up is decoded, and the table stays packed.

ONNX looks up no numbers of less than a byte, so they are packed here: byte j of a row holds the
numbers j, j + n, j + 2n ... of it, from the low bits up, and shifts and one Concat give the row.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .convert import Converter
from .graph import Value
from .quantized import Quantized, block


def rows(cv: Converter, x: Any, axis: int, index: str, lead: int) -> str:
    """Writes Gather along an axis of `x`, by an index of `lead` axes; the name of its result."""
    q = x.quantized if isinstance(x, Value) else None
    bits = 16 if q is None or not q.constant or not q.integers else _bits(q, x.shape[-1])
    apart = axis < len(x.shape) - 1
    if q is None or bits > 8 or (bits < 8 and not apart):
        return cv.graph.emit("Gather", [cv.tensor(x), index], axis=axis)
    out, lowest = _numbers(cv, q, bits, axis, index)
    zero = np.asarray(0.0 if q.zero is None else q.zero, np.float32) - np.float32(lowest)
    parts = [np.broadcast_to(part, x.shape) for part in (zero, np.asarray(q.scale, np.float32))]
    n = x.shape[-1]
    size = math.gcd(*(block(part, part.ndim - 1) for part in parts if not _same(part, -1)))
    grouped = apart and 1 < size < n
    others = [0] * (len(x.shape) - 2 + lead)  # sizes that Reshape leaves as they are
    if grouped:
        out = cv.graph.emit("Reshape", [out, cv.graph.ints(*others, n // size, size)])
    for op, part, stem in zip(("Sub", "Mul"), parts, ("zero_point", "scale"), strict=True):
        if op == "Sub" and not part.any():
            continue
        part = part[..., ::size, None] if grouped else part
        small = part[tuple(slice(0, 1 if _same(part, a) else None) for a in range(part.ndim))]
        known = small.shape[axis] == 1
        if known:
            small = small.reshape(*small.shape[:axis], *[1] * lead, *small.shape[axis + 1 :])
        name = cv.graph.constant(small, f"{q.site}.{stem}")
        if not known:
            name = cv.graph.emit("Gather", [name, index], axis=axis)
        out = cv.graph.emit(op, [out, name])
    if grouped:
        out = cv.graph.emit("Reshape", [out, cv.graph.ints(*others, n)])
    return out if x.dtype == np.float32 else cv.cast(out, x.dtype)


def _same(x: np.ndarray, axis: int) -> bool:
    """Whether an array does not vary along an axis."""
    return x.shape[axis] == 1 or not (x != x.take([0], axis=axis)).any()


def _bits(q: Quantized, n: int) -> int:
    """How many bits a number takes in rows of n numbers."""
    width = int(q.high - q.low).bit_length()
    return next((b for b in (2, 4) if width <= b and n % (8 // b) == 0), max(width, 8))


def _numbers(cv: Converter, q: Quantized, bits: int, axis: int, index: str) -> tuple[str, float]:
    """(float32 rows, what has to be added to them) of the numbers of a table."""
    numbers = np.asarray(q.numbers)
    if bits == 8:
        codes = numbers.astype(np.int8 if q.low < 0 else np.uint8)
        found = cv.graph.emit("Gather", [cv.graph.constant(codes, q.site), index], axis=axis)
        return cv.cast(found, np.float32), 0.0
    planes = np.split((numbers - q.low).astype(np.uint8), 8 // bits, axis=-1)
    codes = sum((plane << bits * i for i, plane in enumerate(planes)), np.zeros((), np.uint8))
    packed = cv.graph.emit("Gather", [cv.graph.constant(codes, q.site), index], axis=axis)
    mask, found = cv.graph.constant(np.uint8(2**bits - 1)), []
    for i in range(8 // bits):
        plane = packed
        if i:
            by = cv.graph.constant(np.uint8(bits * i))
            plane = cv.graph.emit("BitShift", [plane, by], direction="RIGHT")
        if i < 8 // bits - 1:
            plane = cv.graph.emit("BitwiseAnd", [plane, mask])
        found.append(plane)
    return cv.cast(cv.graph.emit("Concat", found, axis=-1), np.float32), float(q.low)
