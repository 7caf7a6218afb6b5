# SPDX-License-Identifier: Apache-2.0
"""Rules of operations that move values."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..._errors import ArtifactError
from .convert import Converter, rule
from .graph import Value


def _sizes(aval: Any) -> tuple:
    return tuple(aval.shape)


@rule("reshape")
def _reshape(cv: Converter, eqn: Any, xs: list) -> Value:
    (x,) = xs
    shape = _sizes(eqn.outvars[0].aval)
    if eqn.params.get("dimensions") is not None:
        raise ArtifactError("it reorders dimensions.")
    kept = [d for d in x.shape if d is not _ONE and not _one(d)]
    if [d for d in shape if not _one(d)] == kept and isinstance(x, Value):
        return _ones_moved(cv, cv.written(x), shape)
    return cv.value(cv.reshaped(cv.tensor(x), shape), shape, x.dtype)


_ONE = 1


def _one(d: Any) -> bool:
    return isinstance(d, int) and d == 1


def _ones_moved(cv: Converter, x: Value, shape: tuple) -> Value:
    """x with axes of size 1 taken out and put in: what is broadcast stays so."""
    x = cv.in_order(x)
    helds = iter(h for h, d in zip(x.held, x.shape, strict=True) if not _one(d))
    held = tuple(1 if _one(d) else next(helds) for d in shape)
    name = cv.reshaped(x.name, held)
    return Value(name, shape, x.dtype, held, tuple(range(len(shape))))


@rule("squeeze", "expand_dims")
def _squeeze(cv: Converter, eqn: Any, xs: list) -> Value:
    return _ones_moved(cv, cv.written(xs[0]), _sizes(eqn.outvars[0].aval))


@rule("broadcast_in_dim")
def _broadcast(cv: Converter, eqn: Any, xs: list) -> Value:
    """A reshape to the rank; the rest waits."""
    x, shape = xs[0], _sizes(eqn.outvars[0].aval)
    dims = eqn.params["broadcast_dimensions"]
    if not isinstance(x, Value):
        held = [1] * len(shape)
        for d, n in zip(dims, x.shape, strict=True):
            held[d] = n
        name = cv.graph.constant(np.reshape(x, held))
        return Value(name, shape, x.dtype, tuple(held), tuple(range(len(shape))))
    x = cv.written(x)
    if x.shape == shape:
        return x
    held = [1] * len(shape)
    for d, n in zip(dims, x.held, strict=True):
        held[d] = n
    x = cv.in_order(x)
    name = x.name if tuple(held) == x.held else cv.reshaped(x.name, held)
    return Value(name, shape, x.dtype, tuple(held), tuple(range(len(shape))))


@rule("transpose")
def _transpose(cv: Converter, eqn: Any, xs: list) -> Value:
    order, x = eqn.params["permutation"], cv.written(xs[0])

    def moved(t: tuple) -> tuple:
        return tuple(t[a] for a in order)

    return Value(x.name, moved(x.shape), x.dtype, moved(x.held), moved(x.perm))


@rule("rev")
def _rev(cv: Converter, eqn: Any, xs: list) -> Value:
    axes = eqn.params["dimensions"]
    if not axes:
        return xs[0]
    n = len(axes)
    far = np.iinfo(np.int64).min
    inputs = [cv.tensor(xs[0]), *(cv.graph.ints(*v) for v in ([-1] * n, [far] * n, axes, [-1] * n))]
    return cv.emit(eqn, "Slice", inputs)


@rule("slice")
def _slice(cv: Converter, eqn: Any, xs: list) -> Value:
    p, x = eqn.params, xs[0]
    steps = p["strides"] or (1,) * len(p["start_indices"])
    cut = [
        a
        for a, (i, j, k) in enumerate(zip(p["start_indices"], p["limit_indices"], steps))
        if (k, i) != (1, 0) or j is not x.shape[a] and j != x.shape[a]
    ]
    if not cut:
        return x
    starts, ends = ([p[k][a] for a in cut] for k in ("start_indices", "limit_indices"))
    inputs = [cv.tensor(x), cv.sizes(starts), cv.sizes(ends), cv.graph.ints(*cut)]
    return cv.emit(eqn, "Slice", [*inputs, cv.graph.ints(*(steps[a] for a in cut))])


@rule("concatenate")
def _concatenate(cv: Converter, eqn: Any, xs: list) -> Value:
    return cv.emit(eqn, "Concat", [cv.tensor(x) for x in xs], axis=eqn.params["dimension"])


@rule("stack")
def _stack(cv: Converter, eqn: Any, xs: list) -> Value:
    axis = cv.graph.ints(eqn.params["axis"])
    parts = [cv.graph.emit("Unsqueeze", [cv.tensor(x), axis]) for x in xs]
    return cv.emit(eqn, "Concat", parts, axis=eqn.params["axis"])


@rule("unstack")
def _unstack(cv: Converter, eqn: Any, xs: list) -> list[Value]:
    axis, n = eqn.params["axis"], len(eqn.outvars)
    inputs = [cv.tensor(xs[0]), cv.graph.ints(*[1] * n)]
    names = cv.graph.emit("Split", inputs, outputs=n, axis=axis)
    names = [names] if isinstance(names, str) else names
    return cv.results(eqn, [cv.reshaped(name, v.aval.shape) for name, v in zip(names, eqn.outvars)])


@rule("tile")
def _tile(cv: Converter, eqn: Any, xs: list) -> Value:
    x, reps = xs[0], eqn.params["reps"]
    lead = (1,) * (len(reps) - len(x.shape))
    return cv.emit(eqn, "Tile", [cv.reshaped(cv.tensor(x), (*lead, *x.shape)), cv.sizes(reps)])


@rule("split")
def _split(cv: Converter, eqn: Any, xs: list) -> list[Value]:
    sizes, axis = eqn.params["sizes"], eqn.params["axis"]
    inputs = [cv.tensor(xs[0]), cv.graph.ints(*sizes)]
    names = cv.graph.emit("Split", inputs, outputs=len(sizes), axis=axis)
    return cv.results(eqn, names)


@rule("pad")
def _pad(cv: Converter, eqn: Any, xs: list) -> Value:
    """Zeros between values by a reshape, then padding; what is negative is cut off."""
    x, fill = xs
    return padded(cv, cv.plain(x), fill, eqn.params["padding_config"], _sizes(eqn.outvars[0].aval))


def padded(cv: Converter, x: Value, fill: Any, config: Any, shape: tuple) -> Value:
    """x with (before, after, between) values of `fill` along each axis."""
    name, fill, sizes = x.name, cv.tensor(fill), list(x.shape)
    for axis, (_, _, between) in enumerate(config):
        if not between or _one(sizes[axis]) or sizes[axis] == 0:
            continue
        n = sizes[axis]
        name = cv.reshaped(name, [*sizes[: axis + 1], 1, *sizes[axis + 1 :]])
        pads = [0] * (2 * len(sizes) + 2)
        pads[len(sizes) + 1 + axis + 1] = between
        name = cv.graph.emit("Pad", [name, cv.graph.ints(*pads), fill])
        sizes[axis] = n * (between + 1)
        name = cv.reshaped(name, sizes)
        sizes[axis] -= between
        ends = cv.graph.ints(sizes[axis])
        name = cv.graph.emit("Slice", [name, cv.graph.ints(0), ends, cv.graph.ints(axis)])
    pads = [p[0] for p in config] + [p[1] for p in config]
    if any(pads):
        name = cv.graph.emit("Pad", [name, cv.graph.ints(*pads), fill])
    return cv.value(name, shape, x.dtype)


@rule("iota")
def _iota(cv: Converter, eqn: Any, xs: list) -> Value:
    """Only with a symbolic size: others are known."""
    p = eqn.params
    shape, axis = _sizes(eqn.outvars[0].aval), p["dimension"]
    zero, one = (cv.graph.constant(np.asarray(i, np.int64)) for i in (0, 1))
    if isinstance(shape[axis], int):
        name = cv.graph.constant(np.arange(shape[axis]))
    else:
        name = cv.graph.emit("Range", [zero, cv.graph.emit("Squeeze", [cv.size(shape[axis])]), one])
    held = tuple(d if a == axis else 1 for a, d in enumerate(shape))
    name = cv.cast(cv.reshaped(name, held), p["dtype"])
    return Value(name, shape, np.dtype(p["dtype"]), held, tuple(range(len(shape))))


# What is known and only moves is a view.


@rule("broadcast_in_dim", constant=True)
def _known_broadcast(cv: Converter, eqn: Any, xs: list) -> np.ndarray:
    shape = _sizes(eqn.outvars[0].aval)
    held = [1] * len(shape)
    for d, n in zip(eqn.params["broadcast_dimensions"], xs[0].shape, strict=True):
        held[d] = n
    return np.broadcast_to(np.reshape(xs[0], held), shape)


@rule("reshape", "squeeze", "expand_dims", constant=True)
def _known_reshape(cv: Converter, eqn: Any, xs: list) -> np.ndarray:
    shape = _sizes(eqn.outvars[0].aval)
    wide = [n for n in xs[0].shape if n != 1]
    if wide == [n for n in shape if n != 1]:  # a view, broadcast or not
        x = xs[0][tuple(0 if n == 1 else slice(None) for n in xs[0].shape)]
        return np.asarray(x)[tuple(None if n == 1 else slice(None) for n in shape)]
    return np.reshape(xs[0], shape)


@rule("transpose", constant=True)
def _known_transpose(cv: Converter, eqn: Any, xs: list) -> np.ndarray:
    return np.transpose(xs[0], eqn.params["permutation"])


@rule("slice", constant=True)
def _known_slice(cv: Converter, eqn: Any, xs: list) -> np.ndarray:
    p = eqn.params
    steps = p["strides"] or (1,) * xs[0].ndim
    return xs[0][tuple(map(slice, p["start_indices"], p["limit_indices"], steps))]


@rule("convert_element_type", constant=True)
def _known_cast(cv: Converter, eqn: Any, xs: list) -> np.ndarray:
    new = np.dtype(eqn.params["new_dtype"])
    if xs[0].dtype == new:
        return xs[0]
    whole = xs[0].dtype.kind in "biu" and new.kind in "iuf"
    if whole or (xs[0].dtype.kind == "f" and new.kind == "f"):
        return _over_base(xs[0], lambda x: x.astype(new))
    import jax.numpy as jnp

    return np.asarray(jnp.asarray(xs[0]).astype(new))


def _over_base(x: np.ndarray, f: Any) -> np.ndarray:
    """f of every value, computed once for those that are broadcast."""
    from .convert import shrunk

    return np.broadcast_to(f(shrunk(x)), x.shape)
