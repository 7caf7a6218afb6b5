# SPDX-License-Identifier: Apache-2.0
"""Quantization-aware functions: operands of the chosen sites are rounded to their formats."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .._core.patterns import matches, nearest
from .._core.sites import Site
from .._core.transform import ArgNums, Transform, transformed_function
from .._errors import FormatError, RecipeError, SiteError
from . import native, recipes
from .at_site import Setting, rounded_operand, run
from .backward import fits
from .integer import CHOICES, RESIDUALS, Spec, possible
from .integer_dot import operation_of
from .native import Native
from .quantizer import Quantizer
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
        settings = _share(sites, settings, rules)
        _agree(sites, settings, rules)
        for site in sites:
            if site.name in settings:
                _fits(site, settings[site.name])
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
                _reject_unused(rule, decided[i])
            elif not rule.optional:
                matched = [s for s in sites if rule.matches(s)]
                self._unmatched(rule, decided[i] or matched, sites, parameters)
        if not useful:
            raise RecipeError(
                f"recipe `{self.recipe.name}` found nothing to compress: no matmul, convolution "
                f"or embedding reads a parameter. Sites: {_listed(sites)}. Parameters: "
                f"{', '.join(f'`{p}`' for p in parameters[:5]) or '(none)'}. Does argnums name "
                "the argument that holds the parameters?"
            )
        # Raises if rules disagree in two functions that are differentiated.
        settings = self.choose(sites)
        if self.integer is True and not any(s.in_integers for s in settings.values()):
            raise RecipeError(
                f"integer=True, and recipe `{self.recipe.name}` has no product of integers: both "
                "operands need an integer format of up to 8 bits whose scales are not shared by "
                f'groups, as in "w8a8". Sites: {_listed(sites)}. Use integer="auto".'
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


def setting_of(site: Site, rule: Rule) -> Setting:
    """The quantizers of a site's operands under a rule."""
    out: list[Quantizer | None] = []
    for operand in site.operands:
        weight = operand.role == "weight" or (operand.constant and rule.frozen)
        quantizer = rule.weight if weight else rule.activation
        if quantizer is not None and site.op == "conv_general_dilated" and not weight:
            if quantizer.granularity.kind == "example":  # all but the batch, wherever it is
                quantizer = dataclasses.replace(quantizer, granularity="token")
        out.append(quantizer)
    return Setting(tuple(out), None if site.op == "gather" else rule.gradient)


def why_not(site: Site, rule: Rule) -> str:
    """Why a rule that matches a site leaves it alone; empty if it does not.

    Raises:
      SiteError: the site hides a matmul where it cannot be changed, or is owned already.
    """
    reads_data = any(o.role == "activation" and not o.constant for o in site.operands)
    if site.opaque:
        if rule.leaves_alone or not (site.weights and reads_data):
            return f"{site.op} on no parameter"
        raise SiteError(
            f"`{site.name}` ({site.op}, {site.source}) hides a matmul that reads "
            f"`{site.operands[site.weights[0]].path}`, and what it computes cannot be changed "
            f"from outside. Rewrite it with jax.lax operations, or leave it in float with "
            f'Rule("{site.name}", None).'
        )
    owned = any("quantize" in o.owners for o in site.operands)
    if not site.floating and not owned:
        return "operands are not real floating-point numbers"
    if site.op == "gather" and rule.gradient and rule.weight is rule.activation is None:
        return "a lookup has no backward matmul"
    constant = any(o.constant for o in site.operands)
    if not site.weights:
        if constant and reads_data:
            return "" if rule.frozen else "reads no parameter, only a constant"
        if constant:
            return "computed from constants only"
        return "" if rule.op == site.op else "product of two activations"
    if not reads_data and site.op != "gather":
        return "computed from parameters only: its result is stored"
    if not rule.leaves_alone and owned:
        raise SiteError(
            f"`{site.name}` is already quantized by another recipe, and rule "
            f"{rule.pattern!r} would quantize it again. Exclude it with "
            f'Rule("{site.name}", None), or merge the two recipes.'
        )
    return ""


def _share(
    sites: Sequence[Site], settings: dict[str, Setting], rules: dict[str, Rule]
) -> dict[str, Setting]:
    """Gives every other use of an array the weight format of a rule that is `shared`."""
    tables = {
        o.path: settings[s.name][i]
        for s in sites
        if s.name in rules and rules[s.name].shared
        for i, o in enumerate(s.operands)
        if o.role == "weight"
    }
    out = {}
    for site in sites:
        if site.name in settings:
            pairs = zip(site.operands, settings[site.name], strict=True)
            operands = tuple(
                tables.get(o.path, q) if o.role == "weight" and q is not None else q
                for o, q in pairs
            )
            out[site.name] = dataclasses.replace(settings[site.name], operands=operands)
    return out


def _agree(sites: Sequence[Site], settings: dict[str, Setting], rules: dict[str, Rule]) -> None:
    """One array, one format: raises where two rules give a weight different quantizers."""
    seen: dict[str, tuple[Site, Quantizer | None]] = {}
    for site in sites:
        if site.opaque or not site.floating:
            continue
        setting = settings.get(site.name, Setting((None,) * len(site.operands)))
        for operand, quantizer in zip(site.operands, setting, strict=True):
            if operand.role != "weight" or len(site.weights) == 2:
                continue
            first, other = seen.setdefault(operand.path, (site, quantizer))
            if other == quantizer:
                continue
            a, b = (describe(q) for q in (other, quantizer))
            raise RecipeError(
                f"two rules give `{operand.path}` two formats: {a} at `{first.name}` "
                f"({first.op}) and {b} at `{site.name}` ({site.op}). One array has one format: "
                "let one rule match both, or set shared=True on the rule that decides."
            )


def _fits(site: Site, setting: Setting) -> None:
    if setting.gradient is not None:
        fits(site, setting.gradient)
    for i, (operand, quantizer) in enumerate(zip(site.operands, setting, strict=True)):
        if quantizer is None:
            continue
        try:
            quantizer.check(operand.shape, site.contracting(i))
        except FormatError as e:
            raise SiteError(
                f"{describe(quantizer)} does not fit `{site.name}` ({operand.role} "
                f"{list(operand.shape)} of {site.op}): {e} Or leave the site alone with "
                f'Rule("{site.name}", None).'
            ) from None


def describe(quantizer: Quantizer | None) -> str:
    """`int4 per group:32`, `int8 per tensor, static`, or `float` for None."""
    if quantizer is None:
        return "float"
    remarks = [quantizer.range] * quantizer.special
    remarks += ["stochastic"] * (quantizer.rounding == "stochastic")
    return ", ".join([f"{quantizer.format.name} per {quantizer.granularity}", *remarks])


def _reject_unused(rule: Rule, sites: Sequence[Site]) -> None:
    """Raises where a rule has a gradient and decides lookups only, which have no use for it."""
    sites = [s for s in sites if not why_not(s, rule)]
    if rule.gradient is not None and all(s.op == "gather" for s in sites):
        raise RecipeError(
            f"rule {rule.pattern!r} has gradient={rule.gradient.format.name!r}, and all that it "
            f"decides are lookups in a table ({_listed(sites)}), which have no backward matmul: "
            "rows of the gradient are added up. Leave gradient= out of it."
        )


def _listed(sites: Sequence[Site]) -> str:
    return (
        ", ".join(f"`{s.name}`" for s in sites[:5]) + (" ..." if len(sites) > 5 else "") or "none"
    )


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
