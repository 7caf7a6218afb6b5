# SPDX-License-Identifier: Apache-2.0
"""`Converter`: walks a jaxpr and writes a graph, one rule per primitive.

What depends on no input is computed here, with JAX itself, and becomes an initializer. A rule is a
function `(converter, equation, operands)` that returns values, one per result; operands are arrays
where they are known and `Value`s elsewhere. Rules are registered by `@rule("name", ...)`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from ..._core import _compat
from ..._errors import ArtifactError
from .graph import SITE, Graph, Value, check_dtype
from .quantized import Packed, Quantized, pack

Rule = Callable[["Converter", Any, list], Any]
RULES: dict[str, Rule] = {}
CONSTANT: dict[str, Rule] = {}  # what NumPy does to known operands without copying them

_CALLBACKS = "pure_callback io_callback debug_callback debug_print python_callback".split()
_RANDOM = (
    "random_bits random_seed random_wrap random_unwrap random_split random_fold_in threefry2x32 "
    "rng_bit_generator rng_uniform"
).split()
_REFUSED = {
    **dict.fromkeys(_CALLBACKS, "it calls back into Python"),
    **dict.fromkeys(_RANDOM, "it draws random numbers: pass them as inputs, or leave them out"),
}


def rule(*names: str, constant: bool = False) -> Callable[[Rule], Rule]:
    """Registers a rule for primitives; with `constant=True` one for known operands."""

    def register(function: Rule) -> Rule:
        table = CONSTANT if constant else RULES
        for name in names:
            assert name not in table, name
            table[name] = function
        return function

    return register


class Converter:
    """Writes the equations of a jaxpr into a graph.

    Attributes:
      graph: that is written to.
      symbols: by name of a symbolic size, (input, axis) that has it.
      target: as `export.onnx` takes it.
    """

    def __init__(self, graph: Graph, symbols: dict[str, tuple[str, int]], target: str):
        self.graph, self.symbols, self.target = graph, symbols, target

    @property
    def opset(self) -> int:
        return self.graph.opset

    @contextlib.contextmanager
    def at(self, *operands: Any) -> Iterator[None]:
        """Names what is written after the site that reads these operands, if they are of one."""
        found = [x.quantized.site for x in operands if isinstance(x, Value) and x.quantized]
        before, self.graph.scope = self.graph.scope, f"{found[-1]}{SITE}" if found else ""
        try:
            yield
        finally:
            self.graph.scope = before

    def within(self, graph: Graph) -> Converter:
        """A converter that writes into a subgraph."""
        return Converter(graph, self.symbols, self.target)

    def run(self, jaxpr: Any, consts: Sequence, operands: Sequence) -> list:
        """The results of a jaxpr."""
        env: dict[Any, Any] = {}

        def read(v: Any) -> Any:
            if isinstance(v, jex.Literal):
                return np.asarray(v.val, v.aval.dtype)  # type: ignore[attr-defined]
            return env[v]

        env.update(zip(jaxpr.constvars, map(_known, consts), strict=True))
        env.update(zip(jaxpr.invars, map(_known, operands), strict=True))
        for eqn in jaxpr.eqns:
            found = self.equation(eqn, [read(v) for v in eqn.invars])
            env.update(zip(eqn.outvars, found, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: Any, operands: list) -> list:
        """The results of one equation.

        Raises:
          ArtifactError: ONNX cannot say it, or no rule does; with the line of the user's code.
        """
        name = eqn.primitive.name
        known = not any(isinstance(x, Value) for x in operands) and _fixed(eqn)
        try:
            if name in _REFUSED:
                raise ArtifactError(_REFUSED[name] + ".")
            if known and name in CONSTANT:
                found = CONSTANT[name](self, eqn, operands)
            elif known and not eqn.effects:
                found = _computed(eqn, operands)
            elif name in RULES:
                found = RULES[name](self, eqn, operands)
            else:
                raise ArtifactError(
                    "there is no rule for it; jaxcompress.export.onnx_primitives() lists those "
                    "that there are. Rewrite it with them."
                )
        except _Located:
            raise
        except ArtifactError as error:
            raise _Located(
                f"`{name}` at {_compat.source_line(eqn)} cannot be written as ONNX: {error}"
            ) from None
        return list(found) if eqn.primitive.multiple_results else [found]

    # --- values as tensors

    def tensor(self, x: Any, order: Sequence[int] | None = None) -> str:
        """The name of a tensor that is x as JAX has it, transposed by `order`."""
        if not isinstance(x, Value):
            x = np.asarray(x) if order is None else np.transpose(x, order)
            return self.graph.constant(x)
        x = self.written(x)
        if x.held != x.shape:
            x = self.expanded(x)
        perm = x.perm if order is None else tuple(x.perm[a] for a in order)
        if perm == tuple(range(len(perm))):
            return x.name
        return self.graph.emit("Transpose", [x.name], perm=perm)

    def in_order(self, x: Value) -> Value:
        """x with a tensor whose axes are in the order of x; what is to be broadcast waits."""
        if not x.moved:
            return x
        name = self.graph.emit("Transpose", [x.name], perm=x.perm)
        return Value(name, x.shape, x.dtype, x.held, tuple(range(len(x.perm))))

    def results(self, eqn: Any, names: Any) -> list[Value]:
        """The results of an equation, of the tensors with these names (or this one)."""
        names = [names] if isinstance(names, str) else names
        avals = [v.aval for v in eqn.outvars]
        return [self.value(n, a.shape, a.dtype) for n, a in zip(names, avals, strict=True)]

    def expanded(self, x: Value) -> Value:
        """x with a tensor of all its values."""
        inverse = np.argsort(x.perm)
        goal = [1 if x.shape[a] == x.held[a] else x.shape[a] for a in inverse]
        name = self.graph.emit("Expand", [x.name, self.sizes(goal)])
        return Value(name, x.shape, x.dtype, x.shape, x.perm)

    def written(self, x: Value) -> Value:
        """x with a tensor: what is decoded from numbers is decoded now."""
        if x.name:
            return x
        from .decode import decoded  # it builds on this module

        return decoded(self, x)

    def pack(self, q: Quantized, order: tuple[int, ...], shape: tuple[int, ...]) -> Packed | None:
        """A known operand as DequantizeLinear takes it; None where ONNX has no such scales."""
        unread = q.dtype.startswith(("float4", "float6"))  # onnxruntime reads none of it
        return pack(q, order, shape, self.opset, self.target == "portable" or unread)

    def decoded(self, packed: Packed, site: str, kernel: bool) -> str:
        """The name of a decoded weight.

        onnxruntime decodes at every call what no kernel takes: there it is written by other nodes.
        """
        if self.target == "onnxruntime" and not kernel:
            found = packed.multiplied(self.graph, site)
            if found is not None:
                return found
        return packed.decode(self.graph, site)

    def plain(self, x: Any) -> Value:
        """x as a value whose tensor is as JAX has it."""
        if isinstance(x, Value) and x.name and not x.moved and x.held == x.shape:
            return x
        return self.value(
            self.tensor(x), np.shape(x) if not isinstance(x, Value) else x.shape, x.dtype
        )

    def value(
        self, name: str, shape: Sequence, dtype: Any, perm: Sequence[int] | None = None
    ) -> Value:
        """A value of a tensor that has all its sizes."""
        shape = tuple(shape)
        order = tuple(range(len(shape))) if perm is None else tuple(perm)
        return Value(name, shape, np.dtype(dtype), shape, order)

    def emit(self, eqn: Any, op: str, inputs: Sequence[str], **attrs: Any) -> Value:
        """Writes a node that has the one result of an equation."""
        aval = eqn.outvars[0].aval
        return self.value(self.graph.emit(op, inputs, **attrs), aval.shape, aval.dtype)

    def elementwise(
        self, op: str | Callable, operands: Sequence, shape: Sequence, dtype: Any, **attrs
    ) -> Value:
        """An operation on values of one shape, or scalars, in the order in which they lie.

        `op` is a node, or a function from names of operands to the name of the result.
        """
        operands = [self.written(x) if isinstance(x, Value) else np.asarray(x) for x in operands]
        shape = tuple(shape)
        full = [
            x for x in operands if isinstance(x, Value) and len(x.shape) == len(shape) and x.shape
        ]
        perm = full[0].perm if full else tuple(range(len(shape)))
        order = [int(a) for a in np.argsort(perm)]
        names, helds = [], []
        for x in operands:
            if not isinstance(x, Value):
                x = shrunk(x)
                if x.ndim:
                    helds.append(x.shape)
                    x = np.transpose(x, order)
                names.append(self.graph.constant(x))
                continue
            if len(x.shape):
                helds.append(x.held)
            if x.perm == perm or not x.shape:
                names.append(x.name)
            else:
                names.append(
                    self.graph.emit("Transpose", [x.name], perm=[x.perm[a] for a in order])
                )
        held = (
            tuple(next((h[a] for h in helds if not _is_one(h[a])), 1) for a in range(len(shape)))
            if helds
            else (1,) * len(shape)
        )
        out = op(*names) if callable(op) else self.graph.emit(op, names, **attrs)
        if not helds and shape:  # scalars only
            out = self.graph.emit("Reshape", [out, self.graph.ints(*held)])
        return Value(out, shape, np.dtype(dtype), held, perm)

    # --- sizes

    def sizes(self, shape: Sequence) -> str:
        """The name of an int64 vector with these sizes."""
        if all(isinstance(d, int) for d in shape):
            return self.graph.ints(*shape)
        parts = [self.graph.ints(d) if isinstance(d, int) else self.size(d) for d in shape]
        return self.graph.emit("Concat", parts, axis=0)

    def size(self, dim: Any) -> str:
        """The name of an int64[1] with a symbolic size."""
        found = re.fullmatch(r"(?:(\d+)\*)?([A-Za-z_]\w*)", str(dim))
        if found is None or found[2] not in self.symbols:
            raise ArtifactError(f"ONNX takes the size {dim} from no input.")
        name, axis = self.symbols[found[2]]
        out = self.graph.emit("Shape", [name], start=axis, end=axis + 1)
        return (
            out
            if found[1] is None
            else self.graph.emit("Mul", [out, self.graph.ints(int(found[1]))])
        )

    def reshaped(self, name: str, shape: Sequence) -> str:
        """The name of a tensor with other sizes."""
        symbolic = [d for d in shape if not isinstance(d, int)]
        if len(symbolic) == 1 and all(d != 0 for d in shape if isinstance(d, int)):
            goal = self.graph.ints(*(d if isinstance(d, int) else -1 for d in shape))
        else:
            goal = self.sizes(shape)
        return self.graph.emit("Reshape", [name, goal])

    def dtype(self, dtype: Any) -> int:
        """The number that ONNX has for a dtype."""
        return check_dtype(dtype, self.opset)

    def cast(self, name: str, dtype: Any) -> str:
        return self.graph.emit("Cast", [name], to=self.dtype(dtype))


class _Located(ArtifactError):
    """An error that names the equation already."""


def shrunk(x: np.ndarray) -> np.ndarray:
    """A view with size 1 along the axes on which an array is broadcast."""
    index = tuple(
        slice(0, 1) if step == 0 and n > 1 else slice(None)
        for n, step in zip(x.shape, x.strides, strict=True)
    )
    return x[index]


def _is_one(d: Any) -> bool:
    return isinstance(d, int) and d == 1


def _known(x: Any) -> Any:
    return x if isinstance(x, Value) else np.asarray(x)


def _fixed(eqn: Any) -> bool:
    """Whether no size of a result is symbolic."""
    return all(isinstance(d, int) for v in eqn.outvars for d in getattr(v.aval, "shape", ()))


def _computed(eqn: Any, operands: list) -> Any:
    """The results of an equation on known operands, computed by JAX."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        found = [np.asarray(x) for x in _compat.bind(eqn, operands)]
    return found if eqn.primitive.multiple_results else found[0]
