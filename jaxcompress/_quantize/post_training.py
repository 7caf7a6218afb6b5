# SPDX-License-Identifier: Apache-2.0
"""`jc.quantize`: a trained function and a few batches in, packed parameters out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from .._calibration.data import check_finite
from .._calibration.stream import Batches, Inputs, check_arrays
from .._core import typed
from .._core.arguments import name_of
from .._core.compressed import Compressed
from .._core.qtensor import is_qtensor
from .._errors import JaxCompressError, RecipeError
from . import methods, recipes
from .accounting import rows_of
from .aware import quantize_aware
from .calibrate import calibrate
from .comparison import compare
from .job import Job
from .methods import Method
from .params import QuantParams
from .recipe import Recipe
from .report import Report
from .rounding import round_weights
from .stateful import QuantState, needs_state


def quantize(
    fn: Callable[..., Any],
    params: Any,
    recipe: str | Recipe,
    *,
    example_inputs: Any = None,
    calibration: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
    state: Any = None,
    method: str | Method | Sequence[str | Method] = "rtn",
    sequential: bool | None = None,
    checkpoint_dir: str | os.PathLike | None = None,
    progress: bool | None = None,
    key: Any = None,
) -> Compressed:
    """Quantizes a trained function without training: packed weights, activations by the recipe.

    `Compressed.fn` is `quantize_aware(fn, recipe)`, called with packed parameters: what was trained
    with the same recipe is served with the same numbers. Weights that a site reads whole become
    `QTensor`s; others stay as they are and are rounded where they are used. The report says which.

    Args:
      fn: `fn(params, *inputs)`, any function that JAX can trace.
      params: its trained parameters, a pytree of arrays, or the `QuantParams` of training with
        this recipe, whose ranges and step sizes are kept.
      recipe: name of a recipe, or a `Recipe`.
      example_inputs: a batch to trace with; arrays, or `jax.ShapeDtypeStruct`s. One argument, or
        `jc.Inputs(*args, **kwargs)`.
      calibration: batches like it, for methods that need data and for static ranges: a list, a
        function that returns an iterable, or an iterator, which can be walked once.
      state: ranges from `jc.calibrate` or training, instead of calibrating them here.
      method: name of a method, a `Method`, or several in the order in which they are used.
      sequential: whether a block of layers is calibrated on what the quantized blocks before it
        make. By default as the method is published: yes for "gptq".
      checkpoint_dir: a directory in which the blocks that are done are kept, so that the same call
        goes on where it was interrupted.
      progress: whether to show a progress bar; by default where stderr is a terminal.
      key: of methods that draw random numbers; none of those here does.

    Returns:
      `Compressed(fn, params, report)`.

    Raises:
      JaxCompressError: neither `example_inputs` nor `calibration`; no data where some are needed;
        parameters, batches or results that are not finite.
      RecipeError, SiteError: as `quantize_aware`; a method or recipe that does not fit.

    >>> import jax.numpy as jnp
    >>> fn = lambda params, x: x @ params["w"]
    >>> small = quantize(fn, {"w": jnp.eye(4)}, "w8a8", example_inputs=jnp.ones((1, 4)))
    >>> small.params["w"].format.name, small.fn(small.params, jnp.ones((1, 4))).tolist()
    ('int8', [[1.0, 1.0, 1.0, 1.0]])
    """
    steps, chosen = methods.chain(method), recipes.get(recipe)
    rounding = _rounding(steps)
    batches = None if calibration is None else Batches(calibration)
    held = typed.only((params,)) if typed.find((params,)) else state
    weights = typed.unwrap((params,))[0]
    inputs = _example(example_inputs, batches)
    job = Job(fn, weights, chosen, inputs, batches, {}, progress)
    _check(job, held, steps)
    for step in steps:
        job = job if step.prepare is None else step.prepare(job)
    if held is None and needs_state(chosen):
        held = _calibrated(job)
    serving = Recipe([_frozen(rule) for rule in chosen.rules], chosen.name)
    job = dataclasses.replace(job, recipe=serving)
    rounded = round_weights(
        job, rounding, held=held, sequential=sequential, checkpoint_dir=checkpoint_dir
    )
    packed = {path: r.packed for path, r in rounded.items()}
    for step in steps:
        job = job if step.correct is None else step.correct(job, packed)
    small = job.with_parameters(packed)
    fine = compare(fn, job.fn, serving, weights, small, held, job.inputs)
    rows = rows_of(job.trace(), serving, fine)
    report = _report(fn, job, rows, rounded, steps)
    if needs_state(serving):
        assert held is not None
        small = QuantParams(small, held.learned, held.statistics)
    return Compressed(quantize_aware(job.fn, serving), small, report)


def _rounding(steps: Sequence[Method]) -> Method:
    """The step that rounds: one that does nothing else if there is one."""
    rounds = [m for m in steps if m.round is not None]
    return next((m for m in rounds if m.prepare is None), (rounds or [methods.get("rtn")])[0])


def _example(example: Any, batches: Batches | None) -> Inputs:
    if example is not None:
        return Inputs.of(example)
    if batches is not None:
        return batches.first()
    raise JaxCompressError(
        "quantize needs to see what the function is called with: pass example_inputs= (a batch, or "
        "jaxcompress.Inputs(*args, **kwargs) for several arguments) or calibration= (batches)."
    )


def _check(job: Job, held: Any, steps: Sequence[Method]) -> None:
    """Finds out what is wrong before anything is computed.

    Raises:
      JaxCompressError, RecipeError, SiteError: says what.
    """
    leaves = jax.tree.leaves(job.params, is_leaf=is_qtensor)
    if any(is_qtensor(x) for x in leaves):
        raise JaxCompressError(
            "these parameters hold QTensors already: quantize the float parameters, or use "
            "jaxcompress.with_qtensors(fn) to run with them as they are."
        )
    check_finite(job.parameters())
    given = jax.tree.leaves((job.inputs.args, job.inputs.kwargs))
    if not any(isinstance(x, jax.ShapeDtypeStruct) for x in given):
        check_arrays(given, 0)
    quiet = [m.name for m in steps if m.prepare is not None]
    if held is not None and quiet:
        raise RecipeError(
            f"{quiet} change what flows through the sites, and these ranges are of the function "
            "as it was. Leave state= (or QuantParams) out and pass calibration=."
        )
    job.trace()


def _calibrated(job: Job) -> QuantState:
    if job.batches is None:
        raise JaxCompressError(
            f"recipe `{job.recipe.name}` has ranges that are calibrated, averaged or learned: pass "
            "calibration= (batches), state= from jaxcompress.calibrate, or trained QuantParams."
        )
    return calibrate(job.fn, job.params, job.batches, job.recipe)


def _frozen(rule: Any) -> Any:
    """A rule whose averaged ranges no longer follow the data."""
    changes = {
        field: dataclasses.replace(q, range="static")
        for field in ("weight", "activation")
        if (q := getattr(rule, field)) is not None and q.range == "ema"
    }
    return dataclasses.replace(rule, gradient=None, **changes) if changes else rule


def _report(
    fn: Callable, job: Job, rows: Sequence[Any], rounded: Mapping, steps: Sequence[Method]
) -> Report:
    """The rows of the function, with what the methods found out about its parameters."""
    names = "+".join(m.name for m in steps)
    out, seen = [], set()
    for row in rows:
        path = row.site.split("#")[0]
        found = rounded.get(path)
        snr = None if found is None else found.snr_db
        seconds = None if found is None or path in seen else found.seconds
        seen.add(path)
        note = "; ".join(dict.fromkeys(filter(None, (row.reason, job.notes.get(path)))))
        out.append(dataclasses.replace(row, weight_snr_db=snr, seconds=seconds, reason=note))
    return Report(name_of(fn), f"{job.recipe.name}, method {names}", tuple(out))
