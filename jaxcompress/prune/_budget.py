# SPDX-License-Identifier: Apache-2.0
"""A limit for the small function that `jaxcompress.prune.shrink` makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from .._errors import RecipeError

Measure = Callable[[Any, Any], float]


@dataclasses.dataclass(frozen=True)
class Budget:
    """A limit for the small function; see `budget`."""

    bytes: int | float | None
    flops: int | float | None
    latency: tuple[Measure, float] | None
    pattern: str | tuple[str, ...]
    least: float


def budget(
    *,
    bytes: int | float | None = None,
    flops: int | float | None = None,
    latency: tuple[Measure, float] | None = None,
    pattern: str | tuple[str, ...] = "*",
    least: float = 0.05,
) -> Budget:
    """A limit that all groups share, for `keep=` of `jaxcompress.prune.shrink`.

    The indices of all groups are compared by their scores, each group's divided by their mean, and
    the lowest leave until the limit is met.

    Args:
      bytes: of the parameters; a float up to 1 is a fraction of the original.
      flops: multiplications and additions of the matmuls and convolutions of one call; a float up
        to 1 is a fraction.
      latency: (measure, limit): `measure(fn, params) -> float` in any unit, called about ten times.
      pattern: names of the groups that may lose indices. Layers of a scan, and what `argmax` or
        `top_k` choose among, only if named.
      least: the fraction of every group that stays.

    Raises:
      RecipeError: not exactly one limit is given, or it is out of range.

    >>> budget(flops=0.25).flops
    0.25
    """
    given = [x for x in (bytes, flops, latency) if x is not None]
    if len(given) != 1:
        raise RecipeError(f"budget: give one of bytes, flops and latency; got {len(given)}.")
    for name, x in (("bytes", bytes), ("flops", flops)):
        number = isinstance(x, (int, float)) and not isinstance(x, bool)
        if x is not None and not (number and (0 < x <= 1 if isinstance(x, float) else x >= 1)):
            raise RecipeError(
                f"budget({name}={x!r}): expected a whole number from 1, or a fraction in (0, 1]."
            )
    if latency is not None and not (
        isinstance(latency, tuple) and len(latency) == 2 and callable(latency[0]) and latency[1] > 0
    ):
        raise RecipeError("budget(latency=...): expected (measure, limit), a function and a limit.")
    if not 0 < least <= 1:
        raise RecipeError(f"budget(least={least!r}): expected a fraction in (0, 1].")
    return Budget(bytes, flops, latency, pattern, least)
