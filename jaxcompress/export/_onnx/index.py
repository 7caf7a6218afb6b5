# SPDX-License-Identifier: Apache-2.0
"""Rules of reading and writing at computed places."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from ..._errors import ArtifactError
from .convert import Converter, rule
from .graph import Value
from .shape import padded
from .tables import rows


@rule("gather")
def _gather(cv: Converter, eqn: Any, xs: list) -> Value:
    """Rows of a table where that is what it is; else GatherND of the place of every value."""
    (x, index), p, aval = xs, eqn.params, eqn.outvars[0].aval
    numbers, sizes, mode = p["dimension_numbers"], p["slice_sizes"], str(p["mode"])
    simple = (
        len(numbers.start_index_map) == 1
        and numbers.collapsed_slice_dims == numbers.start_index_map
        and not numbers.operand_batching_dims
        and all(
            n == d or a in numbers.start_index_map for a, (n, d) in enumerate(zip(sizes, x.shape))
        )
    )
    if simple:
        return _rows(cv, x, index, numbers, mode, aval)
    if not isinstance(index, Value) and index.ndim == 1 and "PROMISE" in mode:
        return _one_slice(cv, eqn, x, index)
    table = cv.plain(x)
    columns, valid = _places(
        cv, index, numbers.start_index_map, sizes, x.shape, aval.shape, numbers.offset_dims,
        numbers.collapsed_slice_dims, numbers.operand_batching_dims,
        numbers.start_indices_batching_dims, mode,
    )  # fmt: skip
    out = cv.graph.emit("GatherND", [table.name, _joined(cv, columns)])
    if valid is not None:
        out = cv.graph.emit("Where", [valid, out, _fill(cv, p, aval.dtype)])
    return cv.value(out, aval.shape, aval.dtype)


def _one_slice(cv: Converter, eqn: Any, x: Any, index: np.ndarray) -> Value:
    """A gather at one known place, such as x[:, :n] of a symbolic n."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    starts = [0] * len(sizes)
    for axis, start in zip(numbers.start_index_map, index.tolist(), strict=True):
        starts[axis] = start
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    inputs = [cv.tensor(x), cv.graph.ints(*starts), cv.sizes(ends)]
    out = cv.graph.emit("Slice", [*inputs, cv.graph.ints(*range(len(sizes)))])
    aval = eqn.outvars[0].aval
    return cv.value(cv.reshaped(out, aval.shape), aval.shape, aval.dtype)


def _fill(cv: Converter, params: dict, dtype: Any) -> str:
    """What JAX puts where a place is outside: NaN, the lowest signed, the highest unsigned."""
    value = params.get("fill_value")
    if value is None:
        if jnp.issubdtype(dtype, jnp.floating):
            value = np.nan
        elif np.dtype(dtype) == bool:
            value = True
        else:
            value = np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else np.iinfo(dtype).min
    return cv.graph.constant(np.asarray(value, dtype))


def _rows(cv: Converter, x: Any, index: Any, numbers: Any, mode: str, aval: Any) -> Value:
    """Gather along one axis; of a quantized table its codes and scales."""
    (axis,) = numbers.start_index_map
    n, lead = x.shape[axis], len(index.shape) - 1
    name = cv.reshaped(cv.tensor(index), index.shape[:-1])
    name = cv.cast(name, np.int64) if index.dtype not in (np.int32, np.int64) else name
    wide = np.int64 if index.dtype not in (np.int32, np.int64) else np.dtype(index.dtype)
    valid = None
    known = not isinstance(index, Value) and (index >= 0).all() and (index < n).all()
    if not known and "PROMISE" not in mode:
        zero, last = (cv.graph.constant(np.asarray(i, wide)) for i in (0, n - 1))
        inside = cv.graph.emit("Min", [cv.graph.emit("Max", [name, zero]), last])
        if "FILL" in mode:
            valid = cv.graph.emit("Equal", [name, inside])
        name = inside
    with cv.at(x):
        out = rows(cv, x, axis, name, lead)
    if valid is not None:
        shape = [1] * axis + list(index.shape[:-1]) + [1] * (len(x.shape) - axis - 1)
        out = cv.graph.emit("Where", [cv.reshaped(valid, shape), out, _fill(cv, {}, aval.dtype)])
    # The tensor has axes [before the axis, of the index, after it].
    where = [*range(axis), *range(axis + lead, len(x.shape) - 1 + lead)]
    perm, batch = [0] * len(aval.shape), iter(range(axis, axis + lead))
    offsets = iter(where)
    for a in range(len(aval.shape)):
        perm[a] = next(offsets) if a in numbers.offset_dims else next(batch)
    return cv.value(out, aval.shape, aval.dtype, perm)


def _places(
    cv,
    index,
    index_map,
    sizes,
    operand,
    shape,
    offset_dims,
    collapsed,
    batching,
    index_batching,
    mode,
):
    """(int64 [*shape, rank]: the place in the operand of every value, bool or None: inside)."""
    if any(not isinstance(d, int) for d in (*operand, *shape, *index.shape)):
        raise ArtifactError("places are written for fixed sizes only.")
    rank, lead = len(shape), [a for a in range(len(shape)) if a not in offset_dims]
    window = [a for a in range(len(operand)) if a not in (*collapsed, *batching)]
    columns, valid = [], None
    starts = cv.cast(cv.tensor(index), np.int64)
    index_axes = list(range(len(index.shape) - 1))
    for d in range(len(operand)):
        parts = []
        if d in index_map:
            one = cv.graph.constant(np.int64(index_map.index(d)))
            column = cv.graph.emit("Gather", [starts, one], axis=len(index.shape) - 1)
            held = [1] * rank
            for a, i in zip(lead, index_axes, strict=True):
                held[a] = index.shape[i]
            column = cv.reshaped(column, held)
            top = operand[d] - sizes[d]
            if "PROMISE" not in mode:
                zero, last = cv.graph.constant(np.int64(0)), cv.graph.constant(np.int64(top))
                inside = cv.graph.emit("Min", [cv.graph.emit("Max", [column, zero]), last])
                if "FILL" in mode:
                    good = cv.graph.emit("Equal", [inside, column])
                    valid = good if valid is None else cv.graph.emit("And", [valid, good])
                column = inside
            parts.append(column)
        if d in window and sizes[d] > 1:
            held = [1] * rank
            held[offset_dims[window.index(d)]] = sizes[d]
            parts.append(cv.graph.constant(np.arange(sizes[d]).reshape(held)))
        if d in batching:
            held = [1] * rank
            held[lead[index_batching[batching.index(d)]]] = operand[d]
            parts.append(cv.graph.constant(np.arange(operand[d]).reshape(held)))
        if not parts:
            parts.append(cv.graph.constant(np.zeros([1] * rank, np.int64)))
        column = parts[0]
        for part in parts[1:]:
            column = cv.graph.emit("Add", [column, part])
        columns.append(cv.graph.emit("Expand", [column, cv.sizes(shape)]))
    valid = None if valid is None else cv.graph.emit("Expand", [valid, cv.sizes(shape)])
    return columns, valid


def _joined(cv: Converter, columns: list[str]) -> str:
    """int64 [*shape, rank] of the columns."""
    axis = cv.graph.ints(-1)
    parts = [cv.graph.emit("Unsqueeze", [column, axis]) for column in columns]
    return parts[0] if len(parts) == 1 else cv.graph.emit("Concat", parts, axis=-1)


_REDUCTION = {"scatter": "none", "scatter-sub": "add"} | {
    f"scatter{mark}{name}": name for name in ("add", "mul", "max", "min") for mark in "-_"
}


@rule(*_REDUCTION)
def _scatter(cv: Converter, eqn: Any, xs: list) -> Value:
    """ScatterND; what lies outside changes nothing."""
    (x, index, updates), p = xs, eqn.params
    numbers, reduction = p["dimension_numbers"], _REDUCTION[eqn.primitive.name]
    window = [
        a
        for a in range(len(x.shape))
        if a not in (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    ]
    sizes = [1] * len(x.shape)
    for a, u in zip(window, numbers.update_window_dims, strict=True):
        sizes[a] = updates.shape[u]
    columns, valid = _places(
        cv, index, numbers.scatter_dims_to_operand_dims, sizes, x.shape, updates.shape,
        numbers.update_window_dims, numbers.inserted_window_dims, numbers.operand_batching_dims,
        numbers.scatter_indices_batching_dims, str(p["mode"]),
    )  # fmt: skip
    table = cv.plain(x)
    new = cv.tensor(updates)
    if eqn.primitive.name == "scatter-sub":
        new = cv.graph.emit("Neg", [new])
    if valid is None:
        inputs = [table.name, _joined(cv, columns), new]
        return cv.emit(eqn, "ScatterND", inputs, reduction=reduction)
    # What is outside goes to one row more, which is cut off.
    axis = numbers.scatter_dims_to_operand_dims[0]
    n = cv.graph.constant(np.int64(x.shape[axis]))
    columns[axis] = cv.graph.emit("Where", [valid, columns[axis], n])
    config = [(0, int(a == axis), 0) for a in range(len(x.shape))]
    shape = tuple(d + (a == axis) for a, d in enumerate(x.shape))
    wide = padded(cv, table, np.zeros((), x.dtype), config, shape)
    inputs = [wide.name, _joined(cv, columns), new]
    out = cv.graph.emit("ScatterND", inputs, reduction=reduction)
    ends = (cv.graph.ints(i) for i in (0, x.shape[axis], axis))
    return cv.emit(eqn, "Slice", [out, *ends])


def _starts(cv: Converter, starts: list, tops: list) -> str:
    """int64 vector of where a slice begins, moved so that it fits."""
    parts = []
    for x, top in zip(starts, tops, strict=True):
        name = cv.reshaped(cv.cast(cv.tensor(x), np.int64), [1])
        ends = cv.graph.ints(0), cv.sizes([top])
        parts.append(cv.graph.emit("Min", [cv.graph.emit("Max", [name, ends[0]]), ends[1]]))
    return parts[0] if len(parts) == 1 else cv.graph.emit("Concat", parts, axis=0)


@rule("dynamic_slice")
def _dynamic_slice(cv: Converter, eqn: Any, xs: list) -> Value:
    x, *starts = xs
    sizes = eqn.params["slice_sizes"]
    cut = [a for a in range(len(sizes)) if sizes[a] != x.shape[a]]
    if not cut:
        return x
    q = x.quantized if isinstance(x, Value) else None
    if len(cut) == 1 and sizes[cut[0]] == 1 and q is not None and q.constant:
        index = _starts(cv, [starts[cut[0]]], [x.shape[cut[0]] - 1])
        aval = eqn.outvars[0].aval
        return cv.value(rows(cv, x, cut[0], index, 1), aval.shape, aval.dtype)
    begin = _starts(cv, [starts[a] for a in cut], [x.shape[a] - sizes[a] for a in cut])
    end = cv.graph.emit("Add", [begin, cv.sizes([sizes[a] for a in cut])])
    return cv.emit(eqn, "Slice", [cv.tensor(x), begin, end, cv.graph.ints(*cut)])


@rule("dynamic_update_slice")
def _update(cv: Converter, eqn: Any, xs: list) -> Value:
    x, new, *starts = xs
    if x.shape == new.shape:
        return new
    cut = [a for a in range(len(x.shape)) if x.shape[a] != new.shape[a]]
    begin = _starts(cv, [starts[a] for a in cut], [x.shape[a] - new.shape[a] for a in cut])
    grid = np.stack(np.meshgrid(*map(np.arange, new.shape), indexing="ij"), axis=-1)
    whole = np.zeros((len(cut), len(x.shape)), np.int64)
    whole[range(len(cut)), cut] = 1  # from the axes that are cut to all
    offset = cv.graph.emit("MatMul", [begin, cv.graph.constant(whole)])
    places = cv.graph.emit("Add", [cv.graph.constant(grid.astype(np.int64)), offset])
    return cv.emit(eqn, "ScatterND", [cv.tensor(x), places, cv.tensor(new)])
