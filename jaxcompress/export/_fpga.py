# SPDX-License-Identifier: Apache-2.0
"""`qonnx` and `hls4ml`: a function for FPGAs, and its hardware simulated."""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from .._errors import ArtifactError
from ._artifact import need
from ._params import save_params
from ._program import Program
from ._signature import Signature
from ._stablehlo import reference_values

if TYPE_CHECKING:
    from ._onnx.hardware import HlsModel, QonnxModel


def qonnx(
    fn: Callable,
    params: Any,
    *example_inputs: Any,
    path: str | os.PathLike[str],
    bias_digits: int | None = None,
    reference: bool = False,
) -> QonnxModel:
    """Exports `fn(params, *inputs)` as QONNX, which FPGA tools (hls4ml, FINN) read.

    Operands of sites become Quant and BipolarQuant nodes with scales that are powers of two and
    no zero points; products MatMul and Conv; constants that are added fixed-point numbers. The
    model takes one example, whatever the size of the batch was.

    Args:
      fn: a quantized function whose ranges are known: `"static"` or `"fixed"`, with
        `power_of_two`, as the recipe `"fpga-w6a6-static"` has them.
      params: its parameters.
      example_inputs: arrays whose leading axis is the batch, as that of the result is.
      path: of the file to write; replaced if it exists.
      bias_digits: binary digits behind the point to round added constants to; by default they are
        stored exactly, which may take many bits.
      reference: write what `fn` makes of the example inputs beside it, for `verify`.

    Returns:
      The model; `.run(*inputs)` is the QONNX executor.

    Raises:
      ArtifactError: scales, zero points, formats or operations that the tools do not have; or
        qonnx is not installed. No file is left then.

    References: https://github.com/fastmachinelearning/qonnx, Pappalardo et al. 2022.

    Example:
      >>> import tempfile, jax.numpy as jnp, jaxcompress as jc
      >>> fn, params, x = lambda p, x: x @ p["w"], {"w": jnp.eye(2)}, jnp.array([[0.5, -1.0]])
      >>> small = jc.quantize(fn, params, "fpga-w6a6-static", calibration=[x])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jc.export.qonnx(small.fn, small.params, x, path=folder + "/m.onnx").opset
      13
    """
    need("onnx", "onnx")
    from ._onnx import fpga
    from ._onnx import model as files
    from ._onnx.hardware import QonnxModel
    from ._onnx.rows import stored_rows
    from ._onnx.write import model_of

    given = Program(fn, params, example_inputs)
    if not given.inputs or any(not x.shape for x in given.inputs):
        raise ArtifactError("every input needs a leading axis: that of the batch.")
    inputs = [jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for x in given.inputs]
    one = given.inputs_with(inputs)
    model, packing, results = model_of(fn, params, one, inputs, fpga.OPSET, "qonnx", bias_digits)
    name = getattr(fn, "__name__", type(fn).__name__)
    batch = jax.export.symbolic_shape("batch")

    def many(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*batch, *x.shape[1:]), x.dtype), tree)

    about = {
        "name": name,
        "recipe": "none" if packing.recipe is None else packing.recipe.name,
        "target": "qonnx",
        "inputs": Signature.of(given.inputs_with(many(inputs))).to_data(),
        "outputs": Signature.of(many(results)).to_data(),
        "report": stored_rows(model, packing, params, one),
    }
    files.describe(model, about)
    files.save(model, pathlib.Path(path))
    found = reference_values(given, None, 2**26) if reference else None
    if found is not None:
        save_params(found, files.reference_of(pathlib.Path(path)))
    return QonnxModel(path)


def hls4ml(
    fn: Callable,
    params: Any,
    *example_inputs: Any,
    path: str | os.PathLike[str],
    bias_digits: int | None = None,
    io_type: str = "io_parallel",
    backend: str = "Vitis",
    precision: str = "fixed<24,12>",
) -> HlsModel:
    """Builds the hardware project of `fn(params, x)` with hls4ml and compiles its C simulation.

    No vendor tools are needed, only a C++ compiler. A model with the same numbers as the function
    has the same results bit for bit where no value outgrows `precision`, the type of everything
    that hls4ml cannot infer.

    Args:
      fn, params, example_inputs, bias_digits: as of `qonnx`; one input.
      path: directory of the project.
      io_type: "io_parallel" or "io_stream".
      backend: of hls4ml: "Vitis", "Vivado", "Quartus", "oneAPI", "Catapult".
      precision: of what hls4ml cannot infer.

    Returns:
      The project; `.run(x)` is the C simulation.

    Raises:
      ArtifactError: as `qonnx`, or hls4ml cannot build it.

    References: https://fastmachinelearning.org/hls4ml.
    """
    need("hls4ml", "fpga")
    from ._onnx.hardware import build

    path = pathlib.Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ArtifactError(f"{path} exists and is not an empty directory. Choose another path.")
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "model.onnx"
        model = qonnx(fn, params, *example_inputs, path=file, bias_digits=bias_digits)
        if len(model.inputs.arrays) != 1 or len(model.outputs.arrays) != 1:
            raise ArtifactError("hls4ml is given functions of one array with one array as result.")
        settings = {"io_type": io_type, "backend": backend, "precision": precision}
        return build(model, path, settings)
