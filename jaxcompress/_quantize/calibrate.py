# SPDX-License-Identifier: Apache-2.0
"""Calibration: first ranges and step sizes from what flows through the float function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._calibration.stream import Inputs, check_arrays
from .._core import typed
from .._core.sites import Site
from .._core.transform import ArgNums, Transformed
from .._errors import JaxCompressError, SiteError
from ..formats._checks import count_nonfinite
from . import observers, recipes
from .aware import QuantizeAware
from .recipe import Recipe
from .stateful import QuantState, slots, stored, view_of


@dataclasses.dataclass(frozen=True)
class Observe(QuantizeAware):
    """Leaves the function in float and looks at the operands that keep a range."""

    kind = "observe"
    stateful = True

    def init_state(self, site: Site, setting: Any) -> Any:
        kept = stored(site, setting)
        return {slot: observers.start(q, shape) for slot, q, shape in kept} or None

    def apply(self, site, setting, bind, operands, learned, state):
        new = dict(state or {})
        for i, (slot, x, quantizer) in enumerate(zip(slots(site), operands, setting, strict=True)):
            if quantizer is not None and slot in new:
                v, shared, _, sync = view_of(site, i, quantizer, jax.lax.stop_gradient(x))
                new[slot] = observers.observe(quantizer, new[slot], v, shared, sync)
        return bind(*operands), new or None


class Calibration:
    """Collects what a recipe needs to know of a function, batch by batch."""

    def __init__(self, fn: Callable, recipe: Recipe, argnums: ArgNums = 0):
        self.inner = Transformed(fn, Observe(recipe), argnums)
        self.seen: dict[str, Any] = {}
        self.settings: Mapping[str, Any] = {}
        self.sites: dict[str, Site] = {}
        self.count = 0

    def add(self, args: tuple, kwargs: dict) -> None:
        """Runs the function on one more batch.

        Raises:
          JaxCompressError: not arrays, an empty array, or values that are not finite.
        """
        args, kwargs = typed.unwrap((args, kwargs))
        check_arrays((args, kwargs), self.count)
        if not self.count:
            traced = self.inner.trace(*args, **kwargs)
            self.settings = traced.settings
            self.sites = {site.name: site for site in traced.plan.everything}
            _, self.seen = self.inner.init(*args, **kwargs)
        _, self.seen = self.inner.call({}, self.seen, args, kwargs)
        for name, found in self.seen.items():
            if any(map(count_nonfinite, jax.tree.leaves(found))):
                raise JaxCompressError(
                    f"calibration batch {self.count} makes values that are NaN or infinite at "
                    f"`{name}`: no range can hold them. Look at that batch and the parameters."
                )
        self.count += 1

    def state(self) -> QuantState:
        """The state that `quantize_aware_with_state` starts from.

        Raises:
          SiteError: a site that no batch reached.
        """
        learned: dict[str, Any] = {}
        ranges: dict[str, Any] = {}
        for name, found in self.seen.items():
            for slot, quantizer, _ in stored(self.sites[name], self.settings[name]):
                reached = bool(np.all(np.asarray(found[slot]["count"]) > 0))
                if not reached and quantizer.range != "ema":
                    raise SiteError(
                        f"`{name}` was not run by any calibration batch (a branch that was not "
                        f"taken): its {quantizer.range} range is unknown. Calibrate with batches "
                        f'that reach it, or leave it in float with Rule("{name}", None).'
                    )
                made = observers.finish(quantizer, found[slot])
                for into, value in zip((learned, ranges), made, strict=True):
                    if value is not None:
                        into.setdefault(name, {})[slot] = value
        return QuantState(learned, {"ranges": ranges, "weight": jnp.zeros((), jnp.float32)})


def calibrate(
    fn: Callable, params: Any, batches: Iterable[Any], recipe: str | Recipe
) -> QuantState:
    """Runs `fn(params, batch)` over batches and returns the ranges and step sizes that fit.

    The function runs in float, compiled once per shape; what is kept between batches does not
    grow with them.

    Args:
      fn: a forward pass or a loss.
      params: its first argument (a `QuantParams` too).
      batches: iterable; a batch is one argument, `jc.Inputs(*args, **kwargs)` is several.
      recipe: name of a recipe, or a `Recipe`.

    Returns:
      A state for `quantize_aware_with_state`. `QuantParams(params, state.learned,
      state.statistics)` carries it through a train step.

    Raises:
      JaxCompressError: no batches, an empty one, or one that makes NaNs or infinities.
      SiteError: a site with a static or learned range that no batch reached.

    >>> from jaxcompress._quantize.recipe import Rule
    >>> from jaxcompress._quantize.quantizer import Quantizer
    >>> recipe = Recipe([Rule("*", activation=Quantizer("int8", "tensor", range="static"))])
    >>> state = calibrate(lambda w, x: x @ w, jnp.eye(2), [jnp.ones((1, 2)), jnp.eye(2)], recipe)
    >>> state.statistics["ranges"]["arg0"]["activation"]["count"]
    Array(2., dtype=float32)
    """
    calibration = Calibration(fn, recipes.get(recipe))
    for batch in batches:
        inputs = Inputs.of(batch)
        calibration.add((params, *inputs.args), inputs.kwargs)
    if not calibration.count:
        raise JaxCompressError("calibrate got no batches: is the iterator used up?")
    return calibration.state()
