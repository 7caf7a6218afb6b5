# SPDX-License-Identifier: Apache-2.0
"""From a function to a checked ONNX model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import onnx

from ..._errors import ArtifactError
from .._packing import Packing
from .._program import Program, flat
from . import control, conv, decode, dot, elementwise, fpga, index, reduce, shape  # noqa: F401  (rules)
from .convert import RULES, Converter
from .graph import Graph, check_dtype, names_read
from .passes import finish
from .sites import exported

TARGETS = ("onnxruntime", "tensorrt", "portable")
LOWEST = 18


def primitives() -> tuple[str, ...]:
    """Names of the primitives that have a rule, sorted."""
    return tuple(sorted(name for name in RULES if not name.startswith("jc_")))


def model_of(
    fn: Any,
    params: Any,
    example_inputs: tuple,
    inputs: Sequence,
    opset: int,
    target: str,
    bias_digits: int | None = None,
) -> tuple[onnx.ModelProto, Packing, Any]:
    """(the model, how parameters are packed, shapes of what it returns).

    Args:
      inputs: shapes and dtypes of the arrays among the example inputs; sizes may be symbolic.

    Raises:
      ArtifactError: an operation, a dtype or a size that ONNX does not have.
    """
    if target not in (*TARGETS, "qonnx"):
        raise ArtifactError(f"target={target!r}: expected one of {', '.join(TARGETS)}.")
    newest = onnx.defs.onnx_opset_version()
    if target != "qonnx" and not LOWEST <= opset <= newest:
        raise ArtifactError(f"opset={opset}: expected {LOWEST} to {newest}.")
    packing = Packing(fn)
    if target == "qonnx" and packing.recipe is not None:
        fpga.check_recipe(packing.recipe)
    program = Program(fn, params, example_inputs)
    if packing.inner is not None:
        program = Program(
            exported(packing.inner), packing.pack(params, example_inputs), example_inputs
        )
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in program.leaves):
        raise ArtifactError("the parameters are shapes only, and ONNX stores their values.")
    names = [path or f"x{i}" for i, path in enumerate(_input_names(program))]
    arrays_of, kept = flat(program.run)
    closed = jax.jit(arrays_of).trace(_avals(program.leaves), list(inputs)).jaxpr
    graph = Graph(opset)
    symbols: dict[str, tuple[str, int]] = {}
    infos, operands = [], list[Any](map(np.asarray, program.leaves))
    cv = Converter(graph, symbols, target)
    for name, x in zip(names, inputs, strict=True):
        sizes = [d if isinstance(d, int) else str(d) for d in x.shape]
        for axis, d in enumerate(sizes):
            if isinstance(d, str):
                symbols.setdefault(d, (name, axis))
        infos.append(onnx.helper.make_tensor_value_info(name, check_dtype(x.dtype, opset), sizes))
        operands.append(cv.value(name, x.shape, x.dtype))
    outs = cv.run(closed.jaxpr, closed.consts, operands)
    results = kept[0].merge(_avals(closed.out_avals))
    out_names = [f"y{i}" if len(outs) > 1 else "y" for i in range(len(outs))]
    tensors = [cv.tensor(x) for x in outs]
    finish(graph, tensors, target)
    if target == "qonnx":
        fpga.biases(graph, tensors, bias_digits)
        fpga.check_operations([node.op_type for node in graph.nodes])
    for name, tensor in zip(out_names, tensors, strict=True):
        _call_it(graph, tensor, name, tensors.count(tensor) == 1)
    out_infos = [
        onnx.helper.make_tensor_value_info(
            n, check_dtype(a.dtype, opset), [d if isinstance(d, int) else str(d) for d in a.shape]
        )
        for n, a in zip(out_names, closed.out_avals, strict=True)
    ]
    name = getattr(fn, "__name__", "function")
    proto = onnx.helper.make_graph(graph.nodes, name, infos, out_infos, graph.stored())
    imports = [onnx.helper.make_opsetid("", opset)]
    version = onnx.helper.find_min_ir_version_for(imports, True)
    if target == "qonnx":
        imports.append(onnx.helper.make_opsetid(fpga.DOMAIN, fpga.DOMAIN_VERSION))
        version = 8
    model = onnx.helper.make_model(
        proto, opset_imports=imports, ir_version=version, producer_name="jaxcompress"
    )
    return model, packing, results


def _call_it(graph: Graph, tensor: str, name: str, once: bool) -> None:
    """Gives a result its name: that of the node that makes it, if nothing else reads it."""
    makers = [node for node in graph.nodes if tensor in node.output]
    if makers and once and not any(tensor in names_read(node) for node in graph.nodes):
        makers[0].output[list(makers[0].output).index(tensor)] = name
    else:
        graph.nodes.append(onnx.helper.make_node("Identity", [tensor], [name], name=name))


def _avals(arrays: Sequence) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]


def _input_names(program: Program) -> list[str]:
    from .._signature import Signature

    found = Signature.of(program.inputs_with(_avals(program.inputs))).arrays
    return [f"x{path.replace('/', '.')}" if path else "" for path, _, _ in found]
