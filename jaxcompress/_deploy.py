# SPDX-License-Identifier: Apache-2.0
"""What `compress --export` adds to a result: models, their kernels, and how fast they run."""

from __future__ import annotations

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np

from ._errors import ArtifactError
from ._quantize.recipe import Recipe
from ._result import ONNX, QONNX
from ._task import Task
from .export import onnx, qonnx, verify
from .export._artifact import need

BATCHES = (1, 32)
_ROUNDS, _SECONDS = 7, 0.05


def export_for_any_batch(
    export: Callable, fn: Callable, params: Any, x: Any, **settings: Any
) -> Any:
    """An artifact for every size of batch; for that of `x` alone where shapes depend on it."""
    try:
        return export(fn, params, x, symbolic_batch=True, **settings)
    except (ArtifactError, TypeError, ValueError):
        return export(fn, params, x, **settings)


def check_exports(
    exports: Collection[str], task: Task, recipe: Recipe, params: Any, x: Any
) -> None:
    """Finds out before training what ONNX or hardware could not hold after it.

    Raises:
      ArtifactError: a package is missing, an operation of the float model has no form in ONNX, or
        a rule none in hardware.
    """
    if not {ONNX, QONNX} & set(exports):
        return
    need("onnx", "onnx")
    if ONNX in exports:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "float.onnx"
            export_for_any_batch(onnx, task.apply, params, x, path=path)
    if QONNX in exports:
        need("qonnx", "fpga")
        from .export._onnx.fpga import check_recipe

        check_recipe(recipe)


def deployed(
    task: Task, params: Any, fn: Callable, small: Any, x: Any, folder: pathlib.Path
) -> dict[str, Any]:
    """Writes `folder/model.onnx` and measures it beside the float model, in onnxruntime.

    Args:
      task, params: the float model.
      fn, small: the compressed one.
      x: an example input.
      folder: where to write.

    Returns:
      Bytes of both files, the largest difference to the function as a share of its largest value,
      sites that onnxruntime computes in floats, and milliseconds a call by size of batch (None
      where the model takes the example's batch only).
    """
    model = export_for_any_batch(onnx, fn, small, x, path=folder / "model.onnx", reference=True)
    with tempfile.TemporaryDirectory() as other:
        path = pathlib.Path(other) / "float.onnx"
        plain = export_for_any_batch(onnx, task.apply, params, x, path=path)
        sizes = {"before": plain.nbytes, "after": model.nbytes}
        latency = {str(n): _latency(plain, model, x, n) for n in BATCHES}
    found, kernels = verify(model), model.audit()
    return {
        "bytes": sizes,
        "largest_difference": _largest(found),
        "in_floats": {row.site: row.fallback for row in kernels.fallbacks},
        "latency_ms": latency,
    }


def for_hardware(fn: Callable, small: Any, x: Any, folder: pathlib.Path) -> dict[str, Any]:
    """Writes `folder/model.onnx` for FPGA tools, and executes it on the example input.

    Returns:
      Its bytes, and the largest difference to the function as a share of its largest value.
    """
    model = qonnx(fn, small, x, path=folder / "model.onnx", reference=True)
    found = verify(model)
    return {"bytes": model.nbytes, "largest_difference": _largest(found)}


def _largest(found: Any) -> float:
    return max((r.largest / (r.scale or 1.0) for r in found.rows), default=0.0)


def _latency(before: Any, after: Any, x: Any, batch: int) -> dict[str, float] | None:
    """Milliseconds a call: medians of interleaved rounds."""
    given = jax.tree.map(lambda a: np.resize(np.asarray(a), (batch, *np.shape(a)[1:])), x)
    fed = []
    for model in (before, after):
        try:
            arrays = [np.asarray(a) for a in model.inputs.flatten((given,))]
        except ArtifactError:
            return None
        names = [i.name for i in model.session.get_inputs()]
        fed.append((model.session, dict(zip(names, arrays, strict=True))))
    times: list[list[float]] = [[], []]
    for _ in range(_ROUNDS):
        for (session, arrays), into in zip(fed, times, strict=True):
            start, calls = time.perf_counter(), 0
            while time.perf_counter() - start < _SECONDS:
                session.run(None, arrays)
                calls += 1
            into.append((time.perf_counter() - start) / calls * 1e3)
    return dict(zip(("before", "after"), map(statistics.median, times), strict=True))
