# SPDX-License-Identifier: Apache-2.0
"""The named recipes.

Each touches the matmuls and convolutions that read a parameter and stores embedding tables in
int8 per row (also when the table is tied to the head). Norms, biases, products of two
activations and parameters that no site reads stay in float and are listed in the report.
`w8a8-static` and `fpga-w6a6-static` have one calibrated range per activation; `lsq-w4a4` learns
one step size per weight and activation (LSQ keeps the first and the last layer in 8 bits: that is
left to rules). They keep state: `jc.quant_params` or `jc.quantize_aware_with_state`.
Where a group does not fit, the scale is per channel instead, and the report says so.
"""

from __future__ import annotations

import types
from collections.abc import Mapping

from .._core.patterns import nearest
from .._errors import RecipeError
from .granularity import per_group
from .quantizer import Quantizer
from .recipe import Recipe, Rule


def _named(name: str, weight: Quantizer, activation: Quantizer | None = None) -> Recipe:
    table = Rule("*", Quantizer("int8", "channel"), op="gather", shared=True, optional=True)
    rest = Rule("*", weight, activation, indivisible="channel", optional=True)
    return Recipe([table, rest], name)


def _group(bits: int, n: int) -> Quantizer:
    return Quantizer(f"int{bits}", per_group(n))


_INT8, _INT8_TOKEN = Quantizer("int8", "channel"), Quantizer("int8", "token")
_INT8_STATIC = Quantizer("int8", "tensor", range="static")
_LSQ4 = Quantizer("int4", "tensor", range="learned")
_FP8, _FP8_TOKEN = (Quantizer("float8_e4m3fn", g) for g in ("channel", "token"))
_FPGA = Quantizer("int6", "tensor", power_of_two="ceil")  # a shift, and no zero point
_FPGA_STATIC = Quantizer("int6", "tensor", range="static", power_of_two="ceil")

RECIPES: Mapping[str, Recipe] = types.MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            _named("w8a8", _INT8, _INT8_TOKEN),
            _named("w8a16", _INT8),
            _named("w4a16-g32", _group(4, 32)),
            _named("w4a16-g128", _group(4, 128)),
            _named("w4a8-g32", _group(4, 32), _INT8_TOKEN),
            _named("w2a16-g32", _group(2, 32)),
            _named("fp8", _FP8, _FP8_TOKEN),
            _named("mxfp8", Quantizer("mxfp8_e4m3"), Quantizer("mxfp8_e4m3")),
            _named("mxfp6", Quantizer("mxfp6_e2m3"), Quantizer("mxfp6_e2m3")),
            _named("mxfp4", Quantizer("mxfp4"), Quantizer("mxfp4")),
            _named("nvfp4", Quantizer("nvfp4"), Quantizer("nvfp4")),
            _named("nf4", Quantizer("nf4", per_group(64))),  # QLoRA's block
            _named("ternary", Quantizer("ternary", "channel"), _INT8_TOKEN),  # BitNet b1.58
            _named("binary", Quantizer("binary", "channel")),  # binary weights of XNOR-Net
            _named("fpga-w6a6", _FPGA, _FPGA),
            _named("w8a8-static", _INT8, _INT8_STATIC),
            _named("fpga-w6a6-static", _FPGA, _FPGA_STATIC),
            _named("lsq-w4a4", _LSQ4, _LSQ4),
        )
    }
)


def get(recipe: str | Recipe) -> Recipe:
    """A recipe by name; a `Recipe` is returned as it is.

    >>> get("w8a8").rules[1].activation.granularity.kind
    'token'

    Raises:
      RecipeError: unknown name; the nearest names and all of them are listed.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise RecipeError(f"expected the name of a recipe or a Recipe, found {recipe!r}.")
    if recipe not in RECIPES:
        raise RecipeError(
            f"unknown recipe {recipe!r}. Nearest: {nearest(recipe, RECIPES, 3)}. "
            f"All: {', '.join(RECIPES)}."
        )
    return RECIPES[recipe]
