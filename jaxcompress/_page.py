# SPDX-License-Identifier: Apache-2.0
"""What a result says in a few lines, and the page of HTML that shows all of it."""

from __future__ import annotations

import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ._core.curves import curves
from ._core.tabular import html_table, write_page
from ._quantize.report import Report, Row
from ._result import ONNX, QONNX

COLUMNS = ("", "before", "after", "change")


def report_of(result: Mapping[str, Any]) -> Report:
    """The table of weights and sites in a result."""
    rows = tuple(Row(**row) for row in result["rows"])
    return Report(result["task"], result["recipe"]["name"], rows)


def summary(result: Mapping[str, Any]) -> list[list[str]]:
    """What compression costs and brings, in rows of `COLUMNS`."""
    rows = []
    for metric, old in result["metrics"]["before"].items():
        new = result["metrics"]["after"].get(metric)
        interval = result["comparison"]["accuracy"] if metric == "accuracy" else None
        rows.append([metric, _number(old), _number(new), _change(old, new, interval)])
    agreement = result["comparison"]["agreement"]
    if agreement is not None:
        rows.append(["same prediction", "", f"{agreement:.2%}", ""])
    for what, name in (("parameters", "parameters, bytes"), ("files", "files, bytes")):
        old, new = (result["bytes"][what][when] for when in ("before", "after"))
        rows.append([name, f"{old:,}", f"{new:,}", f"{old / max(new, 1):.2f} times smaller"])
    step = result["step_ms"]
    old, new, ratio = (step[key] for key in ("before", "after", "ratio"))
    times = f"{ratio:.2f} times as long"
    rows.append([f"{step['of']} step, ms", f"{old:.2f}", f"{new:.2f}", times])
    rows += _deployed(result.get(ONNX))
    if QONNX in result:
        size, off = (result[QONNX][name] for name in ("bytes", "largest_difference"))
        rows.append(["qonnx, bytes", "", f"{size:,}", f"its executor is off by {off:.2g}"])
    return rows


def write(path: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Writes a page that needs no other file: summary, training curves, layers, and the table."""
    report = report_of(result)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    machine = f"{result['platform']['device']}, {result['platform']['system']}"
    title = f"{result['task']}, recipe {result['recipe']['name']}, method {result['method']}"
    body = [
        f"<h1>{html.escape(title)}</h1><p>{html.escape(f'{versions}; {machine}')}</p>",
        html_table("What it costs and brings", COLUMNS, summary(result)),
        curves("Loss while training", _phases(result.get("losses", {}))),
        *report.figures,
        f"<h2>Every weight and product</h2>{report._repr_html_()}",
    ]
    write_page(path, title, "".join(body))


def _phases(losses: Mapping[str, Sequence]) -> dict[str, list[tuple[float, float]]]:
    """The losses of phases that follow each other, over all steps."""
    found, begun = {}, 0
    for name, points in losses.items():
        found[name] = [(begun + step, loss) for step, loss in points]
        begun += points[-1][0] if points else 0
    return found


def _deployed(onnx: Mapping[str, Any] | None) -> list[list[str]]:
    """Rows of what an ONNX model costs in onnxruntime."""
    if onnx is None:
        return []
    old, new = (onnx["bytes"][when] for when in ("before", "after"))
    rows = [["onnx, bytes", f"{old:,}", f"{new:,}", f"{old / max(new, 1):.2f} times smaller"]]
    for batch, times in onnx["latency_ms"].items():
        if times is not None:
            old, new = times["before"], times["after"]
            name = f"onnxruntime, batch {batch}, ms"
            rows.append([name, f"{old:.3f}", f"{new:.3f}", f"{new / old:.2f} times as long"])
    left = onnx["in_floats"]
    rows.append(["onnxruntime, sites in floats", "", str(len(left)), ", ".join(left)])
    return rows


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _change(old: float | None, new: float | None, interval: Mapping[str, Any] | None) -> str:
    if old is None or new is None:
        return ""
    text = f"{new - old:+.4f}"
    if interval is None:
        return text
    return f"{text} (95 %, paired: {interval['low']:+.4f} to {interval['high']:+.4f})"
