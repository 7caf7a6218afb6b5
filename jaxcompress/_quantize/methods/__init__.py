# SPDX-License-Identifier: Apache-2.0
"""Methods of `jc.quantize`, one file each, and the table of their names."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence

from ..._core.patterns import nearest
from ..._errors import RecipeError
from ._awq import awq as awq
from ._bias_correction import bias_correction as bias_correction
from ._equalization import equalization as equalization
from ._fold_norm import fold_norm as fold_norm
from ._gptq import gptq as gptq
from ._method import Layer as Layer
from ._method import Method as Method
from ._mse import mse as mse
from ._rtn import rtn as rtn
from ._smoothquant import smoothquant as smoothquant
from ._sparsegpt import sparsegpt as sparsegpt

METHODS: Mapping[str, Callable[[], Method]] = types.MappingProxyType(
    {
        made.__name__: made
        for made in (
            rtn,
            mse,
            gptq,
            sparsegpt,
            awq,
            smoothquant,
            equalization,
            bias_correction,
            fold_norm,
        )
    }
)


def get(method: str | Method) -> Method:
    """A method by name, with its settings at their defaults; a `Method` is returned as it is.

    >>> get("rtn").needs
    ()

    Raises:
      RecipeError: unknown name; the nearest names and all of them are listed.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise RecipeError(f"expected the name of a method or a Method, found {method!r}.")
    if method not in METHODS:
        raise RecipeError(
            f"unknown method {method!r}. Nearest: {nearest(method, METHODS, 3)}. "
            f"All: {', '.join(METHODS)}."
        )
    return METHODS[method]()


def chain(method: str | Method | Sequence[str | Method]) -> tuple[Method, ...]:
    """The steps of a method or of several, of which at most one rounds beside `awq`.

    Raises:
      RecipeError: an unknown name, an empty list, or two methods that both round.
    """
    if isinstance(method, Sequence) and not isinstance(method, str):
        steps = tuple(map(get, method))
    else:
        steps = (get(method),)
    if not steps:
        raise RecipeError("method=[] names no method. Use 'rtn', which rounds to nearest.")
    rounds = [m.name for m in steps if m.round is not None and m.prepare is None]
    if len(rounds) > 1:
        raise RecipeError(
            f"method={[m.name for m in steps]}: {' and '.join(rounds)} both round the "
            "weights. Keep one of them; what prepares or corrects may stand beside it."
        )
    return steps
