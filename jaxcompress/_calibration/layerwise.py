# SPDX-License-Identifier: Apache-2.0
"""The weights of a function changed one block after the other, on what the changed blocks make.

A block is a layer of a scan over stacked layers; elsewhere the sites whose names agree up to their
first number (`layers/3`) and that follow each other, or that read the very same input. Inputs are
computed anew for each block, up to it and not further, so that no activation is held from batch to
batch: L blocks cost about (L + 1) / 2 forward passes, and the statistics of one block are in memory
at a time.
"""

from __future__ import annotations

import dataclasses
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._core import _compat
from .._core.analyze import CALLS
from .._core.qtensor import dequantized
from .._core.reading import array_undone
from .._core.sites import Plan
from .._core.transform import Transformed
from .._errors import JaxCompressError, SiteError
from ..formats._checks import count_nonfinite
from .checkpoint import Checkpoint
from .data import Data
from .rows import Rows
from .stream import Collect, same_inputs


class Stage(NamedTuple):
    """Sites whose weights change together; of a scan those of one layer, if it says which."""

    names: tuple[str, ...]
    layer: int | None = None


@dataclasses.dataclass
class Item:
    """A parameter under way.

    Attributes:
      path: its key path.
      read: gives the parameter as its sites see it, [*stack, *shape]: made when it is asked for,
        since a transposed copy of every weight of a model would take as much memory as the model.
      undo: the way back to its own layout.
      name: the site whose input is looked at.
      rows: the layout of the weight there.
      solve: `solve(v, statistics, layer)` with v of that layer alone, or all of it (None); returns
        a pytree.
      like: `like(layer)`, the shapes and dtypes of what `solve` returns.
      values: from what `solve` returns to an array like v.
      done: what is finished: the whole, or the layers so far.
      seconds: that this took, without calibration.
    """

    path: str
    read: Callable[[], jax.Array]
    undo: list
    name: str
    rows: Rows | None
    solve: Callable[[jax.Array, Mapping[str, Any], int | None], Any]
    like: Callable[[int | None], Any]
    values: Callable[[Any], jax.Array] = dequantized
    done: list[Any] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def v(self) -> jax.Array:
        """The parameter as its sites see it."""
        return self.read()

    @property
    def whole(self) -> bool:
        """Whether all layers were changed at once."""
        return len(self.done) == 1 and _ndim(self.values, self.done[0]) == _ndim(self.read)

    def leaf(self) -> jax.Array:
        """The parameter in its own layout, with what is finished."""
        if self.whole:
            v = self.values(self.done[0])
        else:
            rest = self.v[len(self.done) :]
            v = jnp.stack([*map(self.values, self.done), *rest])
        return array_undone(v, self.undo)

    def result(self) -> Any:
        """All that is finished, as the sites see it."""
        return self.done[0] if self.whole else jax.tree.map(lambda *x: jnp.stack(x), *self.done)


def _ndim(f: Callable, *args: Any) -> int:
    return jax.eval_shape(f, *args).ndim


def run(
    data: Data,
    items: Mapping[str, Item],
    *,
    name: str,
    needs: Sequence[str],
    sequential: bool,
    checkpoint_dir: Any,
    key: Sequence[str],
) -> None:
    """Changes the items stage by stage; what becomes of them is in their `done`.

    Args:
      data: the function, its parameters and batches.
      items: by name of the site.
      name: what does it, for messages.
      needs: collectors whose statistics `Item.solve` reads.
      sequential: whether a block sees what the changed blocks before it make; otherwise all is
        one stage.
      checkpoint_dir: where finished stages are kept, or None.
      key: text that decides, beside the values, what is calculated.

    Raises:
      SiteError: what `solve` raises, with the name of the site.
      JaxCompressError: there are no data, or not enough.
    """
    if not items:
        return
    stages, same = blocks(data, tuple(items))
    if not sequential:
        stages = [Stage(tuple(items))]
    kept = Checkpoint(checkpoint_dir, [name, *key, repr(stages), *(i.v for i in items.values())])
    for number, stage in enumerate(stages):
        done = kept.load(number, [items[n].like(stage.layer) for n in stage.names])
        if done is None:
            done = _stage(data, items, stage, same, name, needs)
            kept.save(number, done)
        for n, result in zip(stage.names, done, strict=True):
            items[n].done.append(result)


def blocks(data: Data, names: Sequence[str]) -> tuple[list[Stage], dict[str, str]]:
    """The blocks of a function made of these sites, and `same_inputs` of them."""
    args, kwargs = data.call
    looks = Collect(tuple((name, ()) for name in names))
    traced = Transformed(data.fn, looks).trace(*args, **kwargs)
    return stages_of(traced.plan, traced.staged.jaxpr, names), same_inputs(traced.plan)


def _stage(
    data: Data,
    items: Mapping[str, Item],
    stage: Stage,
    same: Mapping[str, str],
    name: str,
    needs: Sequence[str],
) -> list[Any]:
    """What becomes of a stage, on inputs that the changed stages before it make."""
    first = {n: same.get(n, n) for n in stage.names}
    wanted = dict.fromkeys(first.values(), ("count", *needs))
    changed = {item.path: item.leaf() for item in items.values() if item.done}
    params = data.with_parameters(changed) if changed else None
    found = data.collect(wanted, name, params=params, layer=stage.layer)
    out = []
    for n in stage.names:
        item, statistics = items[n], found[first[n]]
        _enough(data, item, statistics["count"], name, needs)
        v = item.v if stage.layer is None else item.v[stage.layer]
        try:
            start = time.perf_counter()
            out.append(jax.block_until_ready(item.solve(v, statistics, stage.layer)))
            item.seconds += time.perf_counter() - start
        except JaxCompressError as error:
            raise type(error)(f"`{n}`: {error}") from error
        check_result(item, out[-1])
    return out


def _enough(data: Data, item: Item, count: jax.Array, name: str, needs: Sequence[str]) -> None:
    """Looks at the number of tokens that a weight saw.

    Raises:
      SiteError: there was none.
    """
    least, channels = int(np.min(np.asarray(count))), item.rows.channels if item.rows else 0
    if least == 0:
        silent = np.argwhere(np.asarray(count) == 0).tolist()
        which = f" of its parts {silent[:5]}" if np.ndim(count) else ""
        raise SiteError(
            f"no calibration token reached `{item.name}`{which}, and {name} needs some. "
            "Calibrate with batches that reach it, or leave it out and treat it without data "
            "(rounding to nearest, magnitude)."
        )
    if least < channels and "gram" in needs:
        text = f"{least} calibration tokens: its Hessian has rank {least} at most of {channels}"
        data.notes[item.path] = text
        warnings.warn(f"`{item.name}` saw {text}. Use more batches.", stacklevel=2)


def check_result(item: Item, result: Any) -> None:
    """Raises if a changed weight is not finite.

    Raises:
      SiteError: names it.
    """
    if any(map(count_nonfinite, (*jax.tree.leaves(result), item.values(result)))):
        raise SiteError(
            f"changing the weight of `{item.name}` gave values that are not finite. Nothing was "
            "changed. Look at the parameter and at the calibration batches."
        )


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
