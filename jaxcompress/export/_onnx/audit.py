# SPDX-License-Identifier: Apache-2.0
"""Which kernels onnxruntime really runs at the sites of a model.

A site in integers counts as one where the product that onnxruntime's own optimizer leaves is one
of integer operands; a site with small weights only where the weight stays small until the kernel
reads it. Everything else fell back to floats, and the reason says why.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import onnx

from ..._core.tabular import Tabular
from .graph import SITE
from .session import session_of, version

PRODUCTS = ("MatMul", "Gemm", "Conv", "MatMulInteger", "ConvInteger", "Gather")
INTEGER = frozenset(
    "QGemm QLinearConv QLinearMatMul MatMulIntegerToFloat MatMulInteger ConvInteger "
    "DynamicQuantizeMatMul".split()
)
FLOAT = frozenset("MatMul Gemm FusedGemm FusedMatMul Conv FusedConv Gather".split())


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One site.

    Attributes:
      site: its name; of a stack of layers the name of all of them.
      written: operations of the model that compute it.
      runs: what onnxruntime runs instead, with how often.
      fallback: why it computes in floats; empty if it does not.
    """

    site: str
    written: str
    runs: str
    fallback: str


@dataclasses.dataclass(frozen=True)
class Audit(Tabular):
    """What `OnnxModel.audit` found. Prints as a table; true if no site fell back to floats."""

    path: str
    version: str
    rows: tuple[Kernel, ...]

    def __bool__(self) -> bool:
        return not self.fallbacks

    @property
    def fallbacks(self) -> tuple[Kernel, ...]:
        """The sites that compute in floats."""
        return tuple(row for row in self.rows if row.fallback)

    @property
    def title(self) -> str:
        good = len(self.rows) - len(self.fallbacks)
        where = f"{self.path} in onnxruntime {self.version}"
        return f"{where}: {good} of {len(self.rows)} sites on small kernels"

    @property
    def columns(self) -> list[tuple[str, bool]]:
        return [(name, False) for name in ("site", "written as", "runs as", "in floats, because")]

    @property
    def cells(self) -> list[list[str]]:
        return [[row.site, row.written, row.runs, row.fallback] for row in self.rows]


def audit(model: onnx.ModelProto, name: str) -> Audit:
    """Loads a model as onnxruntime optimizes it, and looks at what became of every site."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "optimized.onnx"
        session_of(model, optimized=out)
        ran = onnx.load(out, load_external_data=False)
    written: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in nodes_of(model.graph):
        if SITE in node.name and node.op_type in PRODUCTS:
            written[node.name.split(SITE)[0]].append(node)
    after = list(nodes_of(ran.graph))
    decoding = {o for n in after if n.op_type == "DequantizeLinear" for o in n.output}
    rows = []
    for site, nodes in written.items():
        names = {n.name for n in nodes}
        found = [n for n in after if _origin(n.name, names)]
        reasons = [_why(n, decoding) for n in found]
        if not found and not all(n.op_type in INTEGER for n in nodes):
            reasons = ["merged into other operations, in floats: its weight is decoded at loading"]
        why = "; ".join(dict.fromkeys(filter(None, reasons)))
        kinds = _counted([n.op_type for n in found]) or "other operations"
        rows.append(Kernel(site, _counted([n.op_type for n in nodes]), kinds, why))
    return Audit(name, version(), tuple(rows))


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes_of(attribute.g)


def _origin(name: str, names: set[str]) -> bool:
    """Whether a node is, or was made of, one of those names: `name`, `name/...`, `name_token_0`."""
    base = name.split("_token_")[0]
    while base not in names and "/" in base:
        base = base.rsplit("/", 1)[0]
    return base in names


def _counted(names: list[str]) -> str:
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    return ", ".join(name if n == 1 else f"{name} x{n}" for name, n in counts.items())


def _why(node: onnx.NodeProto, decoding: set[Any]) -> str:
    """Why a node computes in floats; empty if it does not."""
    if node.op_type not in FLOAT:
        return ""
    if node.op_type == "Gather":
        return "its table is decoded at every call" if node.input[0] in decoding else ""
    when = "at every call" if any(name in decoding for name in node.input) else "at loading"
    return f"{node.op_type} in floats: its weight is decoded {when}"
