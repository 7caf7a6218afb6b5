# SPDX-License-Identifier: Apache-2.0
"""Arrays restricted to some of their indices: which ones of every term are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from .. import _compat
from .terms import Cat, Dims, Leaf, Term, find, leaves


class Kept:
    """The kept indices of leaves, and what follows for terms and arrays.

    Args:
      indices: by leaf the indices that stay, sorted: int[count], or int[layers, count] where every
        layer of a scan keeps others.
      layer: by leaf with indices of each layer, the axis of these layers.
    """

    def __init__(self, indices: Mapping[Leaf, np.ndarray], layer: Mapping[Leaf, Leaf]):
        self.indices = dict(indices)
        self.layer = {x: layer[x] for x, kept in self.indices.items() if kept.ndim == 2}
        self._known: dict[tuple[int, int], tuple[Term, np.ndarray]] = {}
        self._seen: dict[int, tuple[Term, bool]] = {}

    def settle(self) -> Leaf | None:
        """Follows leaves that were found to be the same as others since.

        Returns one that was taken apart, pinned or found to be another one that loses indices:
        what is kept does not fit any more. None if there is none.
        """
        for x in [*self.indices]:
            root = find(x)
            if not isinstance(root, Leaf) or x.pin or root.pin:
                return x
            if root is not x:
                if root in self.indices:
                    return x
                self.indices[root] = self.indices.pop(x)
                if x in self.layer:
                    self.layer[root] = self.layer.pop(x)
        return None

    def positions(self, t: Term, layer: int = 0) -> np.ndarray:
        """The positions of a term that are kept, in one layer if layers differ."""
        t = find(t)
        key = id(t), layer
        if key not in self._known:  # the term is kept alive so that its id stays its own
            self._known[key] = t, self._positions(t, layer)
        return self._known[key][1]

    def _positions(self, t: Term, layer: int) -> np.ndarray:
        if isinstance(t, Leaf):
            kept = self.indices.get(t)
            if kept is None:
                return np.arange(t.size)
            return kept if kept.ndim == 1 else kept[layer]
        if isinstance(t, Cat):
            starts = np.cumsum([0, *(p.size for p in t.parts)])
            return np.concatenate([self.positions(p, layer) + s for p, s in zip(t.parts, starts)])
        out = np.zeros(1, int)
        for p in t.parts:
            out = np.add.outer(out * p.size, self.positions(p, layer)).ravel()
        return out

    def size(self, t: Term) -> int:
        """How many indices of a term are kept."""
        return len(self.positions(t)) if self.touches(t) else find(t).size

    def shape(self, dims: Dims) -> tuple[int, ...]:
        return tuple(map(self.size, dims))

    def touches(self, t: Term) -> bool:
        """Whether a term loses indices."""
        t = find(t)
        if id(t) not in self._seen:
            self._seen[id(t)] = t, any(x in self.indices for x in leaves(t))
        return self._seen[id(t)][1]

    def changes(self, dims: Dims) -> bool:
        """Whether an array of these dimensions gets smaller."""
        return any(map(self.touches, dims))

    def restrict(self, x: Any, dims: Dims) -> Any:
        """An array without the indices that are not kept; NumPy's, unless it is traced."""
        if not self.changes(dims):
            return x
        np_: Any = jnp if isinstance(x, _compat.Tracer) else np
        layers = {find(self.layer[leaf]) for t in dims for leaf in leaves(t) if leaf in self.layer}
        at = next((d for d, t in enumerate(dims) if find(t) in layers), None)
        if at is None:
            return self._take(np_, np_.asarray(x), dims, 0)
        x, rest = np_.moveaxis(np_.asarray(x), at, 0), (*dims[:at], *dims[at + 1 :])
        parts = [self._take(np_, x[int(j)], rest, int(j)) for j in self.positions(dims[at])]
        return np_.stack(parts, at)

    def _take(self, np_: Any, x: Any, dims: Sequence[Term], layer: int) -> Any:
        for d, t in enumerate(dims):
            if self.touches(t):
                x = np_.take(x, self.positions(t, layer), axis=d)
        return x

    def numbers(self, t: Term) -> np.ndarray:
        """Where each position of a term comes to lie; its old size if it is removed."""
        kept, size = self.positions(t), find(t).size
        out = np.full(size, size)
        out[kept] = np.arange(len(kept))
        return out
