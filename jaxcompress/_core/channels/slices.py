# SPDX-License-Identifier: Apache-2.0
"""What of the parameters belongs to every index of a group, and what a smaller function costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .flow import conv_view
from .graph import Graph, Node
from .kept import Kept
from .terms import Leaf, Term, blocks, find


def places(t: Term, leaf: Leaf) -> np.ndarray:
    """int[size, count]: the positions of a term at which each index of a leaf is."""
    found = []
    for block in blocks(t):
        if leaf not in block.leaves:
            continue
        k = block.leaves.index(leaf)
        at = block.offset + block.strides[k] * np.arange(leaf.size)
        for j, x in enumerate(block.leaves):
            if j != k:
                at = np.add.outer(at, block.strides[j] * np.arange(x.size))
        found.append(at.reshape(leaf.size, -1))
    return np.concatenate(found, 1) if found else np.zeros((leaf.size, 0), int)


def slices(
    graph: Graph, leaf: Leaf, layer: Leaf | None, arrays: Sequence
) -> Iterator[tuple[str, int, np.ndarray]]:
    """(path, axis, values) of every member: [size, values], or [layers, size, values].

    Args:
      graph: of the function.
      leaf: the axis of the group.
      layer: the axis of layers in each of which it keeps other indices, or None.
      arrays: something for every parameter, of its shape.
    """
    for path, dims, x in zip(graph.paths, graph.dims, arrays, strict=True):
        for axis, t in enumerate(dims):
            at = places(t, leaf)
            if not at.size:
                continue
            lead = next((d for d, o in enumerate(dims) if layer and find(o) is layer), None)
            values = np.moveaxis(np.asarray(x), axis, 0)[at.ravel()]
            values = values.reshape(*at.shape, *values.shape[1:])  # [size, count, others]
            if lead is not None:
                values = np.moveaxis(values, lead + 2 - (lead > axis), 0)
                yield path, axis, values.reshape(*values.shape[:2], -1)
            else:
                yield path, axis, values.reshape(leaf.size, -1)


def flops(graph: Graph, kept: Kept) -> int:
    """Multiplications and additions of all matmuls and convolutions, with what is kept.

    Loops of known length count as often as they run; a while loop counts once, and so does the
    dearest branch of a `cond`.
    """
    return _flops(graph.node, kept)


def _flops(n: Node, kept: Kept) -> int:
    total = 0
    for i, eqn in enumerate(n.jaxpr.eqns):
        name = eqn.primitive.name
        if i in n.subs:
            inner = [_flops(sub, kept) for sub in n.subs[i]]
            times = kept.size(n.subs[i][0].layers[-1]) if name == "scan" else 1
            total += max(inner) if name == "cond" else times * sum(inner)
        elif name in ("dot_general", "ragged_dot_general", "ragged_dot"):
            p = eqn.params
            numbers = p.get("dimension_numbers") or (
                p["ragged_dot_dimension_numbers"].dot_dimension_numbers
            )
            left = n.of(eqn.invars[0])
            summed = math.prod(kept.size(left[d]) for d in numbers[0][0])
            total += 2 * summed * math.prod(kept.shape(n.of(eqn.outvars[0])))
        elif name == "conv_general_dilated":
            window = conv_view(eqn, [n.of(v) for v in eqn.invars])[1][2:]
            out = math.prod(kept.shape(n.of(eqn.outvars[0])))
            total += 2 * out * math.prod(map(kept.size, window))
    return total


def stored_bytes(graph: Graph, kept: Kept, arrays: Sequence[Any]) -> int:
    """Bytes of the parameters, with what is kept."""
    return sum(
        math.prod(kept.shape(dims)) * np.dtype(x.dtype).itemsize
        for dims, x in zip(graph.dims, arrays, strict=True)
    )
