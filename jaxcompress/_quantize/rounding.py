# SPDX-License-Identifier: Apache-2.0
"""Every weight of a function rounded by a method: all at once, or block after block."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._calibration import layerwise
from .._calibration.layerwise import Item
from .._calibration.rows import rows_of
from .._core.qtensor import QTensor
from .._core.reading import shape_read
from .job import Job
from .methods import Layer, Method
from .weights import Weight, undone, weights_of


class Rounded(NamedTuple):
    """A parameter in storage, the SNR of its values in dB, and the seconds that rounding took."""

    packed: QTensor
    snr_db: float
    seconds: float


def round_weights(
    job: Job,
    method: Method,
    *,
    held: Any = None,
    sequential: bool | None = None,
    checkpoint_dir: Any = None,
) -> dict[str, Rounded]:
    """By key path the packed parameters.

    Args:
      job: the function with its float parameters.
      method: rounds.
      held: stored ranges and learned steps, see `weights_of`.
      sequential: whether a block sees what the rounded blocks before it make.
      checkpoint_dir: where finished blocks are kept, or None.

    Raises:
      SiteError: a method fails at a site, or a rounded weight is not finite.
      JaxCompressError: the method needs data and there are none.
    """
    assert method.round is not None
    parameters = job.parameters()
    known, reasons = weights_of(job.trace(), parameters, held)
    job.notes.update(reasons)
    solved: dict[str, Item] = {}
    nearest: list[Item] = []
    for path, weight in known.items():
        item = _item(path, weight, parameters[path], method)
        if jax.eval_shape(lambda x, w=weight: w.pack(x), parameters[path]) is None:
            job.notes[path] = "its groups do not stay whole: rounded where it is used"
        elif method.needs and not (why := _why_nearest(item, weight)):
            solved[item.name] = item
        else:
            layer = _layer(item, weight, item.v, {}, None)
            if method.needs:
                job.notes[path] = f"rounded to nearest, not by {method.name}: {why}"
            plain = method.needs or weight.quantizer.special  # a range of its own stays
            start = time.perf_counter()
            item.done = [jax.block_until_ready(layer.nearest() if plain else method.round(layer))]
            item.seconds = time.perf_counter() - start
            layerwise.check_result(item, item.done[0])
            nearest.append(item)
    layerwise.run(
        job.data,
        solved,
        name=method.name,
        needs=method.needs,
        sequential=method.sequential if sequential is None else sequential,
        checkpoint_dir=checkpoint_dir,
        key=[repr(method.settings), job.recipe.to_json()],
    )
    out = {}
    for item in (*nearest, *solved.values()):
        q = item.result()
        packed = undone(q, item.undo)
        assert packed is not None
        out[item.path] = Rounded(packed, _snr(item.v, q), item.seconds)
    return out


def _item(path: str, weight: Weight, x: Any, method: Method) -> Item:
    seen, undo = shape_read(x, weight.reads)
    layouts = [(site.name, rows_of(site, i)) for site, i in weight.uses]
    name, rows = next(((n, r) for n, r in layouts if r is not None), layouts[0])

    def solve(v: jax.Array, statistics: Mapping[str, Any], number: int | None) -> QTensor:
        assert method.round is not None
        return method.round(_layer(item, weight, v, statistics, number))

    def like(number: int | None) -> Any:
        part = seen if number is None else jax.eval_shape(lambda v: v[number], seen)
        return jax.eval_shape(lambda v: _layer(item, weight, v, {}, number).nearest(), part)

    item = Item(path, lambda: weight.read(x)[0], undo, name, rows, solve, like)
    return item


def _layer(
    item: Item, weight: Weight, v: jax.Array, statistics: Mapping[str, Any], number: int | None
) -> Layer:
    """What a method sees of an item, or of one layer of it."""
    if number is not None:
        weight = weight._replace(stack=weight.stack[1:])
    return Layer(item.name, weight, v, item.rows, statistics)


def _why_nearest(item: Item, weight: Weight) -> str:
    """Why a method that looks at inputs leaves this weight; empty if it does not."""
    if weight.quantizer.special:
        return "it has a stored range"
    if any(site.op == "gather" for site, _ in weight.uses):
        return "it is a table for lookups"
    if len(weight.uses) > 1:
        return f"{len(weight.uses)} sites read it"
    if not _layer(item, weight, item.v, {}, None).solvable():
        return f"scales per {weight.quantizer.granularity}"
    return ""


def _snr(v: jax.Array, q: QTensor) -> float:
    """10 log10 of the power of the values over that of their error; inf without an error."""
    power, noise = map(float, _powers(v, q))
    return float("inf") if noise == 0 else 10 * float(np.log10(max(power, 1e-45) / noise))


@jax.jit
def _powers(v: jax.Array, q: QTensor) -> tuple[jax.Array, jax.Array]:
    v = v.astype(jnp.float32)
    return jnp.sum(v**2), jnp.sum((q.dequantize().astype(jnp.float32) - v) ** 2)
