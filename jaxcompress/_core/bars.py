# SPDX-License-Identifier: Apache-2.0
"""Bars of numbers by name as SVG text, which stands in a page of HTML without anything else."""

from __future__ import annotations

import html
from collections.abc import Sequence

_ROW, _LABEL, _WIDE = 22, 260, 420  # pixels
_COLOURS = ("#4477aa", "#ee6677")


def bars(
    title: str,
    series: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float]]],
    spec: str = ",.0f",
) -> str:
    """A figure with a bar for each name and series.

    Args:
      title: above it, with the unit.
      series: names of the series, at most two.
      rows: (name, a number for each series); what is not finite or below 0 has no bar.
      spec: how the numbers beside the bars are formatted.

    >>> bars("bytes", ["stored"], [("up", [128.0])]).count("<rect")
    2
    """
    most = max((x for _, xs in rows for x in xs if 0 < x < float("inf")), default=1.0)
    thick = _ROW - 8
    part = thick / max(len(series), 1)
    lines = []
    for k, name in enumerate(series):
        x = _LABEL + 120 * k
        lines.append(f'<rect x="{x}" y="2" width="10" height="10" fill="{_COLOURS[k]}"/>')
        lines.append(f'<text x="{x + 14}" y="11">{html.escape(name)}</text>')
    for i, (name, numbers) in enumerate(rows):
        y = _ROW * (i + 1)
        label = name if len(name) <= 40 else f"...{name[-37:]}"
        lines.append(
            f'<text x="{_LABEL - 8}" y="{y + thick - 3}" text-anchor="end">{html.escape(label)}'
            f"<title>{html.escape(name)}</title></text>"
        )
        for k, number in enumerate(numbers):
            shown = number if 0 < number < float("inf") else 0.0
            width = _WIDE * shown / most
            lines.append(
                f'<rect x="{_LABEL}" y="{y + k * part:.1f}" width="{width:.1f}" '
                f'height="{part - 1:.1f}" fill="{_COLOURS[k]}"/>'
            )
        text = ", ".join(format(x, spec) for x in numbers if x == x)
        end = max((x for x in numbers if 0 < x < float("inf")), default=0.0)
        at = _LABEL + _WIDE * end / most + 6
        lines.append(f'<text x="{at:.1f}" y="{y + thick - 3}">{text}</text>')
    width, height = _LABEL + _WIDE + 160, _ROW * (len(rows) + 1) + 6
    style = "font: 12px sans-serif; max-width: 100%"
    size = f'width="{width}" height="{height}" style="{style}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(lines)}</svg>'
    return f"<h2>{html.escape(title)}</h2>{svg}"
