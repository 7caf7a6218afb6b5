# SPDX-License-Identifier: Apache-2.0
"""How the sites of a function read each parameter, and what of it can be stored packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._core import qmove, qparts
from .._core.provenance import split_path
from .._core.qtensor import QTensor, is_stored
from .._core.reading import read
from .._core.region import Traced
from .._core.sites import Site
from .quantizer import Quantizer
from .stateful import packed_in_range, slots


def weights_of(
    traced: Traced, parameters: Mapping[str, Any], held: Any = None
) -> tuple[dict[str, Weight], dict[str, str]]:
    """(by key path the parameters that can be packed, by key path why others cannot).

    Args:
      traced: of a `QuantizeAware` transform.
      parameters: arrays by key path.
      held: the `QuantParams` that their stored ranges and learned steps are of, or None.
    """
    readings: dict[str, list[Weight | None]] = {}
    for site in traced.sites:
        setting = traced.settings.get(site.name, (None,) * len(site.operands))
        for i in site.weights:
            operand, quantizer = site.operands[i], setting[i]
            reading = None
            if quantizer is not None and operand.reads is not None:
                stored = _stored(held, site, i, quantizer)
                if stored is not None:
                    reading = Weight(
                        quantizer, site.contracting(i), operand.reads, site.stack, stored,
                        ((site, i),),
                    )  # fmt: skip
            for path in split_path(operand.path, parameters):
                readings.setdefault(path, []).append(reading)
    packable: dict[str, Weight] = {}
    reasons: dict[str, str] = {}
    for path, known in readings.items():
        if is_stored(parameters[path]):
            continue
        found = _agreed(known, parameters[path])
        if found is not None:
            packable[path] = found
        elif any(r is not None for r in known):
            reasons[path] = "read in several ways: rounded where it is used"
        else:
            reasons[path] = "no site reads the whole of it as it is: rounded where it is used"
    return packable, reasons


def _stored(held: Any, site: Site, i: int, quantizer: Quantizer) -> tuple[Any, Any] | None:
    """(learned step, stored range) of an operand; None if it cannot be packed by them."""
    if not quantizer.special:
        return None, None
    if held is None or quantizer.range not in ("learned", "static"):
        return None
    slot = slots(site)[i]
    if quantizer.range == "learned":
        return held.learned[site.name][slot], None
    return None, held.statistics["ranges"][site.name][slot]


def _agreed(known: Sequence[Weight | None], x: Any) -> Weight | None:
    """How all sites read a parameter; None if they differ or it cannot be packed so."""
    readings = [r for r in known if r is not None]
    if len(readings) < len(known) or len({(r.quantizer, r.casts) for r in readings}) > 1:
        return None
    if len(readings) > 1 and any(r.stored != (None, None) for r in readings):
        return None  # each site has a range of its own
    kinds = [jax.eval_shape(r.pack, x) for r in readings]
    same = kinds[0] is not None and all(_alike(k, kinds[0]) for k in kinds)
    uses = tuple(use for r in readings for use in r.uses)
    return readings[0]._replace(uses=uses) if same else None


def _alike(a: Any, b: Any) -> bool:
    shapes = [[x.shape for x in jax.tree.leaves(q)] for q in (a, b)]
    return jax.tree.structure(a) == jax.tree.structure(b) and shapes[0] == shapes[1]


class Weight(NamedTuple):
    """How sites read a parameter: `reads` of their operand, inside scans of these lengths.

    `stored` are a learned step and a stored range, stacked over the scans; or twice None. `uses`
    are the sites, each with the position of the operand.
    """

    quantizer: Quantizer
    axis: tuple[int, ...]
    reads: tuple[tuple[str, Any, int], ...]
    stack: tuple[int, ...]
    stored: tuple[Any, Any]
    uses: tuple[tuple[Site, int], ...] = ()

    @property
    def casts(self) -> tuple:
        return tuple(arg for step, arg, _ in self.reads if step == "cast")

    def read(self, x: Any) -> tuple[Any, list[tuple[str, Any]]]:
        """(the operand of the sites, [*stack, *shape], and the steps that undo this)."""
        return read(x, self.reads)

    def nearest(self, v: jax.Array, quantizer: Quantizer | None = None) -> QTensor:
        """The operand [*stack, *shape] rounded to nearest, by its stored range if it has one."""
        chosen = self.quantizer if quantizer is None else quantizer

        def quantize(x: Any, learned: Any, kept: Any) -> QTensor:
            if learned is None and kept is None:
                return chosen.quantize(x, self.axis)
            return packed_in_range(chosen, x, self.axis, learned, kept)

        for _ in self.stack:
            quantize = jax.vmap(quantize)
        return quantize(v, *self.stored)

    def pack(self, x: Any) -> QTensor | None:
        """The parameter packed in its own layout; None if that cuts groups or rounds twice."""
        v, undo = self.read(x)
        return undone(self.nearest(v), undo)


def undone(q: QTensor | None, steps: Sequence[tuple[str, Any]]) -> QTensor | None:
    """The QTensor of an operand in the layout of the parameter; None if that cannot be."""
    for step, arg in steps:
        if q is None:
            return None
        if step == "transpose":
            q = qmove.transpose(q, arg)
        elif step == "reshape":
            q = qmove.reshape(q, arg)
        else:  # to float32 only: codes * scale is rounded once, after the cast of the function
            q = dataclasses.replace(q, dtype=arg) if arg in (jnp.float32, q.dtype) else None
    return None if q is None else qparts.packed_along_last(q)
