# SPDX-License-Identifier: Apache-2.0
"""What a recipe does at every site and how many bytes each parameter takes before and after."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp

from .._core.provenance import split_path
from .._core.qtensor import is_qtensor, nbytes
from .._core.region import Traced
from .._core.sites import Site
from .at_site import Setting
from .aware import QuantizeAware
from .decisions import describe, why_not
from .recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Row:
    """One site, or one parameter that no site reads.

    Attributes:
      site: name of the site, or key path of the parameter.
      op: name of the primitive; empty for a parameter.
      shape: of the weight (of the parameter), with the sizes of enclosing layer scans in front.
      weight: format of the weight, `float32` and the like if left alone; None without a weight.
      activation: format of the activation; None without one.
      bytes_before, bytes_after: of what is stored, packed codes and scales; 0 if stored elsewhere.
      snr_db: power of the site's result over that of its error, in dB; None if not run.
      reason: why it was left alone, or a remark; empty if everything was as asked.
      source: `file:line` of the operation.
      gradient: format of what flows back into the site; None if no rule says one.
      weight_snr_db: power of the weight over that of its error, in dB; of `jc.quantize` only.
      seconds: that rounding the weight took, without calibration; of `jc.quantize` only, and on the
        first of the rows that read the weight.
    """

    site: str
    op: str
    shape: tuple[int, ...]
    weight: str | None
    activation: str | None
    bytes_before: int
    bytes_after: int
    snr_db: float | None
    reason: str
    source: str
    gradient: str | None = None
    weight_snr_db: float | None = None
    seconds: float | None = dataclasses.field(default=None, compare=False)


def rows_of(traced: Traced, recipe: Recipe, snr: Mapping[str, float]) -> list[Row]:
    """Every site and every parameter that no site reads, with the bytes that each stores.

    The bytes of a parameter are counted where it is read first.
    """
    shapes = dict(traced.leaves)
    left = {path: math.prod(s.shape) for path, s in shapes.items()}
    once = {s.name: s for s in reversed(traced.sites)}
    sites = [s for s in dict.fromkeys(traced.sites) if once[s.name] is s]
    settings = QuantizeAware(recipe).choose(sites)
    readers: dict[str, int] = {}
    for site in sites:
        for path in _paths(site, shapes):
            readers[path] = readers.get(path, 0) + 1
    rows = []
    for site in sites:
        setting = settings.get(site.name, Setting((None,) * len(site.operands)))
        remark = "" if setting.changes else _reason(site, recipe)
        before = after = 0
        kept: str | None = None
        weights = [i for i in site.weights if len(site.weights) == 1]
        for i in weights:
            before, after, note = _stored(site, i, setting[i], shapes, left, readers)
            if (q := shapes.get(site.operands[i].path)) is not None and is_qtensor(q):
                kept, after = f"{q.format.name}, packed", before
                note = note or "stored like this already"
            remark = remark or note
        rows.append(
            Row(
                site=site.name,
                op=site.op,
                shape=(*site.stack, *site.operands[(weights or [0])[0]].shape),
                weight=kept or _format(site, setting, "weight"),
                activation=_format(site, setting, "activation"),
                bytes_before=before,
                bytes_after=after,
                snr_db=snr.get(site.name),
                reason=remark,
                source=site.source,
                gradient=_gradient(site, setting, recipe),
            )
        )
    for path, shape in shapes.items():
        if left[path] or not math.prod(shape.shape):
            size = nbytes(shape) * left[path] // max(math.prod(shape.shape), 1)
            why = "only partly read by" if path in readers else "read by"
            reason = f"{why} {'a' if path in readers else 'no'} matmul, convolution or embedding"
            name = str(shape.dtype)
            if is_qtensor(shape):
                name, reason = f"{shape.format.name}, packed", f"{reason}: dequantized where it is"
            rows.append(Row(path, "", shape.shape, name, None, size, size, None, reason, ""))
    return rows


def _paths(site: Site, known: Collection[str]) -> list[str]:
    return [p for i in site.weights for p in split_path(site.operands[i].path, known)]


def _stored(
    site: Site,
    i: int,
    quantizer: Any,
    shapes: Mapping[str, Any],
    left: dict[str, int],
    readers: Mapping[str, int],
) -> tuple[int, int, str]:
    """(bytes before, bytes after, remark) of the parameters that operand `i` is read from."""
    operand = site.operands[i]
    paths = split_path(operand.path, shapes)
    size = math.prod(operand.shape)
    copies = math.prod(site.stack)
    if len(paths) == 1:
        path = paths[0]
        total = math.prod(shapes[path].shape)
        take = min(size * copies, left[path])
        if readers[path] == 1:
            take = left[path]  # a slice that a loop picks: it reads the whole array in the end
        if take == 0 and total:
            return 0, 0, f"stored with the first use of `{path}`"
        before = nbytes(shapes[path]) * take // max(total, 1)
        left[path] -= take
    else:
        take = size * copies
        if size and not any(left[p] for p in paths):
            return 0, 0, f"stored with the first use of `{operand.path}`"
        before = sum(
            nbytes(shapes[p]) * left[p] // max(math.prod(shapes[p].shape), 1) for p in paths
        )
        for path in paths:
            left[path] = 0
    if quantizer is None:
        return before, before, ""
    table = quantizer.format.table_nbytes  # once, also of a stack
    one = quantizer.nbytes(operand.shape, site.contracting(i)) - table
    remark = ""
    if quantizer.granularity.size and quantizer.scale_shape(operand.shape, site.contracting(i)) == (
        dataclasses.replace(quantizer, granularity="channel").scale_shape(
            operand.shape, site.contracting(i)
        )
    ):
        remark = f"{quantizer.granularity} does not fit: one scale per channel"
    return before, one * take // max(size, 1) + table, remark


def _format(site: Site, setting: Setting, role: str) -> str | None:
    for operand, quantizer in zip(site.operands, setting, strict=True):
        if operand.role == role:
            if quantizer is None:
                return str(jnp.dtype(operand.dtype))
            if site.op == "conv_general_dilated" and role == "activation":
                # Windows overlap: what shares a scale per token is a whole example.
                return describe(quantizer).replace("per token", "per example")
            return describe(quantizer)
    return None


def _gradient(site: Site, setting: Setting, recipe: Recipe) -> str | None:
    if setting.gradient is not None:
        return describe(setting.gradient)
    found = recipe.rule_for(site)
    if setting.changes and found is not None and found[1].gradient is not None:
        return "float, no backward matmul"
    return None


def _reason(site: Site, recipe: Recipe) -> str:
    found = recipe.rule_for(site)
    if found is None:
        return "no rule matches"
    if found[1].leaves_alone:
        return f"left alone by rule {found[1].pattern!r}"
    return why_not(site, found[1]) or "left alone"
