# SPDX-License-Identifier: Apache-2.0
"""`OnnxModel`: an ONNX file that was written here, read back and run."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import secrets
from typing import Any

import jax
import numpy as np
import onnx
from onnx import external_data_helper

from ..._errors import ArtifactError
from ..._files.whole import new_file
from ..._quantize.accounting import Row
from ..._quantize.report import Report
from .._params import load_params
from .._signature import Signature
from .audit import Audit, audit
from .session import session_of

KEY = "jaxcompress"
_VERSION = 1
_LIMIT = 2**31 - 2**20  # of a protobuf


class OnnxModel:
    """A function as an ONNX file.

    Attributes:
      path: the file. Above 2 GB its weights are in a file beside it.
      inputs, outputs: what it takes and returns.
      report: every parameter as it is stored.
      target, opset: for what it was written.
      sites: empty: results of sites are not part of the file.
    """

    sites: tuple[str, ...] = ()

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self.model = _read(self.path)
        found = {p.key: p.value for p in self.model.metadata_props}.get(KEY)
        try:
            about = json.loads(found or "null")
            self.inputs = Signature.from_data(about["inputs"])
            self.outputs = Signature.from_data(about["outputs"])
            rows = tuple(Row(**{**row, "shape": tuple(row["shape"])}) for row in about["report"])
            self.report = Report(about["name"], about["recipe"], rows)
            self.target, self.opset = about["target"], self.model.opset_import[0].version
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ArtifactError(
                f"{self.path} is no ONNX model of jaxcompress, or is damaged: {error!r}. Other "
                "models are run with onnxruntime itself."
            ) from None

    @property
    def nbytes(self) -> int:
        """Bytes of the file, and of the one beside it."""
        return sum(p.stat().st_size for p in (self.path, *_beside(self.model, self.path)))

    def run(self, *inputs: Any, evaluator: str | None = None) -> Any:
        """Runs the model on this machine.

        Args:
          inputs: as the example inputs of the export were.
          evaluator: "onnxruntime" by default, or "reference" for onnx's own, which is slow and has
            every format.

        Returns:
          What the function returned; nodes other than dict, list and tuple are dicts by key.

        Raises:
          ArtifactError: other inputs, or the model cannot be run.
        """
        return self.outputs.rebuild(self.run_arrays(*inputs, evaluator=evaluator))

    def run_arrays(self, *inputs: Any, evaluator: str | None = None) -> list[np.ndarray]:
        """The arrays of what `run` returns."""
        arrays = [np.asarray(x) for x in self.inputs.flatten(inputs)]
        names = [i.name for i in self.model.graph.input]
        fed = dict(zip(names, arrays, strict=True))
        if evaluator == "reference":
            from onnx.reference import ReferenceEvaluator

            return list(ReferenceEvaluator(self.model).run(None, fed))  # type: ignore[arg-type]
        if evaluator not in (None, "onnxruntime"):
            raise ArtifactError(f'evaluator={evaluator!r}: expected "onnxruntime" or "reference".')
        taken = {i.name for i in self.session.get_inputs()}
        return self.session.run(None, {n: x for n, x in fed.items() if n in taken})

    @functools.cached_property
    def reference(self) -> dict[str, Any] | None:
        """Example inputs and what the function made of them, if they were written beside it."""
        path = reference_of(self.path)
        return load_params(path) if path.is_file() else None

    @functools.cached_property
    def session(self) -> Any:
        """A session of onnxruntime in which weights of few bits are multiplied in float32."""
        return session_of(self.path, accuracy_level=1)

    def audit(self) -> Audit:
        """Which kernels onnxruntime runs at the sites, as it is by default."""
        return audit(self.model, self.path.name)

    def __repr__(self) -> str:
        about = f"{self.nbytes:,} bytes, opset {self.opset}, {self.target}"
        return f"OnnxModel({str(self.path)!r}, {about}, {self.inputs} -> {self.outputs})"


def read(path: str | os.PathLike) -> OnnxModel:
    """The model of a file, for whatever runs it."""
    found = OnnxModel(path)
    if found.target != "qonnx":
        return found
    from .hardware import QonnxModel  # it builds on this module

    return QonnxModel(path)


def reference_of(path: pathlib.Path) -> pathlib.Path:
    """Where `verify` finds example inputs and results of a model."""
    return path.with_suffix(".reference.safetensors")


def _read(path: pathlib.Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's errors have no common class with those of the disk
        raise ArtifactError(f"{path} cannot be read as an ONNX model: {error}.") from error
    return model


def _beside(model: onnx.ModelProto, path: pathlib.Path) -> list[pathlib.Path]:
    """Files that hold what a model does not."""
    bare = onnx.load(path, load_external_data=False)
    names = {
        e.value for t in bare.graph.initializer for e in t.external_data if e.key == "location"
    }
    return [path.parent / name for name in sorted(names)]


def describe(model: onnx.ModelProto, about: dict[str, Any]) -> None:
    """Writes into a model what `OnnxModel` reads."""
    data = {"version": _VERSION, "jax": jax.__version__, **about}
    data["report"] = [dataclasses.asdict(row) for row in about["report"]]
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, json.dumps(data)


def check(model: onnx.ModelProto) -> None:
    """Raises ArtifactError: the model is not what ONNX says a model is."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except ValueError as error:  # larger than a protobuf: checked on disk
        if "2GiB" not in str(error) and "2GB" not in str(error):
            raise
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ArtifactError(f"onnx refuses the model that was written: {error}") from error


def save(model: onnx.ModelProto, path: pathlib.Path, external: bool | None = None) -> None:
    """Writes a model whole or not at all.

    Args:
      external: weights in a file beside it; by default those of models above 2 GB.

    Raises:
      ArtifactError: it cannot be written; what was there is as it was.
    """
    total = sum(len(t.raw_data) for t in model.graph.initializer)
    if external is None:
        external = total > _LIMIT
    if not external:
        with new_file(path) as file:
            file.write(model.SerializeToString())
        return
    earlier = _beside(model, path) if path.is_file() else []
    beside = f"{path.stem}-{secrets.token_hex(4)}.data"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        split = onnx.ModelProto()
        split.CopyFrom(model)
        external_data_helper.convert_model_to_external_data(
            split, location=beside, size_threshold=1024
        )
        external_data_helper.write_external_data_tensors(split, str(path.parent))
        with new_file(path) as file:
            file.write(split.SerializeToString())
    except (OSError, ArtifactError) as error:
        (path.parent / beside).unlink(missing_ok=True)
        raise ArtifactError(f"{path} cannot be written: {error}. Nothing was changed.") from error
    for old in earlier:
        old.unlink(missing_ok=True)
