# SPDX-License-Identifier: Apache-2.0
"""The report of an ONNX model: every parameter with the type and the bytes that it has there."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from typing import Any

import onnx

from ..._quantize.accounting import Row
from .._packing import Packing
from .._program import Program
from .audit import nodes_of


def stored_rows(model: onnx.ModelProto, packing: Packing, params: Any, inputs: tuple) -> list[Row]:
    """One row a parameter, and one for all other constants; bytes are those of the file."""
    named = Program(lambda p: p, packing.pack(params, inputs), ()).named
    found: dict[str, list[onnx.TensorProto]] = defaultdict(list)
    for tensor in _tensors(model):
        found[re.sub(r"(\.scale|\.zero_point)?_\d+$", "", tensor.name)].append(tensor)
    rows, taken = [], 0
    for row in packing.rows(named, params, inputs):
        if row.site.startswith(("statistics/", "learned/")):
            continue  # ranges and steps have become scales
        site = row.site.removeprefix("weights/")
        mine = found.get(site)
        if mine is None:  # what is computed from it is stored, which may be it, a part, or nothing
            why = "; ".join(filter(None, (row.reason, "among the constants")))
            rows.append(dataclasses.replace(row, site=site, bytes_after=0, reason=why))
            continue
        size = sum(len(t.raw_data) for t in mine)
        taken += size
        most = max(mine, key=lambda t: len(t.raw_data))
        largest = onnx.TensorProto.DataType.Name(most.data_type)
        why, kind = row.reason, largest.lower()
        if kind == "uint8" and row.weight != kind and math.prod(most.dims) < math.prod(row.shape):
            kind = f"{row.weight} in uint8"  # several numbers a byte
        if largest in ("FLOAT", "DOUBLE") and not why:
            why = f"ONNX has no {row.weight} with these scales: stored decoded"
        rows.append(dataclasses.replace(row, site=site, weight=kind, bytes_after=size, reason=why))
    rest = sum(len(t.raw_data) for t in _tensors(model)) - taken
    if rest > 0:
        rows.append(
            Row(
                "(constants)",
                "",
                (),
                "",
                None,
                0,
                rest,
                None,
                "sizes, ends, copies of parameters that are read twice",
                "",
            )
        )
    return rows


def _tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    out = list(model.graph.initializer)
    for node in nodes_of(model.graph):
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                out += attribute.g.initializer
    return out
