# SPDX-License-Identifier: Apache-2.0
"""Rules of reductions, windows, cumulative operations and sorting."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..._errors import ArtifactError
from .control import subgraph
from .convert import Converter, rule
from .graph import Graph, Value

_REDUCE = {
    "reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin",
    "reduce_prod": "ReduceProd", "reduce_and": "ReduceMin", "reduce_or": "ReduceMax",
}  # fmt: skip


@rule(*_REDUCE)
def _reduce(cv: Converter, eqn: Any, xs: list) -> Value:
    name = eqn.primitive.name
    x, axes = cv.written(xs[0]), tuple(eqn.params["axes"])
    if not axes:
        return x
    if any(x.held[a] != x.shape[a] for a in axes):
        x = cv.expanded(x)
    boolean = x.dtype == bool
    tensor = cv.cast(x.name, np.int32) if boolean else x.name
    inputs = [tensor, cv.graph.ints(*sorted(x.perm[a] for a in axes))]
    out = cv.graph.emit(_REDUCE[name], inputs, keepdims=0)
    out = cv.cast(out, bool) if boolean else out
    kept = [a for a in range(len(x.shape)) if a not in axes]
    lying = sorted(x.perm[a] for a in kept)
    shape, held = (tuple(t[a] for a in kept) for t in (x.shape, x.held))
    perm = tuple(lying.index(x.perm[a]) for a in kept)
    return Value(out, shape, eqn.outvars[0].aval.dtype, held, perm)


@rule("argmax", "argmin")
def _arg(cv: Converter, eqn: Any, xs: list) -> Value:
    (axis,) = eqn.params["axes"]
    x = cv.tensor(xs[0])
    x = cv.cast(x, np.int32) if xs[0].dtype == bool else x
    op = "ArgMax" if eqn.primitive.name == "argmax" else "ArgMin"
    out = cv.graph.emit(op, [x], axis=axis, keepdims=0)
    aval = eqn.outvars[0].aval
    return cv.value(cv.cast(out, aval.dtype), aval.shape, aval.dtype)


@rule("cumsum")
def _cumsum(cv: Converter, eqn: Any, xs: list) -> Value:
    axis = cv.graph.constant(np.asarray(eqn.params["axis"], np.int64))
    return cv.emit(eqn, "CumSum", [cv.tensor(xs[0]), axis], reverse=int(eqn.params["reverse"]))


_RUNNING = {"cumprod": "Mul", "cummax": "Max", "cummin": "Min"}


@rule(*_RUNNING)
def _running(cv: Converter, eqn: Any, xs: list) -> Value:
    """A Scan over slices: its state is the result so far."""
    p, aval = eqn.params, eqn.outvars[0].aval
    if not aval.size:
        raise ArtifactError("it has no values.")
    axis, back = p["axis"], int(p["reverse"])
    x, rest = cv.tensor(xs[0]), [d for a, d in enumerate(aval.shape) if a != axis]
    inside = cv.within(body := Graph(cv.opset, cv.graph))
    state, here = body.fresh("state"), body.fresh("slice")
    new = body.emit(_RUNNING[eqn.primitive.name], [state, here])
    kind = cv.dtype(aval.dtype)
    block = subgraph(
        inside,
        "running",
        [state, here],
        [new, body.emit("Identity", [new])],
        [kind] * 4,
        [rest] * 4,
    )
    start = {"Mul": 1, "Max": _lowest(aval.dtype), "Min": _highest(aval.dtype)}[
        _RUNNING[eqn.primitive.name]
    ]
    first = cv.graph.emit(
        "Expand", [cv.graph.constant(np.asarray(start, aval.dtype)), cv.sizes(rest)]
    )
    names = cv.graph.emit(
        "Scan", [first, x], outputs=2, body=block, num_scan_inputs=1,
        scan_input_axes=[axis], scan_output_axes=[axis],
        scan_input_directions=[back], scan_output_directions=[back],
    )  # fmt: skip
    return cv.value(names[1], aval.shape, aval.dtype)


def _lowest(dtype: Any) -> Any:
    return -np.inf if jnp.issubdtype(dtype, jnp.floating) else np.iinfo(dtype).min


def _highest(dtype: Any) -> Any:
    return np.inf if jnp.issubdtype(dtype, jnp.floating) else np.iinfo(dtype).max


@rule("sort")
def _sort(cv: Converter, eqn: Any, xs: list) -> list[Value]:
    """TopK of all values gives equal ones in the order in which they came."""
    p = eqn.params
    if p["num_keys"] != 1:
        raise ArtifactError("ONNX sorts by one key.")
    axis = p["dimension"]
    key = cv.tensor(xs[0])
    small = xs[0].dtype not in (np.float32, np.float64, np.int32, np.int64)
    key = cv.cast(key, np.float32 if xs[0].dtype.kind == "f" else np.int32) if small else key
    inputs = [key, cv.sizes([xs[0].shape[axis]])]
    values, index = cv.graph.emit("TopK", inputs, outputs=2, axis=axis, largest=0, sorted=1)
    out = []
    for i, (x, v) in enumerate(zip(xs, eqn.outvars, strict=True)):
        name = (
            values if not i else cv.graph.emit("GatherElements", [cv.tensor(x), index], axis=axis)
        )
        name = cv.cast(name, v.aval.dtype) if not i and small else name
        out.append(cv.value(name, v.aval.shape, v.aval.dtype))
    return out


@rule("top_k", "approx_top_k")
def _top_k(cv: Converter, eqn: Any, xs: list) -> list[Value]:
    """The exact ones, also where JAX would take others for speed."""
    p, x = eqn.params, xs[0]
    axis = p.get("reduction_dimension", p.get("axis", len(x.shape) - 1))
    largest = int(p.get("is_max_k", True))
    inputs = [cv.tensor(x), cv.graph.ints(p["k"])]
    names = cv.graph.emit("TopK", inputs, outputs=2, axis=axis, largest=largest)
    avals = [v.aval for v in eqn.outvars]
    index = cv.cast(names[1], avals[1].dtype)
    return [cv.value(n, a.shape, a.dtype) for n, a in zip((names[0], index), avals, strict=True)]


@rule("reduce_window_max", "reduce_window_min", "reduce_window_sum")
def _window(cv: Converter, eqn: Any, xs: list) -> Value:
    """Pooling over up to three axes; a sum is an average, padding counted, times its size."""
    p, x = eqn.params, cv.written(xs[0])
    sizes, rank = tuple(p["window_dimensions"]), len(x.shape)
    if any(d != 1 for d in p["base_dilation"]):
        raise ArtifactError("ONNX does not pool over dilated inputs.")
    windows = [a for a in range(rank) if sizes[a] != 1 or p["window_strides"][a] != 1]
    others = [a for a in range(rank) if a not in windows]
    if not windows:
        return x
    if len(windows) > 3:
        raise ArtifactError(f"ONNX pools over up to three axes, not {len(windows)}.")
    if any(p["padding"][a] != (0, 0) for a in others):
        raise ArtifactError("it pads an axis over which it does not pool.")
    spatial: dict[str, Any] = {
        "kernel_shape": [sizes[a] for a in windows],
        "strides": [p["window_strides"][a] for a in windows],
        "pads": [p["padding"][a][side] for side in (0, 1) for a in windows],
    }
    dilations = [p["window_dilation"][a] for a in windows]
    if any(d != 1 for d in dilations):
        if eqn.primitive.name == "reduce_window_sum" and cv.opset < 19:
            raise ArtifactError("averages over dilated windows are in ONNX from opset 19 on.")
        spatial["dilations"] = dilations
    order, aval = [*others, *windows], eqn.outvars[0].aval
    name = cv.tensor(x, order)
    wide = aval.dtype in (np.float32, np.float64)
    name = name if wide else cv.cast(name, np.float32)
    lead, tail = [x.shape[a] for a in others], [x.shape[a] for a in windows]
    if len(others) != 2:
        name = cv.reshaped(
            name,
            [1, *([-1] if any(not isinstance(d, int) for d in lead) else [math.prod(lead)]), *tail],
        )
    op, kind = eqn.primitive.name, None
    if op == "reduce_window_sum":
        kind = np.float32 if not wide else aval.dtype
        name = cv.graph.emit("AveragePool", [name], count_include_pad=1, **spatial)
        count = math.prod(spatial["kernel_shape"])
        name = cv.graph.emit("Mul", [name, cv.graph.constant(np.asarray(count, kind))])
        if aval.dtype.kind in "iu":
            name = cv.graph.emit("Round", [name])
    else:
        flip = op == "reduce_window_min"
        name = cv.graph.emit("Neg", [name]) if flip else name
        name = cv.graph.emit("MaxPool", [name], **spatial)
        name = cv.graph.emit("Neg", [name]) if flip else name
    out = [aval.shape[a] for a in order]
    name = cv.reshaped(name, out) if len(others) != 2 else name
    name = name if wide else cv.cast(name, aval.dtype)
    return cv.value(name, aval.shape, aval.dtype, [order.index(a) for a in range(rank)])
