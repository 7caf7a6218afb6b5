# SPDX-License-Identifier: Apache-2.0
"""`onnx`: a function and its parameters as an ONNX model for edge devices and servers."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .._errors import ArtifactError
from ._artifact import need
from ._params import save_params
from ._program import Program
from ._signature import Signature
from ._stablehlo import avals, reference_values, with_symbolic_batch

if TYPE_CHECKING:
    from ._onnx.model import OnnxModel


def onnx(
    fn: Callable,
    params: Any,
    *example_inputs: Any,
    path: str | os.PathLike[str],
    opset: int = 21,
    target: str = "onnxruntime",
    symbolic_batch: bool = False,
    strict: bool = False,
    external_data: bool | None = None,
    reference: bool = False,
) -> OnnxModel:
    """Exports `fn(params, *inputs)` as an ONNX file, with quantized sites as ONNX has them.

    Weights are stored packed. Stored ranges (`w8a8-static`) become QuantizeLinear and
    DequantizeLinear around Gemm, MatMul and Conv, biases int32; ranges that are found from the
    values (`w8a8`) MatMulInteger, of patches for convolutions; weights alone DequantizeLinear. What
    depends on parameters only is computed now. Scans over stacked layers are written out, others
    are a Scan.

    Args:
      fn: a pure function that JAX can trace, compressed or not.
      params: its parameters, with QTensors or without. Those of `jc.quantize_aware` are packed
        here as its recipe says.
      example_inputs: the other arguments; arrays, or `jax.ShapeDtypeStruct`s. Flags and other
        values that are no arrays become part of the model.
      path: of the file to write; replaced if it exists.
      opset: version of ONNX's operators, 18 or more: 19 for fp8, 21 for int4 and its groups, 23
        for fp4, 24 for MX scales, 25 for int2.
      target: "onnxruntime" (uint8 activations and weights, which it multiplies exactly on every
        CPU, in the forms for which it has integer kernels), "tensorrt" (int8, zero points 0,
        biases in float, no dynamic ranges), or "portable" (as written, uint8).
      symbolic_batch: let the model take any size in place of the leading one of the inputs.
      strict: refuse to write a model of which onnxruntime computes a quantized site in floats.
      external_data: weights in a file beside it; by default only those of models above 2 GB.
      reference: write what `fn` makes of the example inputs beside it, for `verify`.

    Returns:
      The model: `.run(*inputs)`, `.audit()`, `.report`, `.nbytes`, `.path`.

    Raises:
      ArtifactError: an operation, a dtype or a size that ONNX does not have, with the line of
        code; a format that needs a higher opset; with `strict`, sites in floats; or the file
        cannot be written. What was there before is as it was.

    Example:
      >>> import tempfile, jax.numpy as jnp, jaxcompress as jc
      >>> fn = jc.quantize_aware(lambda p, x: x @ p["w"], "w8a8")
      >>> params, x = {"w": jnp.eye(4)}, jnp.ones((1, 4))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     model = jc.export.onnx(fn, params, x, path=folder + "/m.onnx")
      ...     model.run(x)
      array([[1., 1., 1., 1.]], dtype=float32)

    References: https://onnx.ai/onnx/operators, Jacob et al. 2018 (integer products).
    """
    need("onnx", "onnx")
    from ._onnx import model as files
    from ._onnx.audit import audit
    from ._onnx.rows import stored_rows
    from ._onnx.write import model_of

    path = pathlib.Path(path)
    given = Program(fn, params, example_inputs)
    inputs = with_symbolic_batch(given.inputs) if symbolic_batch else given.inputs
    inputs = avals(inputs)
    model, packing, results = model_of(fn, params, example_inputs, inputs, opset, target)
    rows = stored_rows(model, packing, params, example_inputs)
    about = {
        "name": getattr(fn, "__name__", type(fn).__name__),
        "recipe": "none" if packing.recipe is None else packing.recipe.name,
        "target": target,
        "inputs": Signature.of(given.inputs_with(inputs)).to_data(),
        "outputs": Signature.of(results).to_data(),
        "report": rows,
    }
    files.describe(model, about)
    files.check(model)
    if strict:
        found = audit(model, path.name)
        if found.fallbacks:
            listed = "; ".join(f"`{row.site}`: {row.fallback}" for row in found.fallbacks[:5])
            raise ArtifactError(
                f"strict=True, and onnxruntime {found.version} computes {len(found.fallbacks)} of "
                f"{len(found.rows)} sites in floats: {listed}. Choose another recipe for them, or "
                "leave strict out. Nothing was written."
            )
    files.save(model, path, external_data)
    found = reference_values(given, None, 2**26) if reference else None
    if found is not None:
        save_params(found, files.reference_of(path))
    return files.OnnxModel(path)


def onnx_primitives() -> tuple[str, ...]:
    """Names of the primitives of JAX that `onnx` can write, sorted.

    >>> "dot_general" in onnx_primitives()
    True
    """
    need("onnx", "onnx")
    from ._onnx.write import primitives

    return primitives()
