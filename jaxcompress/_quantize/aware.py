# SPDX-License-Identifier: Apache-2.0
"""Quantization-aware functions: operands of the chosen sites are rounded to their formats."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .._core.patterns import matches, nearest
from .._core.sites import Site
from .._core.transform import ArgNums, Transform, transformed_function
from .._errors import RecipeError
from . import native, recipes
from .at_site import Setting, rounded_operand, run
from .decisions import agree, check_sizes, listed, reject_unused, setting_of, share, why_not
from .integer import CHOICES, RESIDUALS, Spec, possible
from .integer_dot import operation_of
from .native import Native
from .recipe import Recipe, Rule
from .where_integer import lay_out, pays


@dataclasses.dataclass(frozen=True)
class QuantizeAware(Transform):
    """Fake quantization with straight-through gradients, as a recipe says."""

    recipe: Recipe
    integer: str | bool = "auto"
    residuals: str = "int8"

    def __post_init__(self):
        for name, choices in (("integer", CHOICES), ("residuals", RESIDUALS)):
            if (value := getattr(self, name)) not in choices:
                raise RecipeError(f"{name}={value!r}: expected one of {choices}.")

    kind = "quantize"
    takes_packed = True
    keyword = "quantize_key"

    @property
    def random(self) -> bool:  # type: ignore[override]
        return any(r.gradient and r.gradient.rounding == "stochastic" for r in self.recipe.rules)

    def draws(self, setting: Setting) -> bool:
        return setting.gradient is not None and setting.gradient.rounding == "stochastic"

    def choose(self, sites: Sequence[Site]) -> Mapping[str, Setting]:
        settings: dict[str, Setting] = {}
        rules: dict[str, Rule] = {}
        for site in sites:
            found = self.recipe.rule_for(site)
            if found is None or found[1].leaves_alone or why_not(site, found[1]):
                continue
            rules[site.name] = found[1]
            settings[site.name] = setting_of(site, found[1])
        settings = share(sites, settings, rules)
        agree(sites, settings, rules)
        for site in sites:
            if site.name in settings:
                check_sizes(site, settings[site.name])
        named = {site.name: site for site in sites}
        return {
            name: dataclasses.replace(s, product=self.product(named[name], s))
            for name, s in settings.items()
            if s.changes
        }

    def product(self, site: Site, setting: Setting) -> Spec | Native | None:
        """How the operation of a site is computed; None if it is as it was written."""
        op, params = operation_of(site), tuple(sorted(site.params.items()))
        if op is None or not site.floating:
            return None
        if self.integer is not False:
            if setting.gradient is None and (small := native.possible(site, setting.operands)):
                return small
            if possible(op, site, setting.operands):
                affine = any(q is not None and not q.symmetric for q in setting.operands)
                if self.integer is True or pays(op, site, affine):
                    return Spec(op, params, True, self.residuals)
        if not lay_out(op, site):
            return None
        floats = Spec(op, params, False)
        if self.integer is False or setting.gradient is not None:
            return floats
        return native.possible_in_groups(site, setting.operands, floats) or floats

    def check(self, sites: Sequence[Site], parameters: Sequence[str]) -> None:
        if not self.recipe.rules:
            return
        found = [self.recipe.rule_for(site) for site in sites]
        decided = {i: [] for i in range(len(self.recipe.rules))}
        for site, rule in zip(sites, found, strict=True):
            if rule is not None:
                decided[rule[0]].append(site)
        useful = False
        for i, rule in enumerate(self.recipe.rules):
            if any(rule.leaves_alone or not why_not(s, rule) for s in decided[i]):
                useful = True
                reject_unused(rule, decided[i])
            elif not rule.optional:
                matched = [s for s in sites if rule.matches(s)]
                self._unmatched(rule, decided[i] or matched, sites, parameters)
        if not useful:
            raise RecipeError(
                f"recipe `{self.recipe.name}` found nothing to compress: no matmul, convolution "
                f"or embedding reads a parameter. Sites: {listed(sites)}. Parameters: "
                f"{', '.join(f'`{p}`' for p in parameters[:5]) or '(none)'}. Does argnums name "
                "the argument that holds the parameters?"
            )
        # Raises if rules disagree in two functions that are differentiated.
        settings = self.choose(sites)
        if self.integer is True and not any(s.in_integers for s in settings.values()):
            raise RecipeError(
                f"integer=True, and recipe `{self.recipe.name}` has no product of integers: both "
                "operands need an integer format of up to 8 bits whose scales are not shared by "
                'groups, as in "w8a8", and a convolution no batch groups. '
                f'Sites: {listed(sites)}. Use integer="auto".'
            )

    def _unmatched(
        self, rule: Rule, matched: Sequence[Site], sites: Sequence[Site], parameters: Sequence[str]
    ) -> None:
        """Raises: says why a rule that must match did not."""
        where = "".join(f", {k}={getattr(rule, k)!r}" for k in ("op", "source") if getattr(rule, k))
        head = f"rule {rule.pattern!r}{where} matches nothing that can be compressed"
        named = [p for p in parameters if matches(rule.pattern, p)]
        if rule.leaves_alone and (matched or (named and not where)):
            return  # it names what stays in float anyway: a norm, a bias, an attention score
        if matched:
            site = matched[0]
            first = self.recipe.rule_for(site)
            assert first is not None
            if first[1] is not rule:
                raise RecipeError(
                    f"{head}: `{site.name}` is decided by the earlier rule {first[1].pattern!r}. "
                    "The first rule that matches decides: put the narrower one in front."
                )
            why = why_not(site, rule)
            raise RecipeError(f"{head}: `{site.name}` ({site.op}) is left alone: {why}.")
        if named and not where:
            raise RecipeError(
                f"{head}: it names the parameter `{named[0]}`, which no matmul, convolution or "
                "embedding reads (norms, biases and integers stay as they are). Remove the rule."
            )
        raise RecipeError(
            f"{head}. Nearest sites: {nearest(rule.pattern, [s.name for s in sites])}. "
            "jaxcompress.sites(fn)(*args) lists all of them."
        )

    def apply(
        self, site: Site, setting: Setting, bind: Callable, operands: list, learned, state
    ) -> tuple[Any, Any]:
        setting = setting.for_operands(operands)
        if isinstance(setting.product, Native):
            return native.apply(setting.product, site, bind, operands, setting.operands), None
        rounded = [
            rounded_operand(site, i, q, x, setting.in_integers)
            for i, (x, q) in enumerate(zip(operands, setting, strict=True))
        ]
        return run(site, setting, bind, rounded, learned), None


def quantize_aware(
    fn: Callable,
    recipe: str | Recipe,
    *,
    argnums: ArgNums = 0,
    integer: str | bool = "auto",
    residuals: str = "int8",
) -> Callable:
    """Returns `fn` with the operands of its matmuls, convolutions and embeddings quantized.

    At every chosen site x becomes q(x), the nearest value of its format, and the gradient passes
    straight through: d q(x) = dx. Everything else, control flow and user-defined derivatives
    included, is as before, and the result composes with jit, grad, jvp, vmap, scan, remat and
    shard_map. What `fn` differentiates inside (a train step, a gradient penalty) is quantized
    before it is differentiated.

    A recipe with stored or learned ranges needs them: a `jc.QuantParams` where the parameters
    were. What differentiates it gets new statistics along with the gradients (`jc.quant_tx`).
    Without a derivative (evaluation) an averaged range follows the batch as in training, but what
    it becomes is dropped: the statistics in `QuantParams` stay as they are. A rule with
    `range="static"` in place of `"ema"` reads the same statistics and does not follow. Outside
    of what it differentiates a step with `QuantParams` is left alone.

    A rule with `gradient=` also computes the two backward products of its sites in few bits. Such
    a site is differentiable in reverse mode only: forward mode (`jax.jvp`, `jax.jacfwd`) raises
    JAX's error about a `custom_vjp`, and works where no rule has a gradient. If one is rounded
    with `rounding="stochastic"`, the result takes the extra keyword `quantize_key=`, a random key
    that should be new at every step; it is needed where something is differentiated.

    Where both operands of a matmul or convolution are integers of up to 8 bits, the forward pass
    may be a product of integers with sums in int32, the one that is served: the same numbers up
    to the rounding of float sums (and of operands that are not float32). Derivatives are the
    same, in forward and reverse mode; what is kept for the backward pass are int8 codes. By
    default this is chosen where it is known to be faster: on CPUs, by the shape of the product.

    Steps that change Flax NNX objects in place work too: what they differentiate is transformed.
    A model of `jc.quant_params` keeps the state of such a step.

    Args:
      fn: a forward pass, a loss, or a function that calls `jax.grad` and its relatives.
      recipe: name of a recipe, or a `Recipe`.
      argnums: position (or name) of the argument that holds the parameters, or several.
      integer: where products are computed in integers: "auto", where it is faster; True, wherever
        formats and scales allow it; False, nowhere.
      residuals: what such products keep: "int8", codes, which can be differentiated once (a second
        derivative raises); or "float", rounded values, which can be any number of times.

    Returns:
      A function with the signature of `fn`, and `quantize_key=` if gradients are rounded at random.

    Raises:
      RecipeError: unknown recipe or option, or (when called) a rule that matches nothing, two
        rules that disagree on one array, a recipe with stored ranges around plain parameters,
        `quantize_key` missing or given for nothing, or `integer=True` and no such product.
      SiteError: a matched operation cannot be handled; a group that does not divide; a second
        derivative through int8 codes.

    >>> import jax, jax.numpy as jnp
    >>> loss = lambda w, x: ((x @ w) ** 2).sum()
    >>> w, x = jnp.array([[0.3], [1.0]]), jnp.array([[2.0, 1.0]])
    >>> jax.grad(quantize_aware(loss, "w8a8"))(w, x).shape
    (2, 1)

    References: Jacob et al. 2018 (fake quantization); Bengio et al. 2013 (straight-through).
    """
    from .stateful import StatefulQuantizeAware, needs_state  # they build on this module

    chosen = recipes.get(recipe)
    kind = StatefulQuantizeAware if needs_state(chosen) else QuantizeAware
    return transformed_function(fn, kind(chosen, integer, residuals), argnums)
