# SPDX-License-Identifier: Apache-2.0
"""Curves of numbers over steps as SVG text, which stands in a page without anything else."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

_WIDE, _HIGH, _LEFT, _TOP, _BELOW = 680, 220, 64, 24, 36  # pixels
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377")
_LOGARITHMIC = 10.0  # from this ratio of largest to smallest on


def curves(title: str, series: Mapping[str, Sequence[Sequence[float]]], unit: str = "step") -> str:
    """A figure with one line for each series; logarithmic where the numbers differ much.

    Args:
      title: above it, with the unit of the numbers.
      series: by name, points (x, y) with x ascending; what is not finite is left out.
      unit: of x, below the axis.

    >>> curves("loss", {"training": [(1, 2.0), (2, 1.0)]}).count("<polyline")
    1
    """
    kept = {
        name: [(x, y) for x, y in points if y is not None and math.isfinite(y)]
        for name, points in series.items()
    }
    every = [p for points in kept.values() for p in points]
    if not every:
        return ""
    xs, ys = zip(*every, strict=True)
    log = min(ys) > 0 and max(ys) / min(ys) >= _LOGARITHMIC
    scale = math.log10 if log else float
    low, high = scale(min(ys)), scale(max(ys))
    room = 0.05 * (high - low) or 0.5
    low, high = low - room, high + room
    first, last = min(xs), max(max(xs), min(xs) + 1)

    def across(x: float) -> float:
        return _LEFT + _WIDE * (x - first) / (last - first)

    def up(y: float) -> float:
        return _TOP + _HIGH * (1 - (scale(y) - low) / (high - low))

    lines = []
    for y in _decades(10**low, 10**high) if log else ticks(low, high):
        at = f"{up(y):.1f}"
        lines.append(
            f'<line x1="{_LEFT}" x2="{_LEFT + _WIDE}" y1="{at}" y2="{at}" stroke="#ddd"/>'
            f'<text x="{_LEFT - 8}" y="{up(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>'
        )
    for x in ticks(first, last):
        lines.append(
            f'<text x="{across(x):.1f}" y="{_TOP + _HIGH + 16}" text-anchor="middle">{x:,g}</text>'
        )
    lines.append(
        f'<text x="{_LEFT + _WIDE / 2}" y="{_TOP + _HIGH + 32}" text-anchor="middle">'
        f"{html.escape(unit)}</text>"
    )
    for k, (name, points) in enumerate(kept.items()):
        colour, at = _COLOURS[k % len(_COLOURS)], _LEFT + 220 * k
        drawn = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        lines.append(
            f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
            f'<rect x="{at}" y="4" width="10" height="10" fill="{colour}"/>'
            f'<text x="{at + 14}" y="13">{html.escape(name)}</text>'
        )
    width, height = _LEFT + _WIDE + 20, _TOP + _HIGH + _BELOW
    style = "font: 12px sans-serif; max-width: 100%"
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}" style="{style}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(lines)}</svg>'
    return f"<h2>{html.escape(title)}</h2>{svg}"


def thinned(values: Sequence[float], most: int = 200) -> list[tuple[int, float]]:
    """(last step, mean) of at most so many runs of consecutive values.

    >>> thinned([4.0, 2.0, 1.0, 0.0], most=2)
    [(2, 3.0), (4, 0.5)]
    """
    size = max(1, math.ceil(len(values) / most))
    runs = [values[i : i + size] for i in range(0, len(values), size)]
    ends = [min((i + 1) * size, len(values)) for i in range(len(runs))]
    return [(end, sum(run) / len(run)) for end, run in zip(ends, runs, strict=True)]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high, some `about` of them.

    >>> ticks(0, 10)
    [0, 2, 4, 6, 8, 10]
    """
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    count = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [int(n * step) if step >= 1 else n * step for n in count]


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from low to high; only the powers if they span much."""
    bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits = (1, 2, 5) if top - bottom <= 4 else (1,)
    found = [d * 10.0**n for n in range(bottom, top + 1) for d in digits]
    return [y for y in found if low <= y <= high]
