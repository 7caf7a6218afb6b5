# SPDX-License-Identifier: Apache-2.0
"""How far a quantized function is from its float function, at the result of every site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._calibration.stream import Inputs
from .._core.qtensor import dequantized
from .._core.sites import Site
from .._core.transform import Transformed
from .._errors import SiteError
from .noise import decibels
from .recipe import Recipe
from .stateful import StatefulQuantizeAware


@dataclasses.dataclass(frozen=True)
class _Results(StatefulQuantizeAware):
    """Returns the result of every quantized site as its state.

    Attributes:
      rounded: whether the function is quantized; its ranges come as `learned`.
    """

    rounded: bool = True

    kind = "results"
    travels = False
    collects = True

    def accept(self, sites, settings, learned, state) -> None:
        """Nothing: state is made here."""

    def choose(self, sites: Sequence[Site]) -> Mapping[str, Any]:
        found = super().choose(sites)
        return {s.name: found[s.name] for s in sites if s.name in found}

    def init_state(self, site: Site, setting: Any) -> Any:
        return jnp.zeros(site.out_avals[0].shape, site.out_avals[0].dtype)

    def apply(self, site, setting, bind, operands, learned, state):
        if self.rounded:
            kept = {slot: x for slot, x in (learned or {}).items() if "low" in x}
            steps = {slot: x for slot, x in (learned or {}).items() if "low" not in x}
            out, _ = super().apply(site, setting, bind, operands, steps, kept)
        else:
            out = bind(*operands)
        return out, dequantized(out[0] if isinstance(out, list) else out)


def compare(
    fn: Callable,
    fn_q: Callable,
    recipe: Recipe,
    params: Any,
    params_q: Any,
    held: Any,
    inputs: Inputs,
) -> dict[str, float]:
    """The signal-to-noise ratio at every quantized site, errors of earlier sites included, in dB.

    Args:
      fn, params: the float function.
      fn_q, params_q: the function whose sites are quantized, with packed parameters.
      recipe: what is done there.
      held: stored ranges, or None.
      inputs: a batch; with shapes instead of arrays nothing is computed.

    Returns:
      By name of a site; empty where nothing was computed, or inside shard_map.

    Raises:
      SiteError: a result is not finite though that of the float function is.
    """
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((inputs.args, params))):
        return {}
    plain = Transformed(fn, _Results(recipe, rounded=False))
    small = Transformed(fn_q, _Results(recipe))
    traced = small.trace(params_q, *inputs.args, **inputs.kwargs)
    if any(o.manual is not None for s in traced.plan.everything for o in s.operands):
        return {}
    _, start = plain.init(params, *inputs.args, **inputs.kwargs)
    _, start_q = small.init(params_q, *inputs.args, **inputs.kwargs)

    @jax.jit
    def run(params: Any, params_q: Any, ranges: Any, args: tuple, kwargs: dict) -> tuple:
        _, clean = plain.call({}, start, (params, *args), kwargs)
        out, noisy = small.call(ranges, start_q, (params_q, *args), kwargs)
        power, fine = {}, {}
        for name, x in noisy.items():
            x = x.astype(jnp.float32)
            fine[name] = jnp.all(jnp.isfinite(x))
            if name in clean and clean[name].shape == x.shape:
                y = clean[name].astype(jnp.float32)
                fine[name] = fine[name] | ~jnp.all(jnp.isfinite(y))
                power[name] = jnp.stack([jnp.sum(y**2), jnp.sum((x - y) ** 2)])
        return power, fine

    ranges: dict[str, Any] = {}
    if held is not None:
        every = dict.fromkeys((*held.learned, *held.statistics["ranges"]))
        stored = held.statistics["ranges"]
        ranges = {n: {**held.learned.get(n, {}), **stored.get(n, {})} for n in every}
    power, fine = run(params, params_q, ranges, inputs.args, inputs.kwargs)
    for site in traced.plan.everything:
        if not np.asarray(fine.get(site.name, True)):
            raise SiteError(
                f"`{site.name}` gives values that are not finite once the function is quantized "
                f"with recipe `{recipe.name}`. Nothing was quantized. Leave the site in float with "
                f'Rule("{site.name}", None), or use a format with more range.'
            )
    return decibels(power)
