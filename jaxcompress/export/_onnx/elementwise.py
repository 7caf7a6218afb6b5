# SPDX-License-Identifier: Apache-2.0
"""Rules of operations on each value by itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ..._errors import ArtifactError
from .convert import Converter, rule
from .graph import Value

_SAME = {
    "neg": "Neg", "abs": "Abs", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "sin": "Sin",
    "cos": "Cos", "tan": "Tan", "asin": "Asin", "acos": "Acos", "atan": "Atan", "sinh": "Sinh",
    "cosh": "Cosh", "asinh": "Asinh", "acosh": "Acosh", "atanh": "Atanh", "tanh": "Tanh",
    "logistic": "Sigmoid", "erf": "Erf", "floor": "Floor", "ceil": "Ceil", "sign": "Sign",
    "add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow",
    "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater",
    "ge": "GreaterOrEqual",
}  # fmt: skip
_LOGICAL = {"and": ("And", "BitwiseAnd"), "or": ("Or", "BitwiseOr"), "xor": ("Xor", "BitwiseXor"),
            "not": ("Not", "BitwiseNot")}  # fmt: skip
_IDENTITY = (
    "stop_gradient",
    "copy",
    "copy_p",
    "optimization_barrier",
    "pvary",
    "sharding_constraint",
    "reduce_precision",
)


@rule(*_SAME)
def _node(cv: Converter, eqn: Any, xs: list) -> Value:
    return _written(cv, eqn, xs, _SAME[eqn.primitive.name])


def _written(cv: Converter, eqn: Any, xs: list, op: str | Callable, **attrs: Any) -> Value:
    aval = eqn.outvars[0].aval
    return cv.elementwise(op, xs, aval.shape, aval.dtype, **attrs)


def _composed(*names: str) -> Callable:
    """Registers a rule whose function makes names of names: `(converter, dtype, *operands)`."""

    def register(function: Callable) -> Callable:
        @rule(*names)
        def composed(cv: Converter, eqn: Any, xs: list) -> Value:
            dtype = eqn.invars[0].aval.dtype
            return _written(cv, eqn, xs, lambda *inputs: function(cv, dtype, *inputs))

        return function

    return register


def _number(cv: Converter, dtype: Any, x: float) -> str:
    return cv.graph.constant(np.asarray(x, dtype))


@rule(*_LOGICAL)
def _logical(cv: Converter, eqn: Any, xs: list) -> Value:
    of_bools, of_bits = _LOGICAL[eqn.primitive.name]
    return _written(cv, eqn, xs, of_bools if eqn.outvars[0].aval.dtype == bool else of_bits)


@rule("max", "min")
def _extreme(cv: Converter, eqn: Any, xs: list) -> Value:
    """Relu or Clip where the other operand is one number, which runtimes fuse."""
    name = eqn.primitive.name
    for i, x in enumerate(xs):
        end = _scalar(x)
        if end is None or not jnp.issubdtype(x.dtype, jnp.floating):
            continue
        if name == "max" and end == 0:
            return _written(cv, eqn, [xs[1 - i]], "Relu")
        ends = [_number(cv, x.dtype, end)] if name == "max" else ["", _number(cv, x.dtype, end)]
        return _written(
            cv, eqn, [xs[1 - i]], lambda v, ends=ends: cv.graph.emit("Clip", [v, *ends])
        )
    return _written(cv, eqn, xs, name.capitalize())


@_composed("ne")
def _ne(cv: Converter, dtype: Any, a: str, b: str) -> str:
    return cv.graph.emit("Not", [cv.graph.emit("Equal", [a, b])])


@_composed("rem")
def _rem(cv: Converter, dtype: Any, a: str, b: str) -> str:
    return cv.graph.emit("Mod", [a, b], fmod=1)


@_composed("rsqrt")
def _rsqrt(cv: Converter, dtype: Any, x: str) -> str:
    return cv.graph.emit("Reciprocal", [cv.graph.emit("Sqrt", [x])])


@_composed("square")
def _square(cv: Converter, dtype: Any, x: str) -> str:
    return cv.graph.emit("Mul", [x, x])


@_composed("log2")
def _log2(cv: Converter, dtype: Any, x: str) -> str:
    return cv.graph.emit("Mul", [cv.graph.emit("Log", [x]), _number(cv, dtype, 1 / math.log(2))])


@_composed("exp2")
def _exp2(cv: Converter, dtype: Any, x: str) -> str:
    return cv.graph.emit("Pow", [_number(cv, dtype, 2), x])


@_composed("log1p")
def _log1p(cv: Converter, dtype: Any, x: str) -> str:
    """log(1 + x) = x log(u) / (u - 1), u = 1 + x, exact to rounding (Kahan); x where u = 1."""
    emit, one = cv.graph.emit, _number(cv, dtype, 1)
    u = emit("Add", [one, x])
    same = emit("Equal", [u, one])
    d = emit("Where", [same, one, emit("Sub", [u, one])])
    big = emit("IsInf", [u])
    ratio = emit("Div", [emit("Mul", [emit("Log", [u]), x]), d])
    return emit("Where", [same, x, emit("Where", [big, u, ratio])])


@_composed("expm1")
def _expm1(cv: Converter, dtype: Any, x: str) -> str:
    """exp(x) - 1 = tanh(x / 2) (exp(x) + 1), which does not cancel."""
    emit, one = cv.graph.emit, _number(cv, dtype, 1)
    half, e = emit("Mul", [x, _number(cv, dtype, 0.5)]), emit("Exp", [x])
    near = emit("Mul", [emit("Tanh", [half]), emit("Add", [e, one])])
    small = emit("Less", [emit("Abs", [x]), one])
    return emit("Where", [small, near, emit("Sub", [e, one])])


@_composed("cbrt")
def _cbrt(cv: Converter, dtype: Any, x: str) -> str:
    emit = cv.graph.emit
    root = emit("Pow", [emit("Abs", [x]), _number(cv, dtype, 1 / 3)])
    return emit("Mul", [emit("Sign", [x]), root])


@_composed("erfc")
def _erfc(cv: Converter, dtype: Any, x: str) -> str:
    return cv.graph.emit("Sub", [_number(cv, dtype, 1), cv.graph.emit("Erf", [x])])


@_composed("atan2")
def _atan2(cv: Converter, dtype: Any, y: str, x: str) -> str:
    """atan(y / x), a half turn further where x < 0; +-pi/2 where x = 0."""
    emit, zero = cv.graph.emit, _number(cv, dtype, 0)
    turn = _number(cv, dtype, math.pi)
    signed = emit("Where", [emit("Less", [y, zero]), emit("Neg", [turn]), turn])
    flat = emit("Equal", [x, zero])
    safe = emit("Where", [flat, _number(cv, dtype, 1), x])
    angle = emit("Atan", [emit("Div", [y, safe])])
    angle = emit("Where", [emit("Less", [x, zero]), emit("Add", [angle, signed]), angle])
    upright = emit("Mul", [emit("Sign", [y]), _number(cv, dtype, math.pi / 2)])
    return emit("Where", [flat, upright, angle])


@_composed("is_finite")
def _is_finite(cv: Converter, dtype: Any, x: str) -> str:
    emit = cv.graph.emit
    return emit("Not", [emit("Or", [emit("IsInf", [x]), emit("IsNaN", [x])])])


@rule("round")
def _round(cv: Converter, eqn: Any, xs: list) -> Value:
    """Half to even as ONNX does; half away from zero is sign(x) floor(|x| + 1/2)."""
    if eqn.params["rounding_method"] == lax.RoundingMethod.TO_NEAREST_EVEN:
        return _written(cv, eqn, xs, "Round")

    def away(x: str) -> str:
        emit = cv.graph.emit
        up = emit(
            "Floor", [emit("Add", [emit("Abs", [x]), _number(cv, eqn.invars[0].aval.dtype, 0.5)])]
        )
        return emit("Mul", [emit("Sign", [x]), up])

    return _written(cv, eqn, xs, away)


@rule("integer_pow")
def _integer_pow(cv: Converter, eqn: Any, xs: list) -> Value:
    y, emit = eqn.params["y"], cv.graph.emit

    def power(x: str) -> str:
        factors, n, square = [], abs(y), x
        while n:
            factors += [square] * (n & 1)
            n >>= 1
            square = emit("Mul", [square, square]) if n else square
        out = functools.reduce(lambda a, b: emit("Mul", [a, b]), factors)
        return emit("Reciprocal", [out]) if y < 0 else out

    if y == 0:
        aval = eqn.outvars[0].aval
        return _written(cv, eqn, [np.broadcast_to(np.ones((), aval.dtype), aval.shape)], "Identity")
    return _written(cv, eqn, xs, power)


@rule("convert_element_type")
def _convert(cv: Converter, eqn: Any, xs: list) -> Value:
    (x,), new = xs, np.dtype(eqn.params["new_dtype"])
    if x.dtype == new:
        return x
    out = _written(cv, eqn, xs, "Cast", to=cv.dtype(new))
    out.cast_of = x
    return out


@rule("select_n")
def _select(cv: Converter, eqn: Any, xs: list) -> Value:
    which, *cases = xs
    if which.dtype == bool:
        return _written(cv, eqn, [which, cases[1], cases[0]], "Where")

    def chosen(index: str, *names: str) -> str:
        out = names[-1]
        for i in range(len(names) - 2, -1, -1):
            same = cv.graph.emit("Equal", [index, _number(cv, which.dtype, i)])
            out = cv.graph.emit("Where", [same, names[i], out])
        return out

    return _written(cv, eqn, xs, chosen)


@rule("clamp")
def _clamp(cv: Converter, eqn: Any, xs: list) -> Value:
    low, x, high = xs
    ends = [_scalar(e) for e in (low, high)]
    if None not in ends:
        names = [cv.graph.constant(np.asarray(e, x.dtype)) for e in ends]
        return _written(cv, eqn, [x], lambda name: cv.graph.emit("Clip", [name, *names]))
    return _written(
        cv, eqn, [low, x, high],
        lambda a, v, b: cv.graph.emit("Min", [cv.graph.emit("Max", [v, a]), b]),
    )  # fmt: skip


def _scalar(x: Any) -> Any:
    """The one number of a known operand; None if there is none."""
    if isinstance(x, Value) or not x.size or (x != x.flat[0]).any():
        return None
    return x.flat[0]


@rule("shift_left", "shift_right_logical", "shift_right_arithmetic")
def _shift(cv: Converter, eqn: Any, xs: list) -> Value:
    """ONNX shifts unsigned integers; signed ones are divided, or shifted as unsigned bits."""
    name, dtype = eqn.primitive.name, np.dtype(eqn.outvars[0].aval.dtype)
    where = "LEFT" if name == "shift_left" else "RIGHT"
    if dtype.kind == "u":
        return _written(cv, eqn, xs, "BitShift", direction=where)
    if name == "shift_right_arithmetic":
        if (by := _scalar(xs[1])) is None:
            raise ArtifactError("ONNX shifts signed integers by known numbers only.")
        unit = _number(cv, dtype, 2 ** int(by))
        emit = cv.graph.emit

        def divided(x: str) -> str:
            return emit("Div", [emit("Sub", [x, emit("Mod", [x, unit])]), unit])

        return _written(cv, eqn, [xs[0]], divided)
    unsigned = np.dtype(f"u{dtype.name}")

    def shifted(*names: str) -> str:
        bits = [_bits(cv, n, unsigned) for n in names]
        return _bits(cv, cv.graph.emit("BitShift", bits, direction=where), dtype)

    return _written(cv, eqn, xs, shifted)


@rule("bitcast_convert_type")
def _bitcast(cv: Converter, eqn: Any, xs: list) -> Value:
    new = np.dtype(eqn.params["new_dtype"])
    if new.itemsize != np.dtype(xs[0].dtype).itemsize:
        raise ArtifactError("ONNX reads bits as another type of the same width only.")
    return _written(cv, eqn, xs, lambda x: _bits(cv, x, new))


def _bits(cv: Converter, name: str, dtype: np.dtype) -> str:
    """The same bits as another type."""
    if cv.opset < 26:
        raise ArtifactError(f"bits are read as {dtype} from opset 26 on. Pass opset=26.")
    return cv.graph.emit("BitCast", [name], to=cv.dtype(dtype))


@rule(*_IDENTITY)
def _identity(cv: Converter, eqn: Any, xs: list) -> Any:
    if eqn.primitive.name == "reduce_precision":
        info = jnp.finfo(eqn.outvars[0].aval.dtype)
        if (eqn.params["exponent_bits"], eqn.params["mantissa_bits"]) != (info.nexp, info.nmant):
            raise ArtifactError("it rounds to a float that ONNX has no operation for.")
    return xs if eqn.primitive.multiple_results else xs[0]
