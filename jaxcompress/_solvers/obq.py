# SPDX-License-Identifier: Apache-2.0
"""Optimal Brain Quantization in fixed order: the loop that GPTQ and SparseGPT share.

    for i in inputs:  e_i = (w_i - Q(w_i)) / U_ii        w_j -= U_ij e_i for all j > i

with U of `cholesky.py`. Errors are pushed on lazily, each time by one matmul: before a chunk of
inputs begins, the errors of all inputs before it are subtracted from the whole chunk, and chunks
are cut into chunks, 128, 8, 1. The results do not depend on how they are cut, except by rounding.
What has to see several inputs as they are when their turn comes (the scale of a group, N of M)
has chunks of that size.

The errors add up to the loss exactly: sum_i e_i² = (w - Q) (H + λ I) (w - Q)ᵀ.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from .._errors import FormatError
from .lead import divisor
from .rounder import Rounder, filled, groups_of

_SMALL = 8  # inputs whose errors are pushed on one by one
_LONG, _MOST = 256, 4  # inputs of the longest chunks, at least, and how many of these there are


class Selection(Protocol):
    """Which weights become zero, chosen as the loop goes. Hashable."""

    @property
    def size(self) -> int:
        """How many inputs are chosen from together."""
        ...

    def choose(self, w: jax.Array, diagonal: jax.Array, start: jax.Array) -> jax.Array:
        """Returns the mask of the weights of these inputs, True where they stay.

        Args:
            w: float32[size, out], as they are now.
            diagonal: of U there, float32[size, 1].
            start: number of the first input.
        """
        ...


class Solution(NamedTuple):
    """What became of weights float32[in, out].

    Attributes:
        values: the solution, float32[in, out].
        loss: sum of squared e over the inputs, float32[out].
        codes: of the values, [in, out], or None if nothing is rounded.
        scales: leaves [groups, out], or None.
        mask: bool[in, out], or None if none was given or chosen.
    """

    values: jax.Array
    loss: jax.Array
    codes: jax.Array | None
    scales: Any
    mask: jax.Array | None


class _Rows(NamedTuple):
    """What a chunk is told of its inputs, the rows of w."""

    w: jax.Array  # [n, out]
    ut: jax.Array  # rows of the transpose of U, so that errors of inputs before it can be added
    inverse: jax.Array  # 1 / U_ii, [n, 1]
    group: jax.Array  # int32[n]
    mask: jax.Array | None


def solve(
    w: jax.Array,
    u: jax.Array,
    *,
    rounder: Rounder | None = None,
    scales: Any = None,
    shared: Any = None,
    group: jax.Array | None = None,
    group_size: int | None = None,
    mask: jax.Array | None = None,
    selection: Selection | None = None,
    block: int = 128,
) -> Solution:
    """Returns weights rounded or pruned one input after the other, in the order of the rows.

    Args:
        w: float32[in, out].
        u: float32[in, in], as of `inverse_cholesky`, in the order of w.
        rounder: how weights are rounded; None to prune only.
        scales: leaves [groups, out]; by default found for each group when its turn comes.
        shared: what all scales share, where none are given.
        group: int32[in], which of the scales is that of an input.
        group_size: inputs whose scale is found together, where none are given.
        mask: bool[in, out], weights that stay (True); the others become zero.
        selection: how a mask is chosen; with it leave out `mask`.
        block: inputs after which errors are pushed on to all that follow.
    """
    n = w.shape[0]
    found = group_size if rounder is not None and scales is None else None
    sizes = _sizes(n, block, [s for s in (found, 0 if selection is None else selection.size) if s])
    loop = _Loop(rounder, found, shared, selection)
    w, mask = filled(w, sizes[0]), None if mask is None else filled(mask, sizes[0])
    gap = w.shape[0] - n
    order = jnp.zeros(n, jnp.int32) if group is None else group
    u = jnp.pad(u, ((0, gap), (0, gap))) + jnp.diag((jnp.arange(n + gap) >= n).astype(u.dtype))
    inverse = 1 / jnp.diagonal(u)[:, None]
    rows = _Rows(w, u.T, inverse, jnp.pad(order, (0, gap), mode="edge"), mask)
    errors, (values, codes, chosen), table = loop.unrolled(sizes, rows, scales)

    codes, chosen = jax.tree.map(lambda a: a[:n], (codes, chosen))
    mask = chosen if mask is None else mask[:n]
    if rounder is None:
        values = values[:n]
    else:
        if scales is None:
            scales = jax.tree.map(lambda a: a[: groups_of(n, found)], table)
        of_row = jax.tree.map(lambda a: a if len(a) == 1 else a[order], scales)
        values = kept(rounder.from_grid(rounder.format.from_codes(codes), of_row), mask)
    return Solution(values, jnp.sum(errors * errors, axis=0), codes, scales, mask)


@dataclasses.dataclass(frozen=True)
class _Loop:
    rounder: Rounder | None
    found: int | None  # inputs whose scale is found together
    shared: Any
    selection: Selection | None

    def unrolled(self, sizes: Sequence[int], rows: _Rows, scales: Any) -> tuple:
        """Solves all inputs, a few long chunks of them in turn.

        Returns:
            errors float32[n, out], (values, codes, mask) as far as the loop makes them, and the
            scales found.
        """
        n, out = rows.w.shape
        step = math.ceil(max(n / _MOST, _LONG) / sizes[0]) * sizes[0]
        errors, parts = jnp.zeros((0, out)), []
        for i in range(0, n, step):
            part = jax.tree.map(lambda a, i=i: a[i : i + step], rows)
            part = part._replace(w=part.w - part.ut[:, :i] @ errors, ut=part.ut[:, i : i + step])
            e, done = self.chunk(sizes, part, scales, i)
            errors = jnp.concatenate([errors, e])
            parts.append(done)
        return errors, *jax.tree.map(lambda *a: jnp.concatenate(a), *parts)

    def chunk(
        self, sizes: Sequence[int], rows: _Rows, scales: Any, start: Any
    ) -> tuple[jax.Array, Any]:
        """Solves a chunk whose weights have all errors before it, cut into chunks of sizes[0].

        Args:
            sizes: of the chunks in it, of those in them, ..., 1.
            rows: its inputs; `ut` is [n, n].
            scales: leaves [groups, out], or [1, out] if they were found for this chunk.
            start: number of the first input.

        Returns:
            errors float32[n, out], and what `unrolled` returns besides.
        """
        (n, out), size = rows.w.shape, sizes[0]

        def step(errors: jax.Array, x: tuple[jax.Array, _Rows]) -> tuple[jax.Array, Any]:
            i, rows = x
            w, inner, table = rows.w - rows.ut @ errors, scales, None
            chosen = None
            if self.selection is not None and size == self.selection.size:
                chosen = self.selection.choose(w, 1 / rows.inverse, start + i * size)
                rows = rows._replace(mask=chosen)
            if size == self.found:
                assert self.rounder is not None
                inner = table = self.rounder.find(kept(w, rows.mask), self.shared)
            if size == 1:
                e, done = self.row(rows._replace(w=w), inner)
            else:
                ut = lax.dynamic_slice_in_dim(rows.ut, i * size, size, axis=1)
                rows = rows._replace(w=w, ut=ut)
                e, (done, deeper) = self.chunk(sizes[1:], rows, inner, start + i * size)
                table = deeper if table is None else table
            if chosen is not None:
                done = (*done[:2], chosen)
            return lax.dynamic_update_slice_in_dim(errors, e, i * size, 0), (done, table)

        cut = jax.tree.map(lambda a: a.reshape(n // size, size, *a.shape[1:]), rows)
        errors, done = lax.scan(step, jnp.zeros((n, out)), (jnp.arange(n // size), cut))
        return errors, jax.tree.map(lambda a: a.reshape(-1, out), done)

    def row(self, rows: _Rows, scales: Any) -> tuple[jax.Array, tuple]:
        """Rounds the weights of one input, [1, out]; returns e, and (values, codes, None)."""
        values, codes = kept(rows.w, rows.mask), None
        if self.rounder is not None:
            if not self.found:
                pick = lambda a: lax.dynamic_slice_in_dim(a, rows.group[0], 1)  # noqa: E731
                scales = jax.tree.map(lambda a: a if len(a) == 1 else pick(a), scales)
            grid = self.rounder.to_grid(values, scales)
            codes = self.rounder.format.to_codes(grid)
            values = kept(self.rounder.from_grid(grid, scales), rows.mask)
        e = (rows.w - values) * rows.inverse
        return e, (values if codes is None else None, codes, None)


def kept(w: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns w with zeros where the mask is False."""
    return w if mask is None else jnp.where(mask, w, 0)


def _sizes(n: int, block: int, events: Sequence[int]) -> list[int]:
    """Returns the sizes of chunks, the longest first, each a multiple of the next."""
    if not isinstance(block, int) or block < 1:
        raise FormatError(f"block={block!r}: expected a number of inputs, at least 1.")
    needed = sorted(events, reverse=True)
    if len(needed) == 2 and needed[0] % needed[1]:
        raise FormatError(
            f"Scales of groups and masks are found for {events[0]} and {events[1]} inputs at a "
            "time, and one has to be a multiple of the other."
        )
    sizes = set(needed)
    if needed and needed[-1] > block:
        sizes.add(divisor(needed[-1], block))
    unit = max(sizes, default=min(_SMALL, block))
    if unit <= block:  # blocks of one size, with as little filling as there can be
        units = math.ceil(n / unit)
        sizes.add(unit * math.ceil(units / math.ceil(units / (block // unit))))
    sizes.add(divisor(min(sizes), _SMALL))
    return sorted(sizes | {1}, reverse=True)
