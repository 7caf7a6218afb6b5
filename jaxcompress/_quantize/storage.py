# SPDX-License-Identifier: Apache-2.0
"""What a quantized function has to store: the weights as its sites read them, packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._core import qmove, qparts, typed
from .._core.qtensor import QTensor, is_stored
from .._core.sites import Site
from .._core.transform import ArgNums, Transformed
from . import recipes
from .accounting import split_path
from .aware import QuantizeAware
from .quantizer import Quantizer
from .recipe import Recipe
from .stateful import packed_in_range, slots


@dataclasses.dataclass(frozen=True)
class _Collect(QuantizeAware):
    """Leaves the function alone and returns the packed weight of every quantized site."""

    kind = "collect"
    stateful = True

    def _weight(self, site: Site, setting: Any) -> int | None:
        return next((i for i in site.weights if setting[i] is not None), None)

    def init_state(self, site: Site, setting: Any) -> Any:
        i = self._weight(site, setting)
        if i is None:
            return None
        operand, quantizer = site.operands[i], setting[i]
        blank = jax.ShapeDtypeStruct(operand.shape, operand.dtype)
        shapes = jax.eval_shape(lambda x: quantizer.quantize(x, site.contracting(i)), blank)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def apply(self, site, setting, bind, operands, learned, state):
        i = self._weight(site, setting)
        out = bind(*operands)
        if i is None:
            return out, None
        quantizer = setting[i]
        assert quantizer is not None
        return out, quantizer.quantize(operands[i], site.contracting(i))


def compressed_weights(
    fn: Callable, recipe: str | Recipe, argnums: ArgNums = 0
) -> Callable[..., dict[str, Any]]:
    """Packs the weights of a function as its sites read them.

    Returns:
      A function of the arguments of `fn` that returns everything that has to be stored: by site
      name a `QTensor` for each quantized weight (once, also if several sites read it), and by key
      path each parameter that is left alone.
    """
    inner = Transformed(fn, _Collect(recipes.get(recipe)), argnums)

    def run(*args, **kwargs) -> dict[str, Any]:
        _, state = inner.init(*args, **kwargs)
        traced = inner.trace(*args, **kwargs)
        _, state = inner.call({}, state, args, kwargs)
        sites = {s.name: s for s in traced.plan.everything}
        parameters = dict(inner.parameters(args, kwargs))
        out: dict[str, Any] = {}
        stored: set[str] = set()
        for name, packed in state.items():
            operand = sites[name].operands[sites[name].weights[0]]
            base, _, use = name.partition("#")
            first = out.get(base)
            if use and first is not None and first.size == packed.size:
                continue  # the same array, read again
            out[name] = packed
            stored.update(split_path(operand.path, parameters))
        return out | {path: x for path, x in parameters.items() if path not in stored}

    return run


def packed_params(
    fn: Callable, recipe: str | Recipe, argnums: ArgNums = 0
) -> Callable[..., tuple[tuple, dict]]:
    """Packs parameters where they are, so that the quantized function can be called with them.

    A parameter becomes a `QTensor` if the sites that read it read the whole of it, through
    nothing but transposes, reshapes that keep groups whole, casts from float32 and scans over
    stacked layers, and all in the same way. Any other stays as it is, and its sites go on rounding
    it. `quantize_aware(fn, recipe)` then returns the same bits as with float parameters, unless
    something that is no site reads a packed parameter too.

    Returns:
      A function of the arguments of `fn` that returns them, (args, kwargs), with QTensors.
    """
    inner = Transformed(fn, QuantizeAware(recipes.get(recipe)), argnums)

    def run(*args, **kwargs) -> tuple[tuple, dict]:
        held = typed.find((args, kwargs))
        if held:
            plain = pack(typed.only((args, kwargs)), typed.unwrap(args), typed.unwrap(kwargs))
            return jax.tree.map(_put_back, (args, kwargs), plain, is_leaf=typed.is_typed)
        return pack(None, args, kwargs)

    def pack(held: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        traced = inner.trace(*args, **kwargs)
        parameters = dict(inner.parameters(args, kwargs))
        readings: dict[str, list[_Reading | None]] = {}
        for site in traced.sites:
            setting = traced.settings.get(site.name, (None,) * len(site.operands))
            for i in site.weights:
                operand, quantizer = site.operands[i], setting[i]
                reading = None
                if quantizer is not None and operand.reads is not None:
                    stored = _stored(held, site, i, quantizer)
                    if stored is not None:
                        axis = site.contracting(i)
                        reading = _Reading(quantizer, axis, operand.reads, site.stack, stored)
                for path in split_path(operand.path, parameters):
                    readings.setdefault(path, []).append(reading)
        packed = {}
        for path, known in readings.items():
            x = parameters[path]
            if not is_stored(x) and (reading := _agreed(known, x)) is not None:
                packed[path] = reading.pack(x)
        return inner.replace(packed, args, kwargs)

    return run


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


def _agreed(known: Sequence[_Reading | None], x: Any) -> _Reading | None:
    """How all sites read a parameter; None if they differ or it cannot be packed so."""
    readings = [r for r in known if r is not None]
    if len(readings) < len(known) or len({(r.quantizer, r.casts) for r in readings}) > 1:
        return None
    if len(readings) > 1 and any(r.stored != (None, None) for r in readings):
        return None  # each site has a range of its own
    kinds = [jax.eval_shape(r.pack, x) for r in readings]
    same = kinds[0] is not None and all(_alike(k, kinds[0]) for k in kinds)
    return readings[0] if same else None


def _put_back(before: Any, after: Any) -> Any:
    return dataclasses.replace(before, weights=after) if typed.is_typed(before) else after


def _alike(a: Any, b: Any) -> bool:
    shapes = [[x.shape for x in jax.tree.leaves(q)] for q in (a, b)]
    return jax.tree.structure(a) == jax.tree.structure(b) and shapes[0] == shapes[1]


class _Reading(NamedTuple):
    """How a site reads a parameter: `reads` of its operand, inside scans of these lengths.

    `stored` are a learned step and a stored range, stacked over the scans; or twice None.
    """

    quantizer: Quantizer
    axis: tuple[int, ...]
    reads: tuple[tuple[str, Any, int], ...]
    stack: tuple[int, ...]
    stored: tuple[Any, Any]

    @property
    def casts(self) -> tuple:
        return tuple(arg for step, arg, _ in self.reads if step == "cast")

    def pack(self, x: Any) -> QTensor | None:
        """The parameter packed in its own layout; None if that cuts groups or rounds twice."""
        undo: list[tuple[str, Any]] = []
        for step, arg, lead in self.reads:
            if step == "cast":
                undo.append(("cast", x.dtype))
                x = x.astype(arg)
            elif step == "reshape":
                undo.append(("reshape", x.shape))
                x = x.reshape(*x.shape[:lead], *arg)
            else:
                order = (*range(lead), *(lead + a for a in arg))
                undo.append(("transpose", tuple(order.index(a) for a in range(x.ndim))))
                x = x.transpose(order)

        def quantize(x: Any, learned: Any, kept: Any) -> QTensor:
            if learned is None and kept is None:
                return self.quantizer.quantize(x, self.axis)
            return packed_in_range(self.quantizer, x, self.axis, learned, kept)

        for _ in self.stack:
            quantize = jax.vmap(quantize)
        return _undone(quantize(x, *self.stored), undo)


def _undone(q: QTensor | None, steps: Sequence[tuple[str, Any]]) -> QTensor | None:
    for step, arg in reversed(steps):
        if q is None:
            return None
        if step == "transpose":
            q = qmove.transpose(q, arg)
        elif step == "reshape":
            q = qmove.reshape(q, arg)
        else:  # to float32 only: codes * scale is rounded once, after the cast of the function
            q = dataclasses.replace(q, dtype=arg) if arg in (jnp.float32, q.dtype) else None
    return None if q is None else qparts.packed_along_last(q)
