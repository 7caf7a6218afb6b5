# SPDX-License-Identifier: Apache-2.0
"""What FPGA tools take: Quant and BipolarQuant nodes of QONNX, scales that are powers of two.

    Quant(x, s, z, bits)     s (clip(round(x / s) + z) - z)      z = 0 here, and s = 2^k
    BipolarQuant(x, s)       s where x >= 0, else -s

A multiplication by such a scale is a shift, so that hardware computes the very numbers of the
function. Pappalardo et al. 2022, QONNX: Representing Arbitrary-Precision Quantized Neural Networks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from ..._errors import ArtifactError
from ..._quantize.recipe import Recipe
from .convert import Converter, shrunk
from .graph import SITE, Graph, Value
from .passes import View
from .quantized import Quantized

DOMAIN, DOMAIN_VERSION = "qonnx.custom_op.general", 2
OPSET = 13
# What hls4ml reads beside them, and what only moves values.
OPERATIONS = frozenset(
    "Quant BipolarQuant MatMul Conv Add Sub Mul Relu Sigmoid Tanh Softmax MaxPool AveragePool "
    "GlobalAveragePool Reshape Transpose Concat Identity Pad".split()
)


def check_recipe(recipe: Recipe) -> None:
    """Raises ArtifactError: a rule finds the range of activations in each call."""
    for rule in recipe.rules:
        q = rule.activation
        if q is not None and q.range not in ("static", "fixed", "learned"):
            raise ArtifactError(
                f"rule {rule.pattern!r} of recipe `{recipe.name}` finds the range of activations "
                f"in each call ({q.range}), which is no hardware. Calibrate it: "
                'range="static", as in the recipe "fpga-w6a6-static".'
            )


def quant(cv: Converter, name: str, q: Quantized, scale: Any) -> str:
    """The name of a tensor rounded as q says, with a scale that is known.

    Raises:
      ArtifactError: FPGA tools have no such numbers or scales; says which.
    """
    scale = np.asarray(scale, np.float32)
    mantissa, _ = np.frexp(scale)
    if (mantissa != 0.5).any():
        raise ArtifactError(
            f"a scale of `{q.site}` is {float(scale.flat[0]):g}, and FPGA tools take powers of "
            'two. Use Quantizer(..., power_of_two="ceil"), or the recipe "fpga-w6a6-static".'
        )
    if q.zero is not None:
        raise ArtifactError(
            f"`{q.site}` has a zero point, which FPGA tools get wrong without saying so. Use "
            "symmetric ranges."
        )
    if not q.integers:
        raise ArtifactError(f"`{q.site}` is in {q.dtype}, and FPGA tools take integers.")
    s = cv.graph.constant(scale)
    if (q.low, q.high) == (-1, 1) and q.dtype == "binary":
        return cv.graph.emit("BipolarQuant", [name, s], domain=DOMAIN)
    bits = int(np.ceil(np.log2(q.high - q.low + 1)))
    signed = q.low < 0
    narrow = q.high - q.low + 1 < 2**bits
    if narrow and not (signed and q.low == -q.high and q.high + 1 == 2 ** (bits - 1)):
        raise ArtifactError(f"`{q.site}` has the numbers {q.low:g} to {q.high:g}: no whole bits.")
    parts = [cv.graph.constant(np.float32(v)) for v in (0, bits)]
    return cv.graph.emit(
        "Quant", [name, s, *parts], domain=DOMAIN,
        signed=int(signed), narrow=int(narrow), rounding_mode="ROUND",
    )  # fmt: skip


def activation(cv: Converter, q: Quantized, x: Any, shape: tuple) -> Value:
    """An activation whose range is known."""
    scale = None if isinstance(q.scale, Value) else shrunk(q.scale)
    if scale is None or scale.size != 1:
        raise ArtifactError(f"`{q.site}` has no one known scale for its activation.")
    one = scale.reshape(())
    return cv.elementwise(lambda name: quant(cv, name, q, one), [x], shape, np.float32)


def weight(cv: Converter, q: Quantized, order: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """A known weight, transposed and reshaped, behind the node that rounds it."""
    whole = np.broadcast_to(np.asarray(q.scale, np.float32), np.shape(q.numbers))
    values = np.transpose(np.asarray(q.numbers, np.float32) * whole, order).reshape(shape)
    scale = np.transpose(whole, order).reshape(shape)
    for axis in range(scale.ndim):
        if not (scale != scale.take([0], axis=axis)).any():
            scale = scale.take([0], axis=axis)
    if scale.size == 1:
        scale = scale.reshape(())
    return quant(cv, cv.graph.constant(values, q.site), q, scale)


def biases(graph: Graph, outputs: list[str], digits: int | None) -> None:
    """Constants that are added to a product become fixed-point numbers, exactly as they are.

    Args:
      digits: binary digits behind the point to round them to first; None for as they are.

    Raises:
      ArtifactError: as they are they take more than 32 bits.
    """
    view = View(graph, outputs)
    for add in [n for n in graph.nodes if n.op_type == "Add"]:
        for i in (0, 1):
            bias, node = view.constant(add.input[1 - i]), view.producer(add.input[i])
            if bias is None or node is None or node.op_type not in ("MatMul", "Conv"):
                continue
            bias = bias if digits is None else np.rint(bias * 2.0**digits) / 2.0**digits
            scale, bits = fixed_point(bias, node.name)
            conv = node.op_type == "Conv" and view.alone(add.input[i]) and len(node.input) == 2
            shape = (-1,) if conv or bias.size > 1 else bias.shape
            parts = [bias.reshape(shape).astype(np.float32), scale, np.float32(0), np.float32(bits)]
            name = graph.fresh("bias")
            new = onnx.helper.make_node(
                "Quant", [graph.constant(p) for p in parts], [name], name=name, domain=DOMAIN,
                signed=1, narrow=0, rounding_mode="ROUND",
            )  # fmt: skip
            graph.nodes.insert(graph.nodes.index(node), new)
            if conv:
                node.input.append(name)
                node.output[0] = add.output[0]
                graph.nodes.remove(add)
            else:
                add.input[1 - i] = name
            view = View(graph, outputs)
            break


def fixed_point(x: np.ndarray, what: str) -> tuple[np.float32, int]:
    """(scale, bits) of the narrowest signed fixed-point numbers that hold x exactly."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    whole = (mantissa * 2**24).astype(np.int64)  # float32 has 24 digits
    zeros = np.array([(int(v) & -int(v)).bit_length() - 1 if v else 63 for v in whole.flat])
    low = (exponent.ravel() - 24 + zeros)[whole.ravel() != 0].min(initial=0)
    top = np.abs(x / 2.0**low).max(initial=0)
    bits = max(int(top).bit_length() + 1, 2)  # one bit would stand for -1 and 1
    if bits > 32:
        raise ArtifactError(
            f"a constant that is added to {what.split(SITE)[0]} takes {bits} bits as fixed-point "
            "numbers. Round it: pass bias_digits=8, or round the parameters themselves."
        )
    return np.float32(2.0**low), bits


def check_operations(names: list[str]) -> None:
    """Raises ArtifactError: there is a node that FPGA tools do not read."""
    unknown = sorted(set(names) - OPERATIONS)
    if unknown:
        raise ArtifactError(
            f"the function needs {', '.join(unknown)}, which FPGA tools do not read. They read "
            f"{', '.join(sorted(OPERATIONS))}."
        )
