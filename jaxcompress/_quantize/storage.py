# SPDX-License-Identifier: Apache-2.0
"""What a quantized function has to store: the weights as its sites read them, packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._core import typed
from .._core.provenance import split_path
from .._core.sites import Site
from .._core.transform import ArgNums, Transformed
from . import recipes
from .aware import QuantizeAware
from .recipe import Recipe
from .weights import weights_of


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
        known, _ = weights_of(traced, parameters, held)
        packed = {path: weight.pack(parameters[path]) for path, weight in known.items()}
        return inner.replace(packed, args, kwargs)

    return run


def _put_back(before: Any, after: Any) -> Any:
    return dataclasses.replace(before, weights=after) if typed.is_typed(before) else after
