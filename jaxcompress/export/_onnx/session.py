# SPDX-License-Identifier: Apache-2.0
"""Sessions of onnxruntime."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import onnx

from ..._errors import ArtifactError
from .._artifact import need


def session_of(
    model: onnx.ModelProto | str | os.PathLike,
    *,
    accuracy_level: int | None = None,
    threads: int = 0,
    optimized: pathlib.Path | None = None,
) -> Any:
    """A session on the CPU.

    Args:
      model: the model or its path.
      accuracy_level: of products with weights of few bits: 1 computes in float32; None leaves it
        to onnxruntime, which then rounds activations to int8 (relative error some 1e-3).
      threads: inside an operation; 0 for as many as there are cores.
      optimized: where to write what its optimizer makes of the model.

    Raises:
      ArtifactError: onnxruntime is not installed, or refuses the model.
    """
    need("onnxruntime", "onnx")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    if accuracy_level is not None:
        level = str(accuracy_level)
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    if optimized is not None:
        options.optimized_model_filepath = os.fspath(optimized)
    given = model.SerializeToString() if isinstance(model, onnx.ModelProto) else os.fspath(model)
    try:
        return ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise ArtifactError(
            f"onnxruntime {ort.__version__} refuses the model: {error}. onnx's own reference "
            'evaluator runs it with run(..., evaluator="reference").'
        ) from error


def version() -> str:
    """Of onnxruntime."""
    import onnxruntime as ort

    return ort.__version__
