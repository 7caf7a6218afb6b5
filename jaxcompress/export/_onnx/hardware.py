# SPDX-License-Identifier: Apache-2.0
"""`QonnxModel` and `HlsModel`: a function for FPGAs, run by the tools that read it."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
from typing import Any

import numpy as np
import onnx

from ..._errors import ArtifactError
from .model import OnnxModel


class QonnxModel(OnnxModel):
    """A function as QONNX, for one example at a time. `run` takes any number of them."""

    def run_arrays(self, *inputs: Any, evaluator: str | None = None) -> list[np.ndarray]:
        """The arrays of what `run` returns, of the QONNX executor, example after example."""
        arrays = [np.asarray(x) for x in self.inputs.flatten(inputs)]
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.core.onnx_exec import execute_onnx
        from qonnx.transformation.infer_shapes import InferShapes

        if evaluator not in (None, "qonnx"):
            raise ArtifactError(f'evaluator={evaluator!r}: a QONNX model is run by "qonnx".')
        wrapper = ModelWrapper(self.model).transform(InferShapes())
        names, outs = (
            [v.name for v in part] for part in (self.model.graph.input, self.model.graph.output)
        )
        rows = []
        for i in range(len(arrays[0])):
            fed = {n: x[i : i + 1] for n, x in zip(names, arrays, strict=True)}
            found = execute_onnx(wrapper, fed)
            rows.append([found[name] for name in outs])
        return [np.concatenate(column).astype(np.float32) for column in zip(*rows)]

    def audit(self) -> Any:
        """A QONNX model is for no runtime.

        Raises:
          ArtifactError: always.
        """
        raise ArtifactError("a QONNX model is for FPGA tools: onnxruntime has no kernels for it.")


class HlsModel:
    """A project of hls4ml, compiled for its C simulation.

    Attributes:
      path: the directory of the project.
      model: the QONNX model that it was made of.
    """

    def __init__(self, path: pathlib.Path, model: QonnxModel, project: Any, first_last: bool):
        self.path, self.model, self._project, self._first_last = path, model, project, first_last

    @property
    def report(self) -> Any:
        """Every parameter as it is stored."""
        return self.model.report

    def run(self, *inputs: Any) -> Any:
        """What the hardware computes: the C simulation, example after example.

        Inputs are rounded first as the function rounds them first, since the pins of the hardware
        are as wide as that.
        """
        (x,) = (np.asarray(x, np.float32) for x in self.model.inputs.flatten(inputs))
        x = _first_quantizer(self.model.model, x)
        if not self._first_last and x.ndim > 2:
            x = np.moveaxis(x, -1, 1)
        y = self._project.predict(np.ascontiguousarray(x))
        shape = tuple(int(d) for d in self.model.outputs.arrays[0][1][1:])
        return np.asarray(y, np.float32).reshape(len(x), *shape)


def _first_quantizer(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """x rounded as the first node that reads the input does."""
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("Transpose", "Reshape"):
            continue
        if node.op_type == "BipolarQuant":
            return np.where(x >= 0, 1, -1).astype(np.float32) * constants[node.input[1]]
        if node.op_type != "Quant" or node.input[0] in constants:
            break
        scale, _, bits = (float(constants[n]) for n in node.input[1:])
        set_ = {a.name: a.i for a in node.attribute}
        top = 2 ** (bits - 1) - 1 if set_["signed"] else 2**bits - 1
        low = (-top - 1 + set_["narrow"]) if set_["signed"] else 0
        return (np.clip(np.rint(x / np.float32(scale)), low, top) * scale).astype(np.float32)
    return x


def build(model: QonnxModel, path: pathlib.Path, settings: dict[str, Any]) -> HlsModel:
    """Converts a model with hls4ml, writes its project, and compiles the C simulation.

    Raises:
      ArtifactError: hls4ml cannot convert it, or there is no compiler.
    """
    import hls4ml
    from hls4ml.utils.config import config_from_onnx_model
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
    from qonnx.util.cleanup import cleanup_model

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            wrapper = cleanup_model(ModelWrapper(model.model))
            if any(node.op_type == "Conv" for node in wrapper.graph.node):
                wrapper = cleanup_model(wrapper.transform(ConvertToChannelsLastAndClean()))
            config = config_from_onnx_model(
                wrapper.model, granularity="name", backend=settings["backend"],
                default_precision=settings["precision"],
            )  # fmt: skip
            project = hls4ml.converters.convert_from_onnx_model(
                wrapper.model, output_dir=os.fspath(path), io_type=settings["io_type"],
                backend=settings["backend"], hls_config=config,
            )  # fmt: skip
            project.compile()
    except Exception as error:  # hls4ml raises bare exceptions
        raise ArtifactError(
            f"hls4ml {hls4ml.__version__} cannot build the model: {type(error).__name__}: {error}"
        ) from error
    given = [int(d.dim_value) for d in wrapper.graph.input[0].type.tensor_type.shape.dim]
    want = [1, *(int(d) for d in model.inputs.arrays[0][1][1:])]
    return HlsModel(path, model, project, given == want)
