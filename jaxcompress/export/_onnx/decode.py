# SPDX-License-Identifier: Apache-2.0
"""Rules of the two primitives of sites: what was decoded stays apart until somebody needs it."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..._errors import ArtifactError
from . import fpga
from .convert import Converter, rule, shrunk
from .graph import Value
from .quantized import Quantized


def _quantized(eqn: Any, numbers: Any, scale: Any, zero: Any) -> Quantized:
    p = eqn.params
    zero = None if not isinstance(zero, Value) and not shrunk(zero).any() else zero
    return Quantized(
        numbers, scale, zero, p["low"], p["high"], p["integers"], p["dtype"], p["powers"], p["site"]
    )


def _hidden(eqn: Any, q: Quantized) -> Value:
    """A value that is written when it is needed."""
    aval = eqn.outvars[0].aval
    shape = tuple(aval.shape)
    return Value("", shape, np.dtype(aval.dtype), shape, tuple(range(len(shape))), q)


def _decode(cv: Converter, eqn: Any, xs: list) -> Value:
    q = _quantized(eqn, *xs)
    return _hidden(eqn, q)


rule("jc_decode")(_decode)
rule("jc_decode", constant=True)(_decode)


@rule("jc_dynamic")
def _dynamic(cv: Converter, eqn: Any, xs: list) -> Value:
    x, scale, _ = xs
    q = _quantized(eqn, None, scale, np.zeros((), np.float32))
    q.raw = x
    return _hidden(eqn, q)


@rule("jc_measured")
def _measured(cv: Converter, eqn: Any, xs: list) -> Value:
    x, scale, zero = xs
    q = _quantized(eqn, None, scale, zero)

    def encode(name: str) -> str:
        code, *q.measured = cv.graph.emit("DynamicQuantizeLinear", [name], 3)
        return code

    q.stored = cv.elementwise(encode, [x], eqn.outvars[0].aval.shape, np.uint8)
    return _hidden(eqn, q)


def numbers_of(cv: Converter, q: Quantized) -> Any:
    """The numbers of an operand, rounded now if they were not."""
    if q.numbers is not None:
        return q.numbers
    x, ends = q.raw, [cv.graph.constant(np.float32(e)) for e in (q.low, q.high)]
    assert x is not None

    def rounded(name: str, scale: str) -> str:
        out = cv.graph.emit("Round", [cv.graph.emit("Div", [name, scale])])
        return cv.graph.emit("Clip", [out, *ends])

    return cv.elementwise(rounded, [x, q.scale], x.shape, np.float32)


@rule("jc_static")
def _static(cv: Converter, eqn: Any, xs: list) -> Value:
    """QuantizeLinear to uint8 (int8 for TensorRT), and what the format leaves out clipped."""
    x, scale, zero = xs
    q = _quantized(eqn, None, scale, zero)
    if cv.target == "qonnx":
        return fpga.activation(cv, q, x, eqn.outvars[0].aval.shape)
    one = [None if isinstance(v, Value) else shrunk(v) for v in (scale, zero)]
    if any(v is None or v.size != 1 for v in one) or not q.integers:
        raise ArtifactError("a stored range of an activation has to be one of the whole tensor.")
    if q.dtype == "binary":

        def sign(name: str) -> str:
            ends = (cv.graph.constant(np.float32(v)) for v in (0, 1, -1))
            zero, up, down = ends
            inside = cv.graph.emit("GreaterOrEqual", [name, zero])
            return cv.graph.emit("Where", [inside, up, down])

        q.numbers = cv.elementwise(sign, [x], eqn.outvars[0].aval.shape, np.float32)
        return _hidden(eqn, q)
    s, z = (np.asarray(v.reshape(())) for v in one)  # type: ignore[union-attr]
    signed = cv.target == "tensorrt"
    if signed and z != 0:
        raise ArtifactError(
            f"`{q.site}` has the zero point {z:g}, and TensorRT takes none. Use symmetric ranges."
        )
    q.shift = 0 if signed or q.low >= 0 else 128
    dtype, (lowest, highest) = (np.int8, (-128, 127)) if signed else (np.uint8, (0, 255))
    names = [
        cv.graph.constant(s.astype(np.float32)),
        cv.graph.constant(np.asarray(z + q.shift, dtype)),
    ]
    low, high = int(q.low) + q.shift, int(q.high) + q.shift

    def encode(name: str) -> str:
        out = cv.graph.emit("QuantizeLinear", [name, *names])
        if cv.target == "tensorrt" or (low <= lowest and high >= highest):
            return out
        ends = [cv.graph.constant(np.asarray(e, dtype)) for e in (low, high)]
        return cv.graph.emit("Clip", [out, *ends])

    aval = eqn.outvars[0].aval
    q.stored = cv.elementwise(encode, [x], aval.shape, dtype)
    return _hidden(eqn, q)


def scale_names(cv: Converter, q: Quantized) -> list[str]:
    """Names of scale and zero point of `q.stored`."""
    assert q.stored is not None
    if q.measured:
        return q.measured
    zero = 0 if q.zero is None else shrunk(q.zero).reshape(())
    point = np.asarray(zero + q.shift, q.stored.dtype)
    return [cv.graph.constant(np.float32(shrunk(q.scale).reshape(()))), cv.graph.constant(point)]


def decoded(cv: Converter, x: Value) -> Value:
    """The value of x, written."""
    q = x.quantized
    assert q is not None
    if q.stored is not None:
        names = scale_names(cv, q)
        return cv.elementwise(
            lambda n: cv.graph.emit("DequantizeLinear", [n, *names]), [q.stored], x.shape, x.dtype
        )
    if cv.target == "qonnx":
        order = tuple(range(len(x.shape)))
        return cv.value(fpga.weight(cv, q, order, x.shape), x.shape, x.dtype)
    if q.constant:
        packed = cv.pack(q, tuple(range(len(x.shape))), x.shape)
        if packed is not None:
            return cv.value(packed.decode(cv.graph, q.site), x.shape, x.dtype)
        numbers = np.asarray(q.numbers, np.float32)
        zero = 0 if q.zero is None else np.asarray(q.zero, np.float32)
        return cv.value(cv.graph.constant((numbers - zero) * q.scale, q.site), x.shape, x.dtype)
    out = numbers_of(cv, q)
    if q.zero is not None:
        out = cv.elementwise("Sub", [out, q.zero], x.shape, np.float32)
    return cv.elementwise("Mul", [out, q.scale], x.shape, np.float32)
