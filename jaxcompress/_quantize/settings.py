# SPDX-License-Identifier: Apache-2.0
"""The settings of a `Quantizer`: which go together, and what stands for those not given."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .. import formats
from .._errors import FormatError, RecipeError
from ..formats import Format
from ..formats._rounding import ROUNDINGS
from . import granularity, ranges
from .granularity import per_group

if TYPE_CHECKING:
    from .quantizer import Quantizer

CONVENTIONS = ("max", "half", "signed")
POWERS = (None, "ceil", "round", "floor")

# Ranges that are stored between calls, and those that `state.py` and the learned rules compute.
STORED = ("static", "ema", "learned", "pact")
SPECIAL = (*STORED, "dorefa")
# What stored and learned ranges do not look at, with its default.
_FOUND_ONLY = {
    "rounding": "half_even",
    "convention": "max",
    "power_of_two": None,
    "range_value": None,
}
OBSERVERS = ("absmax", "minmax", "percentile", "mse", "kl")


def resolved(q: Quantizer) -> dict[str, Any]:
    """Returns the fields of a quantizer that are not as they were given.

    Raises:
        FormatError: if the format is unknown or does not have what is asked.
        RecipeError: if another setting is unknown, or two disagree.
    """
    fmt = formats.get(q.format)
    return _special(q, fmt) if q.range in SPECIAL else _dynamic(q, fmt)


def _dynamic(q: Quantizer, fmt: Format) -> dict[str, Any]:
    """Settings of a range that is found from the values in each call."""
    symmetric, rng = q.symmetric, q.range
    if q.observer is not None:
        raise RecipeError(
            f"observer={q.observer!r} goes with range='static' or 'ema', not {rng!r}."
        )
    _check_choices(q)
    if symmetric is None:
        symmetric = (rng or fmt.default_range) in ranges.SYMMETRIC or (
            rng in ranges.EITHER and fmt.default_range != "minmax"
        )
    if rng is None:
        rng = fmt.default_range if symmetric else "minmax"
        rng = "absmax" if symmetric and rng == "minmax" else rng
    if rng in ranges.SYMMETRIC and not symmetric or rng == "minmax" and symmetric:
        raise RecipeError(
            f"range={rng!r} and symmetric={symmetric} disagree: "
            "'minmax' is not symmetric, 'percentile' and 'mse' may be either, the others "
            "are. Give one of the two."
        )
    if not symmetric and not fmt.affine:
        raise FormatError(
            f"{fmt.name} takes no zero point, so it cannot have range={rng!r} with "
            "symmetric=False. Use 'absmax'."
        )
    ranges.check(fmt, rng, symmetric, q.convention, q.power_of_two)
    value = ranges.DEFAULT_VALUE.get(rng) if q.range_value is None else q.range_value
    low, high = {"percentile": (50, 100)}.get(rng, (0, math.inf))
    if value is not None and (rng not in ("percentile", "rms", "fixed") or not low < value <= high):
        raise RecipeError(
            f"range={rng!r} got range_value={value!r}: 'percentile' takes a number above 50 "
            "up to 100, 'rms' and 'fixed' a positive one, others take none."
        )
    shared = q.granularity
    if shared is None:
        shared = "channel" if fmt.block is None else per_group(fmt.block)
    if rng == "fixed" and fmt.block is None:
        shared = "tensor"
    return {
        "format": fmt,
        "granularity": granularity.get(shared),
        "range": rng,
        "symmetric": bool(symmetric),
        "range_value": value,
    }


def _check_choices(q: Quantizer) -> None:
    for name, choices in (
        ("range", (None, *ranges.RANGES, *SPECIAL)),
        ("indivisible", ("error", "pad", "channel")),
        ("rounding", ROUNDINGS),
        ("convention", CONVENTIONS),
        ("power_of_two", POWERS),
    ):
        if getattr(q, name) not in choices:
            raise RecipeError(
                f"There is no {name}={getattr(q, name)!r}. "
                f"Available: {', '.join(repr(c) for c in choices if c is not None)}."
            )


def _special(q: Quantizer, fmt: Format) -> dict[str, Any]:
    """Settings of a range that is stored or learned."""
    _check_choices(q)
    for name, default in _FOUND_ONLY.items():
        if name == "power_of_two" and q.range in ("static", "ema"):
            continue
        if getattr(q, name) != default:
            raise RecipeError(
                f"{name}={getattr(q, name)!r} is for ranges that are found in each call: "
                f"range={q.range!r} does not look at it. Leave it out."
            )
    if fmt.block is not None:
        raise FormatError(
            f"{fmt.name} finds the scales of its blocks in each call, so it cannot have "
            f"range={q.range!r}. Use 'absmax'."
        )
    fits = {
        "learned": isinstance(fmt, formats.Integer),
        "pact": isinstance(fmt, formats.Integer) and fmt.min == 0,
        "dorefa": isinstance(fmt, formats.Integer) and fmt.min == 0,
    }
    if not fits.get(q.range, True):
        kind = "integer" if q.range == "learned" else "unsigned integer"
        raise FormatError(f"range={q.range!r} is for {kind} formats, found {fmt.name}.")
    if q.range == "learned" and fmt.min < 0:
        fmt = formats.integer(int(fmt.bits), narrow=False)
    averaged = q.range in ("static", "ema")
    symmetric = q.symmetric
    if symmetric is None:
        symmetric = not averaged or (fmt.min < 0 and q.observer != "minmax")
    observer = q.observer or ("absmax" if symmetric else "minmax")
    if observer not in OBSERVERS:
        raise RecipeError(f"There is no observer {observer!r}. Available: {OBSERVERS}.")
    if not averaged and (q.observer is not None or not symmetric):
        raise RecipeError(f"range={q.range!r} takes no observer and is symmetric.")
    if (observer == "minmax") == symmetric:
        raise RecipeError(
            f"observer={observer!r} and symmetric={symmetric} disagree: only 'minmax' is "
            "not symmetric."
        )
    if q.range == "ema" and observer not in ("absmax", "minmax"):
        raise RecipeError(
            f"range='ema' averages 'absmax' or 'minmax', not {observer!r}: a histogram needs "
            "range='static' and jaxcompress.calibrate."
        )
    if not symmetric and not fmt.affine:
        raise FormatError(
            f"{fmt.name} takes no zero point, so it cannot have observer='minmax'. Use 'absmax'."
        )
    if not 0 <= q.momentum < 1:
        raise RecipeError(f"momentum={q.momentum!r}: expected 0 <= momentum < 1.")
    return {
        "format": fmt,
        "granularity": granularity.get(q.granularity or "channel"),
        "symmetric": symmetric,
        "observer": observer if averaged else None,
    }
