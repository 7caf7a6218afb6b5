# SPDX-License-Identifier: Apache-2.0
"""The rule of convolutions: channels first, in floats, on decoded weights, and on integers."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..._errors import ArtifactError
from . import fpga
from .convert import Converter, rule, shrunk
from .decode import scale_names
from .graph import Value
from .integer_dot import quantized_by_first_axis, thin, unsigned
from .patches import integer_conv
from .quantized import Packed, Quantized
from .shape import padded


@rule("conv_general_dilated")
def _conv(cv: Converter, eqn: Any, xs: list) -> Value:
    p, (x, w), aval = eqn.params, xs, eqn.outvars[0].aval
    if p["batch_group_count"] != 1:
        raise ArtifactError("ONNX has no batch groups; they come from derivatives.")
    numbers, dtype = p["dimension_numbers"], np.dtype(aval.dtype)
    spatial: dict[str, Any] = {
        "strides": list(p["window_strides"]),
        "dilations": list(p["rhs_dilation"]),
        "group": p["feature_group_count"],
        "kernel_shape": [w.shape[a] for a in numbers.rhs_spec[2:]],
    }
    pads = list(p["padding"])
    if any(n < 0 for pair in pads for n in pair) or any(d != 1 for d in p["lhs_dilation"]):
        x, pads = _prepadded(cv, x, numbers.lhs_spec, pads, p["lhs_dilation"]), [(0, 0)] * len(pads)
    spatial["pads"] = [pair[side] for side in (0, 1) for pair in pads]
    perm = [0] * len(aval.shape)
    for i, a in enumerate(numbers.out_spec):
        perm[a] = i
    with cv.at(x, w):
        out = _product(cv, numbers, x, w, spatial, dtype)
    return cv.value(out, aval.shape, aval.dtype, perm)


def _product(cv: Converter, numbers: Any, x: Any, w: Any, spatial: dict, dtype: np.dtype) -> str:
    """The name of the convolution, channels first."""
    qx, qw = (v.quantized if isinstance(v, Value) else None for v in (x, w))
    out = None
    if (
        cv.target != "qonnx"
        and qx is not None
        and qw is not None
        and qx.integers
        and qw.integers
        and qw.constant
    ):
        out = _stored(cv, numbers, qx, qw, spatial) or _dynamic(cv, numbers, x, w, spatial)
        out = out if out is None or dtype == np.float32 else cv.cast(out, dtype)
    if (
        out is None
        and dtype == np.int32
        and all(np.dtype(v.dtype).name in ("int8", "uint8") for v in (x, w))
    ):
        out = cv.graph.emit(
            "ConvInteger",
            [cv.tensor(x, numbers.lhs_spec), cv.tensor(w, numbers.rhs_spec)],
            **spatial,
        )
    if out is None:
        if dtype.kind in "iu":
            raise ArtifactError(f"ONNX has no convolution of {x.dtype} to {dtype}.")
        image = cv.tensor(x, numbers.lhs_spec)
        image = image if x.dtype == dtype else cv.cast(image, dtype)
        out = cv.graph.emit("Conv", [image, _kernel(cv, w, numbers.rhs_spec, dtype)], **spatial)
    return out


def _prepadded(cv: Converter, x: Value, spec: Any, pads: list, dilation: Any) -> Value:
    config = [(0, 0, 0)] * len(x.shape)
    shape = list(x.shape)
    for axis, (before, after), d in zip(spec[2:], pads, dilation, strict=True):
        config[axis] = (before, after, d - 1)
        shape[axis] = (x.shape[axis] - 1) * d + 1 + before + after
    return padded(cv, cv.plain(x), np.zeros((), x.dtype), config, tuple(shape))


def _laid_out(cv: Converter, q: Quantized, spec: Any) -> Packed | None:
    shape = tuple(np.shape(q.numbers)[a] for a in spec)
    return cv.pack(q, tuple(spec), shape)


def _kernel(cv: Converter, w: Any, spec: Any, dtype: np.dtype) -> str:
    q = w.quantized if isinstance(w, Value) else None
    if cv.target == "qonnx" and q is not None and q.constant:
        return fpga.weight(cv, q, tuple(spec), tuple(w.shape[a] for a in spec))
    packed = _laid_out(cv, q, spec) if q is not None and q.constant else None
    if packed is not None:
        name = cv.decoded(packed, q.site, False)  # type: ignore[union-attr]
        return name if dtype == np.float32 else cv.cast(name, dtype)
    if not isinstance(w, Value):
        return cv.graph.constant(np.transpose(w, spec).astype(dtype), "kernel")
    name = cv.tensor(w, spec)
    return name if w.dtype == dtype else cv.cast(name, dtype)


def _channels(packed: Packed | None) -> Packed | None:
    """int8 with one scale, or one per output channel; None for anything else."""
    if (
        packed is None
        or packed.attributes not in ({}, {"axis": 0})
        or (packed.zero is not None and packed.zero.any())
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


def _stored(cv: Converter, numbers: Any, qx: Quantized, qw: Quantized, spatial: dict) -> str | None:
    """Conv between DequantizeLinear: runtimes see the integers."""
    packed = _channels(_laid_out(cv, qw, numbers.rhs_spec))
    if qx.stored is None or qx.measured or packed is None:
        return None
    codes = cv.tensor(qx.stored, numbers.lhs_spec)
    x = cv.graph.emit("DequantizeLinear", [codes, *scale_names(cv, qx)])
    return cv.graph.emit("Conv", [x, packed.decode(cv.graph, qw.site)], **spatial)


def _dynamic(cv: Converter, numbers: Any, x: Value, w: Value, spatial: dict) -> str | None:
    """The convolution of integers, then the scales of examples and of channels."""
    qx, qw = x.quantized, w.quantized
    assert qx is not None and qw is not None
    packed = _channels(_laid_out(cv, qw, numbers.rhs_spec))
    scale = qx.scale if isinstance(qx.scale, Value) else shrunk(qx.scale)
    held = scale.held if isinstance(scale, Value) else scale.shape
    if (
        cv.target == "tensorrt"
        or packed is None
        or (qx.zero is not None and not qx.measured)
        or any(held[a] != 1 for a in numbers.lhs_spec[1:])
    ):
        return None
    rows = thin(cv, scale, tuple(numbers.lhs_spec))
    if qx.raw is not None and isinstance(scale, Value) and scale.held[numbers.lhs_spec[0]] != 1:
        codes, point = quantized_by_first_axis(cv, cv.tensor(qx.raw, numbers.lhs_spec), rows), 128
    else:
        found, point = unsigned(cv, qx)
        codes = cv.tensor(found, numbers.lhs_spec)
    rows, point = qx.measured or (rows, cv.graph.constant(np.uint8(point)))
    return integer_conv(cv.graph, codes, packed.codes, point, [rows], packed.scale, spatial)
