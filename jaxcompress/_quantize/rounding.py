# SPDX-License-Identifier: Apache-2.0
"""Every weight of a function rounded by a method: all at once, or block after block.

In sequence, a block sees the inputs that the rounded blocks before it make. A block is a layer of
a scan over stacked layers; elsewhere the sites whose names agree up to their first number
(`layers/3`) and that follow each other, or that read the very same input. Inputs are computed anew
for each block, up to it and not further, so that no activation is held from batch to batch: L
blocks cost about (L + 1) / 2 forward passes, and the Hessians of one block are in memory at a time.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._calibration.checkpoint import Checkpoint
from .._calibration.rows import Rows, rows_of
from .._calibration.stream import same_inputs
from .._core import _compat
from .._core.analyze import CALLS
from .._core.qtensor import QTensor
from .._core.sites import Plan
from .._errors import JaxCompressError, SiteError
from .job import Job
from .methods import Layer, Method
from .weights import Weight, array_undone, undone, weights_of


class Stage(NamedTuple):
    """Sites whose weights are rounded together; of a scan those of one layer, if it says which."""

    names: tuple[str, ...]
    layer: int | None = None


@dataclasses.dataclass
class _Item:
    """A parameter under way.

    Attributes:
      path: its key path.
      weight: how it is read.
      v: the parameter as its sites see it, [*stack, *shape]; rounded layer by layer.
      undo: the way back to its own layout.
      name: the site whose input is looked at.
      rows: the layout of the weight there.
      done: what is rounded: the whole, or the layers so far.
    """

    path: str
    weight: Weight
    v: jax.Array
    undo: list
    name: str
    rows: Rows | None
    done: list[QTensor] = dataclasses.field(default_factory=list)

    def layer(self, statistics: Mapping[str, Any], number: int | None = None) -> Layer:
        weight, v = self.weight, self.v
        if number is not None:
            weight, v = weight._replace(stack=weight.stack[1:]), v[number]
        return Layer(self.name, weight, v, self.rows, statistics)

    def leaf(self) -> jax.Array:
        """The parameter in its own layout, with what is rounded already."""
        v = self.v
        if self.done and self.done[0].ndim == v.ndim:
            v = self.done[0].dequantize()
        elif self.done:
            v = jnp.stack([q.dequantize() for q in self.done] + list(v[len(self.done) :]))
        return array_undone(v, self.undo)

    def result(self) -> QTensor:
        """All that is rounded, as the sites see it."""
        if self.done[0].ndim == self.v.ndim:
            return self.done[0]
        return jax.tree.map(lambda *x: jnp.stack(x), *self.done)


def round_weights(
    job: Job,
    method: Method,
    *,
    held: Any = None,
    sequential: bool | None = None,
    checkpoint_dir: Any = None,
) -> tuple[dict[str, QTensor], dict[str, float]]:
    """(by key path the packed parameters, by key path the SNR of their values in dB).

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
    traced, parameters = job.trace(), job.parameters()
    known, reasons = weights_of(traced, parameters, held)
    job.notes.update(reasons)
    solved: dict[str, _Item] = {}
    nearest: list[_Item] = []
    for path, weight in known.items():
        item = _item(path, weight, parameters[path])
        if jax.eval_shape(lambda x, w=weight: w.pack(x), parameters[path]) is None:
            job.notes[path] = "its groups do not stay whole: rounded where it is used"
        elif method.needs and not (why := _why_nearest(item)):
            solved[item.name] = item
        else:
            if method.needs:
                job.notes[path] = f"rounded to nearest, not by {method.name}: {why}"
            nearest.append(item)
    for item in nearest:
        layer = item.layer({})
        q = layer.nearest() if method.needs or weight_is_kept(item) else method.round(layer)
        item.done = [_checked(item, q)]
    if solved:
        in_sequence = method.sequential if sequential is None else sequential
        stages = [Stage(tuple(solved))]
        if in_sequence:
            stages = stages_of(traced.plan, traced.staged.jaxpr, tuple(solved))
        key = [method.name, repr(method.settings), job.recipe.to_json(), repr(stages)]
        kept = Checkpoint(checkpoint_dir, [*key, *(item.v for item in solved.values())])
        _solve(job, method, solved, stages, same_inputs(traced.plan), kept)
    packed, noise = {}, {}
    for item in (*nearest, *solved.values()):
        q = item.result()
        noise[item.path] = _snr(item.v, q)
        packed[item.path] = undone(q, item.undo)
    return packed, noise


def weight_is_kept(item: _Item) -> bool:
    """Whether the weight has a range of its own, trained or calibrated, which no method changes."""
    return item.weight.quantizer.special


def _item(path: str, weight: Weight, x: Any) -> _Item:
    v, undo = weight.read(x)
    layouts = [(site.name, rows_of(site, i)) for site, i in weight.uses]
    name, rows = next(((n, r) for n, r in layouts if r is not None), layouts[0])
    return _Item(path, weight, v, undo, name, rows)


def _why_nearest(item: _Item) -> str:
    """Why a method that looks at inputs leaves this weight; empty if it does not."""
    if weight_is_kept(item):
        return "it has a stored range"
    if any(site.op == "gather" for site, _ in item.weight.uses):
        return "it is a table for lookups"
    if len(item.weight.uses) > 1:
        return f"{len(item.weight.uses)} sites read it"
    if not item.layer({}).solvable():
        return f"scales per {item.weight.quantizer.granularity}"
    return ""


def _solve(
    job: Job,
    method: Method,
    items: Mapping[str, _Item],
    stages: Sequence[Stage],
    same: Mapping[str, str],
    kept: Checkpoint,
) -> None:
    """Rounds the items stage by stage."""
    for number, stage in enumerate(stages):
        layers = [items[name].layer({}, stage.layer) for name in stage.names]
        like = [jax.eval_shape(layer.nearest) for layer in layers]
        rounded = kept.load(number, like)
        if rounded is None:
            rounded = _round_stage(job, method, items, stage, same)
            kept.save(number, rounded)
        for name, q in zip(stage.names, rounded, strict=True):
            items[name].done.append(q)


def _round_stage(
    job: Job, method: Method, items: Mapping[str, _Item], stage: Stage, same: Mapping[str, str]
) -> list[QTensor]:
    """The rounded weights of a stage, on inputs that the rounded stages before it make."""
    assert method.round is not None
    first = {name: same.get(name, name) for name in stage.names}
    wanted = dict.fromkeys(first.values(), ("count", *method.needs))
    changed = {item.path: item.leaf() for item in items.values() if item.done}
    params = job.with_parameters(changed) if changed else None
    found = job.collect(wanted, method.name, params=params, layer=stage.layer)
    out = []
    for name in stage.names:
        item, statistics = items[name], found[first[name]]
        _enough(job, item, statistics["count"], method)
        try:
            q = method.round(item.layer(statistics, stage.layer))
        except JaxCompressError as error:
            raise type(error)(f"`{name}`: {error}") from error
        out.append(_checked(item, q))
    return out


def _enough(job: Job, item: _Item, count: jax.Array, method: Method) -> None:
    """Looks at the number of tokens that a weight saw.

    Raises:
      SiteError: there was none.
    """
    least, channels = int(np.min(np.asarray(count))), item.rows.channels if item.rows else 0
    if least == 0:
        silent = np.argwhere(np.asarray(count) == 0).tolist()
        which = f" of its parts {silent[:5]}" if np.ndim(count) else ""
        raise SiteError(
            f"no calibration token reached `{item.name}`{which}, and {method.name} needs some. "
            "Calibrate with batches that reach it, or round it to nearest: split the recipe, or "
            "use method='rtn'."
        )
    if least < channels and "gram" in method.needs:
        text = f"{least} calibration tokens: its Hessian has rank {least} at most of {channels}"
        job.notes[item.path] = text
        warnings.warn(f"`{item.name}` saw {text}. Use more batches.", stacklevel=2)


def _checked(item: _Item, q: QTensor) -> QTensor:
    fine = [jnp.all(jnp.isfinite(x.astype(jnp.float32))) for x in (q.scale, q.dequantize())]
    if not all(map(bool, fine)):
        raise SiteError(
            f"rounding the weight of `{item.name}` gave values that are not finite. Nothing was "
            "quantized. Look at the parameter and at the calibration batches."
        )
    return q


def _snr(v: jax.Array, q: QTensor) -> float:
    """10 log10 of the power of the values over that of their error; inf without an error."""
    v = v.astype(jnp.float32)
    noise = float(jnp.sum((q.dequantize().astype(jnp.float32) - v) ** 2))
    power = float(jnp.sum(v**2))
    return float("inf") if noise == 0 else 10 * float(np.log10(max(power, 1e-45) / noise))


def stages_of(plan: Plan, jaxpr: Any, names: Sequence[str]) -> list[Stage]:
    """The blocks of a function in program order, made of these sites."""
    scanned = _scans(plan, jaxpr)
    same = same_inputs(plan)
    out: list[Stage] = []
    last: Any = None
    for site in plan.everything:
        if site.name not in names:
            continue
        number = re.match(r"[^#]*?\d+", site.name)
        key: Any = scanned.get(site.name) or (number and number[0]) or same.get(site.name)
        if key == last:
            out[-1] = Stage((*out[-1].names, site.name))
        else:
            out.append(Stage((site.name,)))
        last = key
    every = []
    for stage in out:
        layers = scanned.get(stage.names[0])
        every += [stage] if layers is None else [Stage(stage.names, k) for k in range(layers[1])]
    return every


def _scans(plan: Plan, jaxpr: Any) -> dict[str, tuple[int, int]]:
    """By name of a site the scan over layers around it, at the top level: (its id, its length)."""
    out: dict[str, tuple[int, int]] = {}
    for i, plans in plan.calls.items():
        eqn = jaxpr.eqns[i]
        if eqn.primitive.name == "scan" and not eqn.params["reverse"]:
            for site in plans[0].everything:
                if site.layered[0]:
                    out[site.name] = (id(eqn), eqn.params["length"])
        elif eqn.primitive.name in CALLS and eqn.primitive.name != "shard_map":
            inner, _ = _compat.open_jaxpr(eqn.params[CALLS[eqn.primitive.name]])
            out |= _scans(plans[0], inner)
    return out
