# SPDX-License-Identifier: Apache-2.0
"""The main job: train in float, compress by training or after it, measure both, write it down."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from . import __version__
from ._core.compressed import Compressed
from ._core.curves import thinned
from ._core.provenance import key_path
from ._core.qtensor import nbytes
from ._deploy import check_exports, deployed, export_for_any_batch, for_hardware
from ._errors import JaxCompressError
from ._page import write as write_page
from ._quantize.aware import quantize_aware
from ._quantize.post_training import quantize
from ._quantize.recipe import Recipe
from ._quantize.report import report
from ._quantize.storage import compressed_weights
from ._result import (
    FLOAT_PARAMETERS,
    ONNX,
    PAGE,
    PARAMETERS,
    QONNX,
    STABLEHLO,
    new_result,
    write_report,
)
from ._task import Task, Train, user_code
from ._train import compiled_step, fit, start, stream
from .export import save_params, stablehlo
from .formats._checks import count_nonfinite

QAT = "qat"


def compress(
    task: Task,
    recipe: Recipe,
    out: pathlib.Path,
    *,
    seed: int,
    method: str = QAT,
    quiet: bool = False,
    exports: Collection[str] = (),
) -> dict[str, Any]:
    """Compresses the model of a task and writes the result directory.

    Args:
      task: the model; without `train` its weights are only rounded, or solved for.
      recipe: what becomes of its sites.
      out: the directory to write; it must not exist, be empty, or hold an earlier result.
      seed: of the parameters, where the task makes them from a key, and of the batches.
      method: "qat" trains with the recipe in the loop; other names, joined by "+", are methods of
        `jc.quantize`, which get the model as it is after the float training.
      quiet: no progress on stderr.
      exports: of "stablehlo", "onnx" and "qonnx": what to write beside the parameters, in
        directories of that name.

    Returns:
      What `report.json` holds.

    Raises:
      JaxCompressError: whatever is wrong with task, recipe or directory, before anything is
        trained where that can be known.
    """
    with new_result(out) as folder:
        params, x = initial(task, seed)
        _check(task, recipe, params, x, seed, method)
        check_exports(exports, task, recipe, params, x)
        losses: dict[str, Any] = {}  # by name of the phase
        if method != QAT:
            params, small = _after_training(task, recipe, method, params, seed, quiet, losses)
            runs = _predictions(task, params, small.fn, small.params, x)
            stored_q, rows = small.params, small.report.rows
        else:
            params, small, runs = _by_training(task, recipe, params, x, seed, quiet, losses)
            stored_q = compressed_weights(task.apply, recipe)(small.params, x)
            rows = report(task.apply, recipe)(small.params, x).rows
        before = _evaluate(task, task.apply, params)
        after = _evaluate(task, small.fn, small.params)
        stored = compressed_weights(task.apply, Recipe([], "float"))(params, x)
        save_params(stored_q, folder / PARAMETERS)
        save_params(stored, folder / FLOAT_PARAMETERS)
        if STABLEHLO in exports:
            export_for_any_batch(stablehlo, small.fn, small.params, x, path=folder / STABLEHLO)
        extra: dict[str, Any] = {}
        if QONNX in exports:
            extra[QONNX] = for_hardware(small.fn, small.params, x, folder / QONNX)
        if ONNX in exports:
            extra[ONNX] = deployed(task, params, small.fn, small.params, x, folder / ONNX)
        trained = task.train is not None and method == QAT
        train = task.train
        result = {
            "task": task.name,
            "recipe": json.loads(recipe.to_json()),
            "method": method,
            "seed": seed,
            "steps": None
            if train is None
            else {"float": train.float_steps, "aware": train.steps if trained else 0},
            "versions": {
                "jaxcompress": __version__,
                "jax": jax.__version__,
                "python": platform.python_version(),
            },
            "platform": {
                "backend": jax.default_backend(),
                "device": jax.devices()[0].device_kind,
                "system": platform.platform(),
                "cores": os.cpu_count(),
            },
            "metrics": {"before": before.metrics, "after": after.metrics},
            "comparison": _comparison(before, after),
            "bytes": {
                "parameters": {"before": nbytes(stored), "after": nbytes(stored_q)},
                "files": {
                    "before": (folder / FLOAT_PARAMETERS).stat().st_size,
                    "after": (folder / PARAMETERS).stat().st_size,
                },
            },
            "step_ms": {"of": "training" if trained else "prediction", **_step_ms(*runs)},
            "losses": losses,
            "rows": [dataclasses.asdict(row) for row in rows],
            **extra,
        }
        write_report(folder, result)
        write_page(folder / PAGE, result)
    return result


def initial(task: Task, seed: int) -> tuple[Any, Any]:
    """The parameters before training and the example input of a task.

    Raises:
      JaxCompressError: the task's functions raise, a parameter is NaN or infinite, or there is
        no example.
    """
    params = task.params
    if callable(params):
        with user_code(f"params of task `{task.name}`"):
            params = params(jax.random.key(seed))
    _check_finite(task, params, "")
    with user_code(f"calibration of task `{task.name}`"):
        for x in task.calibration:
            return params, x
    raise JaxCompressError(
        f"Task `{task.name}`: `calibration` is empty: it must give at least one input."
    )


def _check(task: Task, recipe: Recipe, params: Any, x: Any, seed: int, method: str) -> None:
    """Finds out before training what would fail after it. Only `evaluate` is really run."""
    with user_code(f"apply of task `{task.name}`"):
        jax.eval_shape(task.apply, params, x)
    if method == QAT:
        jax.eval_shape(quantize_aware(task.apply, recipe), params, x)
    else:
        report(task.apply, recipe)(*jax.eval_shape(lambda *both: both, params, x))
    if task.train is not None:
        loss = task.train.loss
        with user_code(f"batches of task `{task.name}`"):
            batch = next(stream(task.train, seed))
        with user_code(f"loss of task `{task.name}`"):
            value = jax.eval_shape(loss, params, batch)
        if getattr(value, "shape", None) != ():
            raise JaxCompressError(
                f"Task `{task.name}`: `loss` must return one number, found {value}."
            )
        if method == QAT:
            jax.eval_shape(quantize_aware(loss, recipe), params, batch)
    _evaluate(task, task.apply, params)


def _check_finite(task: Task, params: Any, when: str) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if count := count_nonfinite(leaf):
            raise JaxCompressError(
                f"Task `{task.name}`: {count} of the {np.size(leaf)} values of parameter "
                f"`{key_path(path)}` are NaN or infinite{when}. Such a model cannot be "
                "compressed; look at where this parameter comes from."
            )


def _train_float(
    task: Task, train: Train, params: Any, seed: int, quiet: bool, losses: dict[str, Any]
) -> Any:
    """The parameters after the training in float."""
    assert train.float_steps is not None and train.float_optimizer is not None  # Train fills in
    step = compiled_step(train.loss, train.float_optimizer)
    return _fit(
        task, step, params, train.float_optimizer, train.float_steps, [seed, 0], quiet,
        "float training", losses,
    )  # fmt: skip


def _fit(
    task: Task, step: Callable, params: Any, tx: Any, steps: int, seed: list[int], quiet: bool,
    label: str, losses: dict[str, Any],
) -> Any:  # fmt: skip
    """The parameters after so many steps; the curve of their loss goes into `losses`."""
    assert task.train is not None
    batches = stream(task.train, seed)
    with user_code(f"training of task `{task.name}`"):
        params, found = fit(step, params, tx, batches, steps, label=label, quiet=quiet)
    losses[label] = thinned(found)
    _check_finite(task, params, f" after the {label}")
    return params


def _after_training(
    task: Task, recipe: Recipe, method: str, params: Any, seed: int, quiet: bool,
    losses: dict[str, Any],
) -> tuple[Any, Compressed]:  # fmt: skip
    """(the float parameters, the model quantized after training)."""
    if task.train is not None:
        params = _train_float(task, task.train, params, seed, quiet, losses)
    progress = False if quiet else None
    small = quantize(
        task.apply, params, recipe, calibration=task.calibration, method=method.split("+"),
        progress=progress,
    )  # fmt: skip
    return params, small


def _by_training(
    task: Task, recipe: Recipe, params: Any, x: Any, seed: int, quiet: bool,
    losses: dict[str, Any],
) -> tuple[Any, Compressed, tuple[Callable[[], Any], Callable[[], Any]]]:  # fmt: skip
    """Parameters trained in float, the model trained from there, and a run of each, to time."""
    aware, train = quantize_aware(task.apply, recipe), task.train
    if train is None:
        runs = _predictions(task, params, aware, params, x)
        return params, Compressed(aware, params, None), runs
    params = _train_float(task, train, params, seed, quiet, losses)
    step_q = compiled_step(quantize_aware(train.loss, recipe), train.optimizer)
    label = f"training with {recipe.name}"
    params_q = _fit(
        task, step_q, params, train.optimizer, train.steps, [seed, 1], quiet, label, losses
    )
    batch = next(stream(train, [seed, 1]))
    same = compiled_step(train.loss, train.optimizer)  # only the recipe makes the difference
    runs = _one_step(same, params, train, batch), _one_step(step_q, params, train, batch)
    return params, Compressed(aware, params_q, None), runs


def _one_step(step: Callable, params: Any, train: Train, batch: Any) -> Callable[[], Any]:
    state, frozen = start(params, train.optimizer)

    def run():
        nonlocal state
        state, value = step(state, frozen, batch)
        return state, value

    return run


def _predictions(
    task: Task, params: Any, fn: Callable, small: Any, x: Any
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    before, after = jax.jit(task.apply), jax.jit(fn)
    return lambda: before(params, x), lambda: after(small, x)


def _step_ms(
    before: Callable[[], Any], after: Callable[[], Any], rounds: int = 20, seconds: float = 10.0
) -> dict[str, Any]:
    """Medians of two functions run in turn, so that both see the same machine."""
    for run in (before, after) * 2:
        jax.block_until_ready(run())
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < rounds and (len(times[0]) < 3 or time.perf_counter() < end):
        for run, log in zip((before, after), times, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(run())
            log.append(1e3 * (time.perf_counter() - begin))
    first, second = map(statistics.median, times)
    return {"before": first, "after": second, "ratio": second / first, "rounds": len(times[0])}


class _Evaluation(NamedTuple):
    metrics: dict[str, float]
    choices: list[np.ndarray]  # the largest output of every example, in the order of the calls


def _evaluate(task: Task, fn: Callable, params: Any) -> _Evaluation:
    model = jax.jit(fn)
    choices = []

    def predict(x):
        y = model(params, x)
        if isinstance(y, jax.Array) and not isinstance(y, Tracer) and y.ndim > 1:
            choices.append(np.argmax(y, axis=-1).ravel())
        return y

    with user_code(f"evaluate of task `{task.name}`"):
        found = task.evaluate(predict)
        if not isinstance(found, Mapping):
            raise TypeError(f"it must return {{metric: float}}, found {type(found).__name__}")
        metrics = {str(name): float(value) for name, value in found.items()}
    return _Evaluation(metrics, choices)


def _comparison(before: _Evaluation, after: _Evaluation) -> dict[str, Any]:
    """Agreement of the predictions, and the paired interval of the change in accuracy."""
    if not before.choices or [c.size for c in before.choices] != [c.size for c in after.choices]:
        return {"agreement": None, "accuracy": None}
    same = np.concatenate(before.choices) == np.concatenate(after.choices)
    agreement = float(same.mean())
    old, new = before.metrics.get("accuracy"), after.metrics.get("accuracy")
    return {
        "agreement": agreement,
        "accuracy": _paired_interval(old, new, agreement, same.size),
    }


def _paired_interval(
    before: float | None, after: float | None, agreement: float, examples: int
) -> dict[str, Any] | None:
    """The 95 % interval of an accuracy's change on the same examples, from above.

    An example's change is -1, 0 or 1, and not 0 only where the predictions differ: the share of
    those bounds the discordant pairs. None where accuracy is not a share of those examples.

    References: Agresti and Min 2005, the adjusted Wald interval (half an observation per cell).
    """
    if before is None or after is None:
        return None
    if any(abs(a * examples - round(a * examples)) > 0.01 for a in (before, after)):
        return None
    change, n = after - before, examples + 2
    center = change * examples / n
    discordant = ((1 - agreement) * examples + 1) / n
    half = 1.96 * math.sqrt(max(discordant - center**2, 0) / n)
    return {"change": change, "low": center - half, "high": center + half, "examples": examples}
