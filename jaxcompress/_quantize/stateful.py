# SPDX-License-Identifier: Apache-2.0
"""Quantization with ranges that are stored between calls or learned: the transform and its API."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._core import _compat
from .._core.arguments import ArgNums
from .._core.keys import take_key
from .._core.patterns import nearest
from .._core.qtensor import QTensor, is_qtensor
from .._core.sites import Site
from .._core.transform import Transformed
from .._errors import RecipeError, SiteError
from . import layout, recipes, state
from .at_site import Setting, rounded_operand, run
from .aware import QuantizeAware
from .dorefa import dorefa_activation, dorefa_weight
from .integer import Rounded
from .integer_dot import Codes, codes_from_grid
from .lsq import lsq, lsq_codes
from .native import Native
from .pact import pact
from .quantizer import Quantizer
from .recipe import Recipe
from .settings import STORED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuantState:
    """What a recipe keeps between calls.

    Attributes:
      learned: by site name and operand, step sizes and clipping values; differentiable.
      statistics: `{"ranges": by site name and operand, "weight": 0}`; ends and counts.
    """

    learned: dict[str, Any]
    statistics: dict[str, Any]


def needs_state(recipe: Recipe) -> bool:
    """Whether a rule of the recipe has a range that this file computes."""
    return any(q is not None and q.special for r in recipe.rules for q in (r.weight, r.activation))


def slots(site: Site) -> tuple[str, ...]:
    """Names of a site's operands: `activation` and `weight`, numbered where they are alike."""
    roles = [o.role for o in site.operands]
    return tuple(r if roles.count(r) == 1 else f"{r}{i}" for i, r in enumerate(roles))


def stored(site: Site, setting: Setting) -> Iterator[tuple[str, Quantizer, tuple[int, ...]]]:
    """(name, quantizer, shape of its scales) of each operand that keeps something.

    Raises:
      RecipeError: an activation with another granularity than "tensor".
      SiteError: scales that would differ between the devices of a shard_map.
    """
    for i, (slot, quantizer) in enumerate(zip(slots(site), setting, strict=True)):
        if quantizer is None or quantizer.range not in STORED:
            continue
        operand, axis = site.operands[i], site.contracting(i)
        if operand.role == "activation" and quantizer.granularity.kind != "tensor":
            raise RecipeError(
                f"the activation of `{site.name}` keeps a range ({quantizer.range}) per "
                f"{quantizer.granularity}, which would fit one batch only. Use "
                f'Quantizer("{quantizer.format.name}", "tensor", range="{quantizer.range}").'
            )
        shared = quantizer.shared_axes(operand.shape, axis)
        kept = [d for d in range(len(operand.shape)) if d not in shared]
        if split := operand.split_over(kept):
            raise SiteError(
                f"`{site.name}` keeps a range per {quantizer.granularity}, and shard_map splits "
                f"these over {split}. Use granularity 'tensor' there."
            )
        yield slot, quantizer, quantizer.scale_shape(operand.shape, axis)


def view_of(
    site: Site, i: int, quantizer: Quantizer, x: jax.Array
) -> tuple[jax.Array, tuple[int, ...], Callable[[jax.Array], jax.Array], tuple[str, ...]]:
    """`state.blocked` of operand `i`, and the mesh axes over which its range is shared."""
    v, shared, back = state.blocked(quantizer, x, site.contracting(i))
    split = site.operands[i].split_over(range(x.ndim))
    return v, shared, back, tuple(sorted({*split, *_compat.varying_axes(v)}))


@dataclasses.dataclass(frozen=True)
class StatefulQuantizeAware(QuantizeAware):
    """Fake quantization with dynamic, stored and learned ranges, as a recipe says."""

    stateful = True
    travels = True

    def accept(
        self, sites: Sequence[Site], settings: Mapping[str, Any], learned: Any, state: Any
    ) -> None:
        names = dict.fromkeys((*learned, *state))
        given = {name: {**learned.get(name, {}), **state.get(name, {})} for name in names}
        for site in sites:
            for slot, quantizer, shape in stored(site, settings[site.name]):
                found = given.get(site.name, {}).get(slot)
                if not given:
                    raise RecipeError(_no_state(self.recipe, site, quantizer))
                key = {"learned": "step", "pact": "clip"}.get(quantizer.range, "low")
                want, got = (*site.stack, *shape), getattr((found or {}).get(key), "shape", None)
                if got != want:
                    raise RecipeError(_other_model(site, slot, quantizer, want, got, given))

    def apply(self, site, setting, bind, operands, learned, state):
        setting = setting.for_operands(operands)
        if isinstance(setting.product, Native):  # no range of such a site is stored
            return super().apply(site, setting, bind, operands, learned, state)
        rounded, new = [], dict(state or {})
        in_codes = setting.in_integers
        for i, (slot, x, quantizer) in enumerate(zip(slots(site), operands, setting, strict=True)):
            if quantizer is None or not quantizer.special or is_qtensor(x):
                rounded.append(rounded_operand(site, i, quantizer, x, in_codes))
                continue
            own = (learned or {}).get(slot)
            value, range_ = _rounded(site, i, quantizer, x, own, new.get(slot))
            new |= {} if range_ is None else {slot: range_}
            codes = _codes(site, i, quantizer, x, own, range_) if in_codes else None
            rounded.append(Rounded(value, codes))
        return run(site, setting, bind, rounded, learned), new or None


def _rounded(
    site: Site, i: int, quantizer: Quantizer, x: jax.Array, learned: Any, old: Any
) -> tuple[jax.Array, Any]:
    """(operand `i` rounded in its stored range, the new range or None)."""
    v, shared, back, sync = view_of(site, i, quantizer, x)
    fmt = quantizer.format
    if quantizer.range == "learned":
        numel = _sharing(site, i, v, learned["step"])
        return back(lsq(v, learned["step"], -fmt.min, fmt.max, numel)), None
    if quantizer.range == "pact":
        return back(pact(v, learned["clip"], fmt.max)), None
    if quantizer.range == "dorefa":
        rule = dorefa_weight if site.operands[i].role == "weight" else dorefa_activation
        return back(rule(v, fmt.max)), None
    new = old
    if quantizer.range == "ema":
        ends = state.ends_of(lax.stop_gradient(v), shared, quantizer.symmetric, sync)
        new = state.averaged(lax.stop_gradient(old), *ends, quantizer.momentum)
    return back(state.in_range(quantizer, v, new["low"], new["high"])), new


def _codes(
    site: Site, i: int, quantizer: Quantizer, x: jax.Array, learned: Any, kept: Any
) -> Codes:
    """The codes of what `_rounded` makes of operand `i` in its range."""
    x, learned, kept = lax.stop_gradient((x, learned, kept))
    v, _, _ = state.blocked(quantizer, x, site.contracting(i))
    grid, scale, zero = _grid(quantizer, v, learned, kept)
    return codes_from_grid(grid, scale, zero, quantizer.format)


def _grid(quantizer: Quantizer, v: jax.Array, learned: Any, kept: Any) -> tuple:
    """(numbers of the grid, scale, zero point or None) in a learned step or a stored range."""
    if learned is not None:
        fmt = quantizer.format
        return *lsq_codes(v, learned["step"], -fmt.min, fmt.max), None
    return state.codes_in_range(quantizer, v, kept["low"], kept["high"])


def packed_in_range(
    quantizer: Quantizer, x: jax.Array, axis: tuple[int, ...], learned: Any, kept: Any
) -> QTensor:
    """The QTensor of what a stored range (static) or a learned step rounds x to.

    Args:
      learned: `{"step": ...}` of `range="learned"`, else None.
      kept: `{"low": ..., "high": ...}` of `range="static"`, else None.
    """
    return _packed_in_range(x, learned, kept, quantizer, axis)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _packed_in_range(x, learned, kept, quantizer, axis):
    v, _, _ = state.blocked(quantizer, x, axis)
    blocks = layout.cut(x.shape, axis, quantizer.granularity, quantizer.indivisible)[0]
    fmt = quantizer.format
    codes, scale, zero = _grid(quantizer, v, learned, kept)
    codes, zero = fmt.to_codes(codes), None if zero is None else fmt.to_codes(zero)
    codes = codes if blocks is None else blocks.merge(codes, x.shape)
    return QTensor.from_codes(codes, scale, zero, format=fmt, dtype=x.dtype, blocks=blocks)


def _sharing(site: Site, i: int, v: jax.Array, step: jax.Array) -> int:
    """How many values share one step, on all devices together.

    JAX calls a replicated weight varying once it meets a varying activation, so that only where
    nothing is known of how an activation is split its type is asked.
    """
    operand = site.operands[i]
    axes = operand.split_over(range(len(operand.shape)))
    if operand.manual is None and operand.role == "activation":
        axes = tuple(_compat.varying_axes(v))
    return v.size // max(step.size, 1) * math.prod(lax.axis_size(name) for name in axes)


def _no_state(recipe: Recipe, site: Site, quantizer: Quantizer) -> str:
    return (
        f"recipe `{recipe.name}` keeps a range ({quantizer.range}) for `{site.name}`, and plain "
        "parameters do not carry it. Hold jaxcompress.quant_params(fn, recipe)(params, *inputs) "
        "where params was and wrap the optimizer with jaxcompress.quant_tx; or thread the state "
        "yourself with jaxcompress.quantize_aware_with_state."
    )


def _other_model(
    site: Site, slot: str, quantizer: Quantizer, want: Any, got: Any, given: Any
) -> str:
    found = f"shape {got}" if got is not None else f"none; it has {nearest(site.name, given)}"
    return (
        f"the state belongs to another model or recipe: the {slot} of `{site.name}` needs a range "
        f"({quantizer.range}) of shape {want}, found {found}. Make it anew with "
        "jaxcompress.calibrate or jaxcompress.quant_params for this function and recipe."
    )


def quantize_aware_with_state(
    fn: Callable,
    recipe: str | Recipe,
    *,
    argnums: ArgNums = 0,
    integer: str | bool = "auto",
    residuals: str = "int8",
) -> tuple[Callable, Callable]:
    """`quantize_aware` with its ranges as an explicit value: (init, apply).

    `init(*args) -> state` runs `fn` once in float, on arrays, and reads first ranges and step
    sizes from what flows through it (`jc.calibrate` does so over many batches).
    `apply(state, *args) -> (out, state)` computes with stored ranges; averaged ones are brought
    up to date first and returned. `state.learned` is differentiable, `state.statistics` is not.
    An array that two sites read has a range at each.

    Args:
      fn: a forward pass or a loss. A whole train step takes `jc.quant_params` instead.
      recipe: name of a recipe, or a `Recipe`; one without stored ranges has an empty state.
      argnums: position (or name) of the argument that holds the parameters, or several.
      integer, residuals: as in `quantize_aware`.

    Raises:
      RecipeError: as `quantize_aware`; or the state belongs to another model.
      SiteError: from `init`, if a site with a stored range was not reached.

    >>> from jaxcompress._quantize.recipe import Rule
    >>> recipe = Recipe([Rule("*", activation=Quantizer("int8", "tensor", range="ema"))])
    >>> init, apply = quantize_aware_with_state(lambda w, x: x @ w, recipe)
    >>> w, x = jnp.eye(2), jnp.array([[1.0, -4.0]])
    >>> out, state = apply(init(w, x), w, 2 * x)
    >>> state.statistics["ranges"]["arg0"]["activation"]["high"]
    Array([[4.04]], dtype=float32)

    References: Jacob et al. 2018, section 3.1 (averaged ranges); Esser et al. 2020 (learned).
    """
    from .calibrate import Calibration  # it observes for the transform above

    chosen = recipes.get(recipe)
    inner = Transformed(fn, StatefulQuantizeAware(chosen, integer, residuals), argnums)

    def init(*args, **kwargs) -> QuantState:
        calibration = Calibration(fn, chosen, argnums)
        calibration.add(args, kwargs)
        return calibration.state()

    def apply(state: QuantState, *args, **kwargs) -> tuple[Any, QuantState]:
        key = take_key(fn, inner.transform, kwargs)
        ranges = lax.stop_gradient(state.statistics["ranges"])
        out, ranges = inner.call(state.learned, ranges, args, kwargs, key)
        weight = jnp.zeros_like(state.statistics["weight"])
        return out, QuantState(state.learned, {"ranges": ranges, "weight": weight})

    return init, apply
