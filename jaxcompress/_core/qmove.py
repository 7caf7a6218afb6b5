# SPDX-License-Identifier: Apache-2.0
"""Transposes and reshapes of QTensors: axes are renamed, merged and split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax import lax

from .qparts import Parts, open_parts
from .qtensor import QTensor


def transpose(q: QTensor, permutation: Sequence[int]) -> QTensor | None:
    p = open_parts(q)
    fixed = 0 if q.global_scale is None else q.global_scale.ndim
    if p is None or tuple(permutation[:fixed]) != tuple(range(fixed)):
        return None
    new = {old: i for i, old in enumerate(permutation)}
    levels, order = p.relabel(new, q.ndim)
    p.packed = lax.transpose(p.packed, tuple(permutation))
    p.scales = [lax.transpose(s, order) for s in p.scales]
    p.shape = tuple(p.shape[i] for i in permutation)
    p.levels, p.axis = levels, new[p.axis]
    return p.build()


def _factor(old: Sequence[int], new: Sequence[int]) -> list[tuple[tuple[int, ...], tuple]]:
    """Smallest runs of axes of both shapes, in order, with as many values each."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        first = i, j
        a, i = (old[i], i + 1) if i < len(old) else (1, i)
        b, j = (new[j], j + 1) if j < len(new) else (1, j)
        while a != b:
            if a < b:
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        groups.append((tuple(range(first[0], i)), tuple(range(first[1], j))))
    return groups


def reshape(q: QTensor, sizes: Sequence[int]) -> QTensor | None:
    new = tuple(sizes)
    if q.shape == new:
        return q
    p = open_parts(q)
    if p is None or not new or 0 in q.shape:
        return None
    change = _Reshape(p, new)
    groups = _factor(q.shape, new)
    if not all(change.regroup(olds, news) for olds, news in groups):
        return None
    if p.g is not None and p.g.ndim:
        ends = {len(olds) and olds[-1] + 1: len(news) and news[-1] + 1 for olds, news in groups}
        if p.g.ndim not in ends:
            return None
        p.g = p.g.reshape(new[: ends[p.g.ndim]])
    p.levels = [(sum((change.moved[a] for a in axes), ()), n) for axes, n in p.levels]
    p.shape = new
    labels, split = p.view()
    kept = [change.kept[x] if isinstance(x, int) else n for x, n in zip(labels, split, strict=True)]
    p.scales = [s.reshape(kept) for s in p.scales]
    packed = list(new)
    if change.axis is None and q.format.code_bits < 8:
        p.codes, p.axis = q.codes.reshape(new), len(new) - 1
        return p.build()
    p.axis, old = len(new) - 1 if change.axis is None else change.axis, p.axis
    packed[p.axis] = packed[p.axis] if change.axis is None else p.packed.shape[old]
    p.packed = p.packed.reshape(packed)
    return p.build()


class _Reshape:
    """Where the axes of a QTensor go when it is reshaped.

    Attributes:
        moved: for each axis that a cut goes through, the axes that take its place in the cut.
        kept: sizes of the new axes in the scales.
        axis: the new packed axis, if the old one is still there.
    """

    def __init__(self, parts: Parts, new: tuple[int, ...]):
        self.p, self.new = parts, new
        self.moved: dict[int, tuple[int, ...]] = {}
        self.kept = [1] * len(new)
        self.axis: int | None = None

    def regroup(self, olds: tuple[int, ...], news: tuple[int, ...]) -> bool:
        """Whether axes that become others, with as many values, keep groups whole."""
        p, new = self.p, self.new
        real, fresh = [a for a in olds if p.shape[a] > 1], [b for b in news if new[b] > 1]
        cut = [a for a in olds if p.cut_by(a) is not None]
        if [p.shape[a] for a in real] == [new[b] for b in fresh]:  # only axes of size 1 come or go
            pairs = zip(*((olds, news) if len(olds) == len(news) == 1 else (real, fresh)))
            for a, b in pairs:
                self.axis = b if a == p.axis else self.axis
                self.moved[a] = (b,)
                self.kept[b] = 1 if a in cut else p.scale_size(a)
            return all(a in self.moved for a in cut)
        if not cut:
            shared = {p.scale_size(a) == 1 for a in real}
            if shared == {False}:
                self.kept[news[0] : news[-1] + 1] = [new[b] for b in news]
            return len(shared) == 1
        k = p.cut_by(cut[0])
        assert k is not None
        axes, size = p.levels[k]
        inner = tuple(a for a in axes if a in olds)
        at, count = axes.index(inner[0]), len(inner)
        if len(cut) != count or inner != olds[-count:] or axes[at : at + count] != inner:
            return False
        front = [a for a in olds[:-count] if p.shape[a] > 1]
        first = 0
        if count == len(axes) and math.prod(p.shape[a] for a in axes) % size == 0:
            if any(p.scale_size(a) == 1 for a in front):
                return False
            while math.prod(new[b] for b in news[first + 1 :]) % size == 0:
                first += 1
        elif front:
            return False
        for b in news[:first]:
            self.kept[b] = new[b]
        self.moved |= dict.fromkeys(inner, ()) | {inner[0]: news[first:]}
        return True


def broadcast(q: QTensor, shape: Sequence[int], broadcast_dimensions: Sequence[int]) -> Any:
    """Only new axes of size 1."""
    if math.prod(shape) != q.size or list(broadcast_dimensions) != sorted(broadcast_dimensions):
        return None
    return reshape(q, shape)
