# SPDX-License-Identifier: Apache-2.0
"""What became of every group, and the sizes with which a module is built again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..._core.channels.kept import Kept
from ..._core.channels.slices import flops, stored_bytes
from ..._core.tabular import Tabular
from .problem import Problem

if TYPE_CHECKING:
    from ..._core.channels.terms import Leaf


class Row(NamedTuple):
    """One group.

    Attributes:
      name: of its first member; `members`: all.
      size, kept: number of indices before and after.
      note: why none can be removed.
      indices: that stay, int[kept] or int[layers, kept]; None if all do.
    """

    name: str
    members: tuple[str, ...]
    size: int
    kept: int
    note: str
    indices: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Shrunk(Tabular):
    """What `jaxcompress.prune.shrink` reports. Prints as a table, also in notebooks.

    Attributes:
      rows: the groups.
      shapes: by key path of every parameter that got smaller, its shape before and after.
      bytes, flops: (before, after), of the parameters and of the matmuls and convolutions of one
        call.
      notes: by name of a site, what repair left as it was and why.
    """

    rows: tuple[Row, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    bytes: tuple[int, int]
    flops: tuple[int, int]
    notes: Mapping[str, str]

    @property
    def configuration(self) -> str:
        """The sizes of everything that got smaller, a line each: with them a module is rebuilt.

        Parameters whose shapes changed alike are one line.
        """
        lines = [
            f"{path}: {list(before)} -> {list(after)}"
            for path, (before, after) in self.shapes.items()
        ]
        return "\n".join(lines)

    def to_json(self) -> str:
        """JSON text with all rows, shapes and totals."""
        rows = [
            row._asdict() | {"indices": None if row.indices is None else row.indices.tolist()}
            for row in self.rows
        ]
        data = {"rows": rows, "shapes": self.shapes, "bytes": self.bytes, "flops": self.flops}
        return json.dumps({**data, "notes": dict(self.notes)}, indent=2)

    @property
    def title(self) -> str:
        (a, b), (c, d) = self.bytes, self.flops
        return (
            f"{a:,} -> {b:,} bytes ({b / max(a, 1):.1%}), {c:,} -> {d:,} flops "
            f"({d / max(c, 1):.1%})"
        )

    @property
    def columns(self) -> Sequence[tuple[str, bool]]:
        return (("size", True), ("kept", True), ("members", False), ("note", False))

    @property
    def cells(self) -> Sequence[Sequence[str]]:
        return [
            (str(row.size), str(row.kept), ", ".join(row.members), row.note) for row in self.rows
        ]


def report(problem: Problem, kept: Mapping[Leaf, np.ndarray], notes: Mapping[str, str]) -> Shrunk:
    """The report of a choice."""
    none, small = Kept({}, {}), Kept(kept, problem.layers)
    rows = tuple(
        Row(
            group.name,
            tuple(map(str, group.members)),
            group.size,
            small.size(leaf),
            f"pinned by {group.pinned}" if group.pinned else "",
            kept.get(leaf),
        )
        for leaf, group in problem.groups.items()
    )
    graph = problem.graph
    shapes = {
        path: (shape, small.shape(dims))
        for path, shape, dims in zip(graph.paths, graph.shapes, graph.dims)
        if small.changes(dims)
    }
    count: Any = stored_bytes
    return Shrunk(
        rows,
        shapes,
        (count(graph, none, problem.arrays), count(graph, small, problem.arrays)),
        (flops(graph, none), flops(graph, small)),
        notes,
    )
