# SPDX-License-Identifier: Apache-2.0
"""What the rules of a recipe decide at the sites of a function, and what they may not decide."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .._core.sites import Site
from .._errors import FormatError, RecipeError, SiteError
from .at_site import Setting
from .backward import fits
from .quantizer import Quantizer
from .recipe import Rule


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


def share(
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


def agree(sites: Sequence[Site], settings: dict[str, Setting], rules: dict[str, Rule]) -> None:
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


def check_sizes(site: Site, setting: Setting) -> None:
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


def reject_unused(rule: Rule, sites: Sequence[Site]) -> None:
    """Raises where a rule has a gradient and decides lookups only, which have no use for it."""
    sites = [s for s in sites if not why_not(s, rule)]
    if rule.gradient is not None and all(s.op == "gather" for s in sites):
        raise RecipeError(
            f"rule {rule.pattern!r} has gradient={rule.gradient.format.name!r}, and all that it "
            f"decides are lookups in a table ({listed(sites)}), which have no backward matmul: "
            "rows of the gradient are added up. Leave gradient= out of it."
        )


def listed(sites: Sequence[Site]) -> str:
    return (
        ", ".join(f"`{s.name}`" for s in sites[:5]) + (" ..." if len(sites) > 5 else "") or "none"
    )
