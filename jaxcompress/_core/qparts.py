# SPDX-License-Identifier: Apache-2.0
"""A QTensor taken apart into codes, scales and cuts, for what changes its layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from .blocks import Levels, from_levels, levels_of, view
from .qtensor import QTensor, pack_along

Along = Callable[[jax.Array, int], jax.Array]  # does something along one axis of an array


@dataclasses.dataclass
class Parts:
    """A QTensor taken apart, axes counted from the front; changed in place by the rules."""

    q: QTensor
    shape: tuple[int, ...]
    packed: jax.Array
    codes: jax.Array | None  # instead of `packed`, once they were unpacked
    scales: list[jax.Array]  # the scale and, if there is one, the zero point; axes as `view`
    levels: Levels
    axis: int
    g: jax.Array | None

    @property
    def labels(self) -> list:
        return view(self.levels, len(self.shape))

    def view(self) -> tuple[list, list[int]]:
        """What the axes of the scales are, and how many scales may lie along each."""
        blocks = from_levels(self.levels, len(self.shape))
        split = self.shape if blocks is None else blocks.split_shape(self.shape)
        inside = lambda x: isinstance(x, tuple) and x[0] == "inside"  # noqa: E731
        return self.labels, [1 if inside(x) else n for x, n in zip(self.labels, split)]

    def scale_size(self, a: int) -> int:
        """How many scales there are along axis `a`, through which no cut goes."""
        return self.scales[0].shape[self.labels.index(a)]

    def build(self) -> QTensor:
        ndim, fmt, scale = len(self.shape), self.q.format, self.scales[0]
        zero = self.scales[1] if len(self.scales) > 1 else None
        blocks = from_levels(self.levels, ndim)
        axis = self.axis - ndim
        if self.codes is not None:
            return QTensor.from_codes(
                self.codes, scale, zero,
                format=fmt, dtype=self.q.dtype, blocks=blocks, global_scale=self.g, axis=axis,
            )  # fmt: skip
        zero = None if zero is None else pack_along(zero, fmt, -1)
        unused = self.q.unused
        return QTensor(self.packed, scale, zero, fmt, self.q.dtype, unused, blocks, axis, self.g)

    def along(self, a: int, f: Along, size: int, on_blocks: Along | None = None) -> None:
        """Does `f` along axis `a`, which has `size` values then.

        `on_blocks` does the same to whole groups, if they lie along this axis.
        """
        if self.codes is None and a == self.axis and self.q.format.code_bits < 8:
            self.codes = dataclasses.replace(self.q, packed=self.packed).codes
        if self.codes is not None:
            self.codes = f(self.codes, a)
        else:
            self.packed = f(self.packed, a)
        self.scales_along(a, f, size, on_blocks)

    def scales_along(self, a: int, f: Along, size: int, on_blocks: Along | None = None) -> None:
        """The same to all but the codes."""
        k = self.cut_by(a)
        place = self.labels.index(a if k is None else ("blocks", k))
        g = f if k is None else on_blocks
        assert g is not None
        self.scales = [s if s.shape[place] == 1 else g(s, place) for s in self.scales]
        self.shape = (*self.shape[:a], size, *self.shape[a + 1 :])
        if self.g is not None and a < self.g.ndim:
            self.g = f(self.g, a)

    def cut_by(self, a: int) -> int | None:
        """The number of the cut that goes through axis `a`."""
        return next((k for k, (axes, _) in enumerate(self.levels) if a in axes), None)

    def group(self, a: int) -> int | None:
        """The size of the groups along axis `a`, if they lie along it alone."""
        k = self.cut_by(a)
        return self.levels[k][1] if k is not None and self.levels[k][0] == (a,) else None

    def relabel(self, new: dict[int, int], ndim: int) -> tuple[Levels, list[int]]:
        """The cuts after axes were renamed, and the order in which the axes of scales then come."""
        levels = [(tuple(new[a] for a in axes), size) for axes, size in self.levels]
        old = [new.get(x, x) if isinstance(x, int) else x for x in self.labels]
        return levels, [old.index(x) for x in view(levels, ndim) if x in old]


def open_parts(q: QTensor) -> Parts | None:
    """A QTensor taken apart; None where its scales are laid out as no `Quantizer` does it."""
    ndim, zero, g = q.ndim, q.zero_point, q.global_scale
    levels = levels_of(q.blocks, ndim)
    if g is not None and g.size == 1:
        g = g.reshape(())
    rank = len(view(levels, ndim))
    scales = [q.scale] if zero is None else [q.scale, zero]
    scales = [s.reshape((1,) * (rank - s.ndim) + s.shape) for s in scales]
    p = Parts(q, q.shape, q.packed, None, scales, levels, q.axis % ndim, g)
    for s in scales:
        for x, most, n in zip(*p.view(), s.shape, strict=True):
            if n != most and (n != 1 or isinstance(x, tuple)):
                return None
    return p if g is None or g.shape == q.shape[: g.ndim] else None


def stacked(q: QTensor) -> QTensor | None:
    """The QTensor with the leading axis in all of its arrays, so that a scan can slice them."""
    p = open_parts(q)
    if p is None or q.ndim < 2 or p.axis == 0 or p.cut_by(0) is not None:
        return None
    n = q.shape[0]
    p.scales = [jnp.broadcast_to(s, (n, *s.shape[1:])) for s in p.scales]
    if p.g is not None and p.g.ndim == 0:
        p.g = jnp.broadcast_to(p.g, (n,))
    return p.build()


def packed_along_last(q: QTensor) -> QTensor:
    """The same, packed along its last axis."""
    return q if q.axis == -1 else QTensor.from_codes(
        q.codes, q.scale, q.zero_point,
        format=q.format, dtype=q.dtype, blocks=q.blocks, global_scale=q.global_scale,
    )  # fmt: skip
