# SPDX-License-Identifier: Apache-2.0
"""Rules of matrix products: in floats, on decoded weights, and on integers.

stored ranges        MatMul(DequantizeLinear(x), DequantizeLinear(w)): runtimes see integers
dynamic ranges       MatMulInteger(x, w) * scale_x * scale_w, or * (scale_x * scale_w) of tensors
weights only         MatMul(x, DequantizeLinear(w))
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from . import fpga
from .convert import Converter, rule, shrunk
from .decode import numbers_of, scale_names
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


@rule("dot_general")
def _dot_general(cv: Converter, eqn: Any, xs: list) -> Value:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    left, right = Side(_seen(xs[0]), tuple(lc), tuple(lb)), Side(_seen(xs[1]), tuple(rc), tuple(rb))
    swapped = left.weight and not right.weight  # weights are stored as MatMul reads them
    a, b = (right, left) if swapped else (left, right)
    if swapped and b.batch and list(b.batch) != sorted(b.batch):
        a, b, swapped = left, right, False
    aval = eqn.outvars[0].aval
    with cv.at(a.x, b.x):
        name = product(cv, a, b, np.dtype(aval.dtype))
    n, fa, fb = len(a.batch), len(a.free), len(b.free)
    perm = list(range(n + fa + fb))
    if swapped:
        perm = [*range(n), *range(n + fa, n + fa + fb), *range(n, n + fa)]
    return cv.value(name, aval.shape, aval.dtype, perm)


def _seen(x: Any) -> Any:
    """x behind casts of what was decoded, which change nothing that a product reads."""
    if (
        isinstance(x, Value)
        and x.quantized is None
        and x.cast_of is not None
        and x.cast_of.quantized is not None
    ):
        return x.cast_of
    return x


def product(cv: Converter, a: Side, b: Side, dtype: np.dtype) -> str:
    """The name of the product, [*batch, *free of a, *free of b]."""
    shape = [*a.sizes(a.batch), *a.sizes(a.free), *b.sizes(b.free)]
    qa, qb = a.quantized, b.quantized
    found = None
    if (
        cv.target != "qonnx"
        and qa is not None
        and qb is not None
        and qa.integers
        and qb.integers
        and dtype.kind == "f"
    ):
        found = _stored(cv, a, b) or _dynamic(cv, a, b, dtype)
    if found is None and not _floating(a.x) and dtype.kind == "i":
        found = _whole(cv, a, b, dtype)
    if found is None:
        inputs = [_left(cv, a, _plain(cv, a, dtype)), _right(cv, b, dtype)]
        found = cv.graph.emit("MatMul", inputs)
    rows = a.sizes(a.free) if _keeps(a) else [math.prod(a.sizes(a.free))]
    held = [*a.sizes(a.batch), *rows, math.prod(b.sizes(b.free))]
    return found if held == shape else cv.reshaped(found, shape)


def _floating(x: Any) -> bool:
    return np.dtype(x.dtype).kind not in "iub"


def _plain(cv: Converter, side: Side, dtype: np.dtype) -> Any:
    """The operand in the dtype of the result."""
    x = side.x
    if x.dtype == dtype:
        return x
    if not isinstance(x, Value):
        return np.asarray(x).astype(dtype)
    return cv.elementwise("Cast", [x], x.shape, dtype, to=cv.dtype(dtype))


def _keeps(a: Side) -> bool:
    """Whether the left operand needs no reshape for MatMul."""
    return not a.batch and len(a.summed) == 1 and len(a.free) >= 1


def _left(cv: Converter, a: Side, x: Any, width: int | None = None) -> str:
    """The tensor [*batch, rows, sum] of an operand, or of its scales, whose width is 1."""
    order = (*a.batch, *a.free, *a.summed)
    name = cv.tensor(x, order)
    if _keeps(a):
        return name
    summed = math.prod(a.sizes(a.summed)) if width is None else width
    if len(a.free) == 1 and len(a.summed) == 1:
        return name
    return cv.reshaped(name, [*a.sizes(a.batch), math.prod(a.sizes(a.free)), summed])


def _right(cv: Converter, b: Side, dtype: np.dtype) -> str:
    """The tensor [*batch, sum, columns] of the right operand; a weight is decoded."""
    order = (*b.batch, *b.summed, *b.free)
    shape = (*b.sizes(b.batch), math.prod(b.sizes(b.summed)), math.prod(b.sizes(b.free)))
    if cv.target == "qonnx" and b.quantized is not None and b.quantized.constant:
        return fpga.weight(cv, b.quantized, order, shape)
    packed = _packed(cv, b)
    if packed is not None:
        kernel = packed.attributes.get("axis") == (0 if "block_size" in packed.attributes else 1)
        name = cv.decoded(packed, b.quantized.site, kernel and packed.codes.ndim == 2)  # type: ignore[union-attr]
        return name if dtype == np.float32 else cv.cast(name, dtype)
    x = _plain(cv, b, dtype)
    if not isinstance(x, Value):
        return cv.graph.constant(np.transpose(x, order).reshape(shape), "weight")
    name = cv.tensor(x, order)
    if len(b.summed) == 1 and len(b.free) == 1:
        return name
    return cv.reshaped(name, shape)


def _packed(cv: Converter, b: Side) -> Packed | None:
    q = b.quantized
    if q is None or not q.constant:
        return None
    order = (*b.batch, *b.summed, *b.free)
    shape = (*b.sizes(b.batch), math.prod(b.sizes(b.summed)), math.prod(b.sizes(b.free)))
    return cv.pack(q, order, shape)


def _stored(cv: Converter, a: Side, b: Side) -> str | None:
    """A product that runtimes run on integers: the activation has one known scale."""
    qa, packed = a.quantized, _packed(cv, b)
    if (
        qa is None
        or qa.stored is None
        or qa.measured
        or packed is None
        or a.batch
        or packed.codes.ndim != 2
    ):
        return None
    if packed.attributes not in ({}, {"axis": 1}) or packed.codes.dtype.name != "int8":
        packed = _as_int8(packed)
        if packed is None:
            return None
    order = (*a.free, *a.summed)
    codes = cv.tensor(qa.stored, order)
    summed = math.prod(a.sizes(a.summed))
    if len(order) != 2 or len(a.summed) != 1:  # two axes: Gemm adds the bias in integers
        rows = math.prod(a.sizes(a.free))
        codes = cv.reshaped(codes, [rows, summed])
    x = cv.graph.emit("DequantizeLinear", [codes, *scale_names(cv, qa)])
    out = cv.graph.emit("MatMul", [x, packed.decode(cv.graph, qa.site)])
    columns = math.prod(b.sizes(b.free))
    rows = a.sizes(a.free) if _keeps(a) else [math.prod(a.sizes(a.free))]
    return out if len(rows) == 1 else cv.reshaped(out, [*rows, columns])


def _as_int8(packed: Packed) -> Packed | None:
    """The same weight in int8, which integer kernels take; None with scales inside the sum."""
    if packed.attributes not in ({}, {"axis": 1}) or (
        packed.zero is not None and packed.zero.any()
    ):
        return None
    if packed.codes.dtype.name not in ("int8", "int4", "int2"):
        return None
    return Packed(
        packed.codes.astype(np.int8),
        packed.scale,
        np.zeros(packed.scale.shape, np.int8),
        packed.attributes,
    )


def _dynamic(cv: Converter, a: Side, b: Side, dtype: np.dtype) -> str | None:
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
        left, point = _left(cv, a, codes), point + int(zero.reshape(()))
    unit, point = qa.measured or ("", cv.graph.constant(np.uint8(point)))
    total = cv.cast(cv.graph.emit("MatMulInteger", [left, weight, point, *own]), np.float32)
    if unit:  # the form of DynamicQuantizeMatMul
        out = cv.graph.emit("Mul", [total, cv.graph.emit("Mul", [unit, scale])])
        return out if dtype == np.float32 else cv.cast(out, dtype)
    rows = thin(cv, qa.scale, order_a)
    if not _keeps(a) and not (len(a.free) == 1 and len(a.summed) == 1):
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
    flat = a.sizes(a.free) if _keeps(a) else [math.prod(a.sizes(a.free))]
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


def _whole(cv: Converter, a: Side, b: Side, dtype: np.dtype) -> str | None:
    """A product of integers: MatMulInteger of bytes; else MatMul in the dtype of the result."""
    small = all(np.dtype(s.x.dtype).name in ("int8", "uint8") for s in (a, b)) and dtype == np.int32
    if not small:
        return None
    left, *point = _bytes(cv, a)
    right, *other = _bytes(cv, b) if isinstance(b.x, Value) else (b,)  # constants: `passes.py`
    point = point or [cv.graph.constant(np.uint8(0))]  # says that the left one is uint8
    names = [_left(cv, left, left.x), _right(cv, right, np.dtype(right.x.dtype))]
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


@rule("ragged_dot_general", "ragged_dot")
def _ragged(cv: Converter, eqn: Any, xs: list) -> Value:
    """Every group's product on all rows, and of each row the one of its group."""
    from ..._errors import ArtifactError

    l, r, sizes = xs  # noqa: E741
    if len(l.shape) != 2 or len(r.shape) != 3:
        raise ArtifactError("only rows [m, k] by experts [groups, k, n] are written.")
    aval = eqn.outvars[0].aval
    groups, dtype = r.shape[0], np.dtype(aval.dtype)
    ends = cv.graph.emit("CumSum", [cv.tensor(sizes), cv.graph.constant(np.int64(0))])
    rows = cv.graph.constant(np.arange(l.shape[0], dtype=np.dtype(sizes.dtype))[:, None])
    whole = r if isinstance(r, Value) and r.quantized is None else None
    tensor = cv.tensor(whole) if whole is not None else None
    total = None
    for g in range(groups):
        if tensor is None:
            expert = _expert(r, g)
        else:
            index = cv.graph.constant(np.int64(g))
            expert = cv.value(
                cv.graph.emit("Gather", [tensor, index], axis=0), r.shape[1:], r.dtype
            )
        y = product(cv, Side(l, (1,), ()), Side(expert, (0,), ()), dtype)
        end = cv.graph.emit("Gather", [ends, cv.graph.ints(g)], axis=0)
        mine = cv.graph.emit("Less", [rows, end])
        if g:
            start = cv.graph.emit("Gather", [ends, cv.graph.ints(g - 1)], axis=0)
            mine = cv.graph.emit("And", [mine, cv.graph.emit("GreaterOrEqual", [rows, start])])
        y = cv.graph.emit("Where", [mine, y, cv.graph.constant(np.zeros((), dtype))])
        total = y if total is None else cv.graph.emit("Add", [total, y])
    assert total is not None
    return cv.value(total, aval.shape, dtype)


def _expert(r: Any, g: int) -> Any:
    """One of the experts of a known weight."""
    if not isinstance(r, Value):
        return r[g]
    q = r.quantized
    assert q is not None
    part = dataclasses.replace(
        q, numbers=q.numbers[g], scale=q.scale[g], zero=None if q.zero is None else q.zero[g]
    )
    shape = r.shape[1:]
    return Value("", shape, r.dtype, shape, tuple(range(len(shape))), part)
