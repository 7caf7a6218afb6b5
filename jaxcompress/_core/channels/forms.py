# SPDX-License-Identifier: Apache-2.0
"""Linear forms over symbols, exactly: which of them must vanish, and what remains free."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any

Symbol = tuple
Form = dict[Symbol, Any]  # symbol -> coefficient: an int or a Fraction, never 0


def add(a: Mapping, b: Mapping, m: Any = 1) -> Form:
    """a + m b."""
    out = dict(a)
    for k, x in b.items():
        total = out.get(k, 0) + m * x
        if total:
            out[k] = total
        else:
            out.pop(k, None)
    return out


class Solved:
    """Forms that are 0, solved: `rows[s]` is what a symbol s equals, in symbols without a row."""

    def __init__(self):
        self.rows: dict[Symbol, Form] = {}
        self._users: dict[Symbol, set] = collections.defaultdict(set)

    def reduce(self, f: Mapping) -> Form:
        """The form in free symbols only."""
        out: Form = {}
        for s, x in f.items():
            out = add(out, self.rows[s], x) if s in self.rows else add(out, {s: x})
        return out

    def vanish(self, f: Mapping, rank: Callable[[Symbol], Any]) -> None:
        """Makes a form 0, by solving for its symbol of the highest rank."""
        f = self.reduce(f)
        if not f:
            return
        s = max(f, key=rank)
        row = {k: Fraction(-x, f[s]) for k, x in f.items() if k != s}
        self.rows[s] = row
        for k in row:
            self._users[k].add(s)
        for q in self._users.pop(s, set()):
            x = self.rows[q].pop(s, 0)
            self.rows[q] = add(self.rows[q], row, x)
            for k in row:
                self._users[k].add(q)

    def basis(self, symbols: Iterable[Symbol]) -> list[Form]:
        """A basis of the values of `symbols` for which everything vanishes, each with few of them.

        One vector for each free symbol; a vector is replaced by its difference to another one
        while that involves fewer symbols.
        """
        symbols = list(dict.fromkeys(symbols))
        vectors = {s: {s: Fraction(1)} for s in symbols if s not in self.rows}
        for s in symbols:
            for free, x in self.rows.get(s, {}).items():
                if free in vectors:
                    vectors[free][s] = x
        place = {s: i for i, s in enumerate(vectors)}
        holding: dict[Symbol, set] = collections.defaultdict(set)
        for s, v in vectors.items():
            for k in v:
                holding[k].add(s)
        for s in list(vectors):
            v = vectors[s]
            others = {w for k in v for w in holding[k] if place[w] > place[s]}
            for w in sorted(others, key=place.__getitem__):
                other = vectors[w]
                trials = [add(v, other, -v[k] / other[k]) for k in other if k in v]
                v = min([v, *trials], key=len)
            vectors[s] = v
        return list(vectors.values())
