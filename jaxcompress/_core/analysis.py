# SPDX-License-Identifier: Apache-2.0
"""What an analysis of a jaxpr finds, and the names that tell it what transforms emitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from .provenance import Label, renumber

MARK = "jaxcompress_"  # prefix of the names of regions and functions that a transform emitted
FAKE = MARK + "fake_"  # jaxcompress_fake_quantize: the value is owned by the kind after the prefix
INTEGER = MARK + "integer"  # a site in integers, and in floats for those who change it
OPAQUE = MARK + "opaque"  # a region that is left alone and hidden


class Draft(NamedTuple):
    """A site before it has a name; parameters are numbers."""

    labels: tuple[Label, ...]
    roles: tuple[str, ...]
    opaque: bool
    eqn: Any


class Call(NamedTuple):
    """An equation that calls jaxprs: (analysis, parameters of the caller by number) each."""

    bodies: tuple[tuple[Analysis, list[int]], ...]
    scan: int | None = None  # depth, if this is a scan
    length: int = 0


@dataclasses.dataclass
class Analysis:
    """What was found in one jaxpr for one pattern of labels."""

    drafts: dict[int, Draft] = dataclasses.field(default_factory=dict)
    calls: dict[int, Call] = dataclasses.field(default_factory=dict)
    extra: dict[int, Any] = dataclasses.field(default_factory=dict)
    marks: dict[str, Label] = dataclasses.field(default_factory=dict)
    owned: set[str] = dataclasses.field(default_factory=set)
    outputs: list[Label] = dataclasses.field(default_factory=list)
    layers: frozenset[int] = frozenset()  # depths of scans over which some weight is a slice
    experts: frozenset[int] = frozenset()  # parameters of which data chose a matmul's weight

    @property
    def empty(self) -> bool:
        return not (self.drafts or self.calls or self.marks or self.owned)


class State(NamedTuple):
    """What the rules need of the analysis under way; `analyzer` is the `Analyzer`."""

    analyzer: Any
    found: Analysis
    depth: int
    manual: frozenset[str]

    def enter(self, jaxpr: Any, labels: Sequence[Label], deeper: int = 0):
        return self.analyzer.call(jaxpr, labels, self.depth + deeper, self.manual)

    def record(self, i: int, results: Sequence[tuple], scan: int | None = None, length: int = 0):
        bodies = tuple((analysis, numbers) for analysis, numbers, _ in results)
        for analysis, numbers in bodies:
            for name, label in analysis.marks.items():
                self.mark(name, renumber(label, numbers))
            self.found.owned |= analysis.owned
            layers = analysis.layers - ({scan} if scan is not None else set())
            self.found.layers |= layers
            self.found.experts |= frozenset(numbers[n] for n in analysis.experts)
        if any(a.drafts or a.calls for a, _ in bodies):
            self.found.calls[i] = Call(bodies, scan, length)

    def mark(self, name: str, label: Label):
        old = self.found.marks.get(name)
        if old is not None and old != label:
            params = old.params | label.params
            label = Label(data=old.data and label.data, params=params)
        self.found.marks[name] = label
