# SPDX-License-Identifier: Apache-2.0
"""Pruning a trained function from a few batches: what Wanda and SparseGPT share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._calibration import layerwise
from .._calibration.data import Data, check_finite
from .._calibration.layerwise import Item, Stage
from .._calibration.rows import Rows, rows_of
from .._calibration.stream import Batches, check_arrays
from .._core.arguments import name_of
from .._core.compressed import Compressed
from .._core.provenance import split_path
from .._core.qtensor import is_stored
from .._core.reading import array_undone, read, shape_read
from .._core.sites import Site
from .._errors import JaxCompressError, RecipeError, SiteError
from .._solvers import sparsity as rules
from .._solvers.select import largest
from ._owl import Profile
from ._report import report
from ._structures import Structure, pool, spread, unit_sizes, unstructured
from ._targets import Patterns, Targets


class Pruned(NamedTuple):
    """A weight and which of it stays, both as the site sees them."""

    values: jax.Array
    mask: jax.Array


Prune = Callable[[jax.Array, Mapping[str, Any], float | None], tuple[jax.Array, jax.Array]]
"""From a weight [*stack, *lead, out, in], the statistics of its input and a sparsity to (weight,
mask) of the same shape."""


@dataclasses.dataclass(frozen=True)
class Amount:
    """How much is pruned: `sparsity`, or `nm`; and how it is spread over blocks of layers."""

    sparsity: float | None
    nm: rules.Pattern | None
    structure: Structure
    profile: Profile | None

    def check(self, name: str, sequential: bool) -> None:
        """Raises RecipeError where settings contradict each other."""
        if (self.sparsity is None) == (self.nm is None):
            rules.check(1, self.sparsity, self.nm)
        if self.sparsity is not None:
            rules.check(1, self.sparsity, None)
        if self.nm is not None and (self.profile or self.structure is not unstructured):
            raise RecipeError(
                f"{name}(nm={self.nm}) keeps N of every M inputs everywhere: a profile or a "
                "structure goes with sparsity= only."
            )
        if self.profile is not None and not sequential:
            raise RecipeError(
                f"{name}(profile=...) gives each block of layers a sparsity of its own: leave out "
                "sequential=False."
            )


def prune(
    name: str,
    one: Prune,
    needs: Sequence[str],
    amount: Amount,
    fn: Callable[..., Any],
    params: Any,
    calibration: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    pattern: Patterns,
    exclude: Patterns,
    sequential: bool,
    checkpoint_dir: Any,
    progress: bool | None,
    settings: Mapping[str, Any],
) -> Compressed:
    """`Compressed` with the function itself, parameters with zeros, and a report with the masks.

    Raises:
      RecipeError, SiteError, FormatError, JaxCompressError: see `wanda`.
    """
    amount.check(name, sequential)
    batches = Batches(calibration)
    inputs = batches.first()
    check_arrays((inputs.args, inputs.kwargs), 0)
    data = Data(fn, params, inputs, batches, {}, progress)
    if any(is_stored(x) for x in jax.tree.leaves(params, is_leaf=is_stored)):
        raise JaxCompressError(
            f"{name} changes float weights, and these parameters hold packed ones already: prune "
            "first and quantize then."
        )
    check_finite(data.parameters())
    items = _items(name, data, one, amount, Targets(pattern, exclude), pattern)
    layerwise.run(
        data, items, name=name, needs=needs, sequential=sequential,
        checkpoint_dir=checkpoint_dir, key=[repr(amount), repr(settings)],
    )  # fmt: skip
    new, masks = {}, {}
    for item in items.values():
        done = item.result()
        new[item.path] = array_undone(done.values, item.undo)
        steps = [step for step in item.undo if step[0] != "cast"]
        masks[item.path] = array_undone(done.mask, steps)
    small = data.with_parameters(new)
    found = report(fn)(small, *inputs.args, **inputs.kwargs)
    everything = {path: masks.get(path, jnp.asarray(True)) for path in data.parameters()}
    found = dataclasses.replace(
        found,
        name=f"{name_of(fn)}, {name}",
        masks=data.with_parameters(everything),
        notes=tuple(sorted(data.notes.items())),
    )
    return Compressed(fn, small, found)


def _items(
    name: str, data: Data, one: Prune, amount: Amount, targets: Targets, pattern: Patterns
) -> dict[str, Item]:
    """The weights to prune by name of their site.

    Raises:
      RecipeError: a pattern matches nothing.
      SiteError: a pattern names what cannot be pruned from data.
    """
    parameters = data.parameters()
    uses: dict[str, list[tuple[Site, int]]] = {}
    for site in data.trace().sites:
        for i in site.weights:
            for path in split_path(site.operands[i].path, parameters):
                uses.setdefault(path, []).append((site, i))
    items: dict[str, Item] = {}
    shares: dict[tuple[str, int | None], float] = {}
    for target in targets.find(data.params):
        path = target.path or "arg0"
        found = uses.get(path, [])
        why = _why_not(found)
        if why:
            data.notes[path] = f"left alone: {why}"
            if pattern != "*":
                raise SiteError(
                    f"{name}: pattern={pattern!r} matches `{path}`, and it cannot be pruned from "
                    f'calibration data: {why}. Leave it out with exclude="{path}".'
                )
            continue
        item = _item(path, *found[0], parameters[path], one, amount, shares)
        assert item.rows is not None
        try:
            if amount.nm is not None:
                rules.check(item.rows.channels, None, amount.nm)
            unit_sizes(amount.structure, _matrix(item), path)
        except JaxCompressError as error:
            raise type(error)(f'`{path}`: {error} Leave it out with exclude="{path}".') from None
        items[item.name] = item
    if not items:
        raise RecipeError(
            f"{name} finds no weight to prune in `{name_of(data.fn)}`: {data.notes or 'no arrays'}."
        )
    if amount.profile is not None:
        _spread_over_blocks(data, items, amount, shares)
    return items


def _why_not(found: Sequence[tuple[Site, int]]) -> str:
    """Why a parameter is left alone; empty if it is pruned."""
    if not found:
        return "no matmul or convolution reads it"
    if len(found) > 1:
        return f"{len(found)} sites read it"
    site, i = found[0]
    if site.operands[i].reads is None:
        return "no site reads the whole of it as it is"
    return "" if rows_of(site, i) else f"it is read by {site.op}, without rows of inputs"


def _item(
    path: str, site: Site, i: int, x: Any, one: Prune, amount: Amount, shares: Mapping
) -> Item:
    reads = site.operands[i].reads or ()
    seen, undo = shape_read(x, reads)
    rows = rows_of(site, i)
    assert rows is not None

    def solve(v: jax.Array, statistics: Mapping[str, Any], number: int | None) -> Pruned:
        share = amount.sparsity if amount.profile is None else shares[site.name, number]
        w, mask = one(_matrices(rows, v), statistics, share)
        back = rows.over_stack(rows.back, v)
        return Pruned(jnp.where(back(mask), back(w).astype(v.dtype), 0), back(mask))

    def like(number: int | None) -> Pruned:
        def empty(v: jax.Array) -> Pruned:
            v = v if number is None else v[number]
            return Pruned(v, v != 0)

        return jax.eval_shape(empty, seen)

    def seen_by_site() -> jax.Array:
        return read(x, reads)[0]

    return Item(path, seen_by_site, undo, site.name, rows, solve, like, lambda done: done.values)


def _matrices(rows: Rows, v: jax.Array) -> jax.Array:
    """A weight as float32[*stack, *lead, out, in]."""
    return rows.over_stack(rows.of, v)(v.astype(jnp.float32))


def _matrix(item: Item) -> tuple[int, int]:
    """(out, in) of one layer."""
    rows = item.rows
    assert rows is not None
    return math.prod(rows.shape) // math.prod((*rows.lead, rows.channels)), rows.channels


def _spread_over_blocks(
    data: Data,
    items: Mapping[str, Item],
    amount: Amount,
    shares: dict[tuple[str, int | None], float],
) -> None:
    """Finds the sparsity of each block, from norms of the inputs of the float function."""
    assert amount.profile is not None and amount.sparsity is not None
    stages, _ = layerwise.blocks(data, tuple(items))
    norms = data.collect(dict.fromkeys(items, ("norm",)), "outliers")
    scores = [[_score(items[n], norms[n]["norm"], stage) for n in stage.names] for stage in stages]
    for stage, share in zip(stages, amount.profile(scores, amount.sparsity), strict=True):
        for n in stage.names:
            shares[n, stage.layer] = share


def _score(item: Item, norm: jax.Array, stage: Stage) -> jax.Array:
    """|w| ‖x‖ of a weight, or of one layer of it."""
    v = item.v if stage.layer is None else item.v[stage.layer]
    norm = norm if stage.layer is None else norm[stage.layer]
    assert item.rows is not None
    return jnp.abs(_matrices(item.rows, v)) * norm[..., None, :]


def best_units(scores: jax.Array, structure: Structure, sparsity: float) -> jax.Array:
    """The mask of the units of [*lead, out, in] with the largest mean scores, in each matrix."""
    sizes = unit_sizes(structure, scores.shape[-2:], "weight")

    def one(scores: jax.Array) -> jax.Array:
        pooled = pool(scores, sizes)
        return spread(largest([pooled], pooled.size - round(pooled.size * sparsity))[0], sizes)

    for _ in range(scores.ndim - 2):
        one = jax.vmap(one)
    return one(scores)
