# SPDX-License-Identifier: Apache-2.0
"""Rules of matrix products: in floats, on decoded weights, and on integers.

stored ranges        MatMul(DequantizeLinear(x), DequantizeLinear(w)): runtimes see integers
dynamic ranges       MatMulInteger(x, w) * scale_x * scale_w, or * (scale_x * scale_w) of tensors
weights only         MatMul(x, DequantizeLinear(w))
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .convert import Converter, rule
from .decode import scale_names
from .graph import Value
from .integer_dot import dynamic, whole
from .quantized import Packed
from .side import Side, floating, keeps, left_tensor, packed_weight, plain, right_tensor


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
        found = _stored(cv, a, b) or dynamic(cv, a, b, dtype)
    if found is None and not floating(a.x) and dtype.kind == "i":
        found = whole(cv, a, b, dtype)
    if found is None:
        inputs = [left_tensor(cv, a, plain(cv, a, dtype)), right_tensor(cv, b, dtype)]
        found = cv.graph.emit("MatMul", inputs)
    rows = a.sizes(a.free) if keeps(a) else [math.prod(a.sizes(a.free))]
    held = [*a.sizes(a.batch), *rows, math.prod(b.sizes(b.free))]
    return found if held == shape else cv.reshaped(found, shape)


def _stored(cv: Converter, a: Side, b: Side) -> str | None:
    """A product that runtimes run on integers: the activation has one known scale."""
    qa, packed = a.quantized, packed_weight(cv, b)
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
    rows = a.sizes(a.free) if keeps(a) else [math.prod(a.sizes(a.free))]
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
