# SPDX-License-Identifier: Apache-2.0
"""What a quantized function has to store: the weights as its sites read them, packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._core.sites import Site
from .._core.transform import ArgNums, Transformed
from . import recipes
from .accounting import split_path
from .aware import QuantizeAware
from .recipe import Recipe


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
