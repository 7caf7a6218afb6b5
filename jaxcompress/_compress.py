# SPDX-License-Identifier: Apache-2.0
"""The main job: train in float, train with the recipe in the loop, measure both, write it down."""

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
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from . import __version__
from ._core.provenance import key_path
from ._core.qtensor import nbytes
from ._errors import ArtifactError, JaxCompressError
from ._quantize.aware import quantize_aware
from ._quantize.recipe import Recipe
from ._quantize.report import report
from ._quantize.storage import compressed_weights
from ._result import FLOAT_PARAMETERS, PARAMETERS, STABLEHLO, new_result, write_report
from ._task import Task, Train, user_code
from ._train import compiled_step, fit, start, stream
from .export import save_params, stablehlo


def compress(
    task: Task,
    recipe: Recipe,
    out: pathlib.Path,
    *,
    seed: int,
    quiet: bool = False,
    exports: Collection[str] = (),
) -> dict[str, Any]:
    """Compresses the model of a task and writes the result directory.

    Args:
      task: the model; without `train` its weights are only rounded.
      recipe: what becomes of its sites.
      out: the directory to write; it must not exist, be empty, or hold an earlier result.
      seed: of the parameters, where the task makes them from a key, and of the batches.
      quiet: no progress on stderr.
      exports: of "stablehlo": programs to write beside the parameters, in directories of that name.

    Returns:
      What `report.json` holds.

    Raises:
      JaxCompressError: whatever is wrong with task, recipe or directory, before anything is
        trained where that can be known.
    """
    with new_result(out) as folder:
        params, x = initial(task, seed)
        _check(task, recipe, params, x, seed)
        if task.train is not None:
            params, params_q, runs = _train(task, task.train, recipe, params, seed, quiet)
        else:
            params_q, runs = params, _predictions(task, recipe, params, x)
        before = _evaluate(task, task.apply, params)
        after = _evaluate(task, quantize_aware(task.apply, recipe), params_q)
        stored_q = compressed_weights(task.apply, recipe)(params_q, x)
        stored = compressed_weights(task.apply, Recipe([], "float"))(params, x)
        save_params(stored_q, folder / PARAMETERS)
        save_params(stored, folder / FLOAT_PARAMETERS)
        if STABLEHLO in exports:
            _export(quantize_aware(task.apply, recipe), params_q, x, folder / STABLEHLO)
        train = task.train
        result = {
            "task": task.name,
            "recipe": json.loads(recipe.to_json()),
            "seed": seed,
            "steps": None if train is None else {"float": train.float_steps, "aware": train.steps},
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
            "step_ms": {"of": "prediction" if train is None else "training", **_step_ms(*runs)},
            "rows": [
                dataclasses.asdict(row) for row in report(task.apply, recipe)(params_q, x).rows
            ],
        }
        write_report(folder, result)
    return result


def _export(fn: Callable, params: Any, x: Any, path: pathlib.Path) -> None:
    """A program for every size of batch; for that of `x` alone where shapes depend on it."""
    try:
        stablehlo(fn, params, x, path=path, symbolic_batch=True)
    except (ArtifactError, TypeError, ValueError):
        stablehlo(fn, params, x, path=path)


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


def _check(task: Task, recipe: Recipe, params: Any, x: Any, seed: int) -> None:
    """Finds out before training what would fail after it. Only `evaluate` is really run."""
    with user_code(f"apply of task `{task.name}`"):
        jax.eval_shape(task.apply, params, x)
    jax.eval_shape(quantize_aware(task.apply, recipe), params, x)
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
        jax.eval_shape(quantize_aware(loss, recipe), params, batch)
    _evaluate(task, task.apply, params)


def _check_finite(task: Task, params: Any, when: str) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            continue
        if count := int(jnp.sum(~jnp.isfinite(leaf))):
            raise JaxCompressError(
                f"Task `{task.name}`: {count} of the {np.size(leaf)} values of parameter "
                f"`{key_path(path)}` are NaN or infinite{when}. Such a model cannot be "
                "compressed; look at where this parameter comes from."
            )


def _train(
    task: Task, train: Train, recipe: Recipe, params: Any, seed: int, quiet: bool
) -> tuple[Any, Any, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Parameters trained in float and, from there, int8-aware; and one step of each, to time."""
    assert train.float_steps is not None and train.float_optimizer is not None  # Train fills in
    loss_q = quantize_aware(train.loss, recipe)
    step, step_q = (
        compiled_step(fn, tx)
        for fn, tx in ((train.loss, train.float_optimizer), (loss_q, train.optimizer))
    )
    phases = (
        (step, train.float_optimizer, train.float_steps, "float training"),
        (step_q, train.optimizer, train.steps, f"training with {recipe.name}"),
    )
    reached = [params]
    with user_code(f"training of task `{task.name}`"):
        for k, (run, tx, steps, label) in enumerate(phases):
            reached.append(
                fit(run, reached[-1], tx, stream(train, [seed, k]), steps, label=label, quiet=quiet)
            )
            _check_finite(task, reached[-1], f" after the {label}")
    _, params, params_q = reached
    batch = next(stream(train, [seed, 1]))
    same = compiled_step(train.loss, train.optimizer)  # only the recipe makes the difference
    runs = _one_step(same, params, train, batch), _one_step(step_q, params, train, batch)
    return params, params_q, runs


def _one_step(step: Callable, params: Any, train: Train, batch: Any) -> Callable[[], Any]:
    state, frozen = start(params, train.optimizer)

    def run():
        nonlocal state
        state, value = step(state, frozen, batch)
        return state, value

    return run


def _predictions(
    task: Task, recipe: Recipe, params: Any, x: Any
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    plain, aware = jax.jit(task.apply), jax.jit(quantize_aware(task.apply, recipe))
    return lambda: plain(params, x), lambda: aware(params, x)


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
