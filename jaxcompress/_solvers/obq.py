# SPDX-License-Identifier: Apache-2.0
"""Optimal Brain Quantization in fixed order: the loop that GPTQ and SparseGPT share.

    for i in inputs:  e_i = (w_i - Q(w_i)) / U_ii        w_j -= U_ij e_i for all j > i

with U of `cholesky.py`. Errors are pushed on lazily, each time by one matmul: before a chunk of
inputs begins, the errors of all inputs before it are subtracted from the whole chunk, and chunks
are cut into chunks, 128, 8, 1. The results do not depend on how they are cut, except by rounding.
What has to see several inputs as they are when their turn comes (the scale of a group, N of M)
has chunks of that size. Outputs are independent of each other and go in panels that fit a cache.

The errors add up to the loss exactly: sum_i e_i² = (w - Q) (H + λ I) (w - Q)ᵀ.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._errors import FormatError
from .rounder import Rounder, filled, groups_of

_SMALL = 8  # inputs whose errors are pushed on one by one
_PANEL = 512  # outputs on a CPU: one panel of 1024 inputs is 2 MiB
_UNROLLED = 4


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which weights become zero, chosen as the loop goes. Hashable.

    Attributes:
        size: inputs that are chosen from together.
        choose: from their weights as they are now, float32[size, out], the diagonal of U there,
            float32[size, 1], and the number of the first one to the mask, True = kept.
        coupled: whether it looks at several outputs together.
    """

    size: int
    choose: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    coupled: bool


class Solution(NamedTuple):
    """What became of weights float32[in, out].

    Attributes:
        values: the solution, float32[in, out].
        errors: sum of squared e over the inputs, float32[out].
        codes: of the values, [in, out], or None if nothing is rounded.
        scales: leaves [groups, out], or None.
        mask: bool[in, out], or None if none was given or chosen.
    """

    values: jax.Array
    errors: jax.Array
    codes: jax.Array | None
    scales: Any
    mask: jax.Array | None


class _Rows(NamedTuple):
    """What a chunk is told of its inputs, rows of w, and what it returns of them."""

    inverse: jax.Array  # 1 / U_ii, [n, 1]
    group: jax.Array  # int32[n]
    mask: jax.Array | None


def solve(
    w: jax.Array,
    u: jax.Array,
    *,
    rounder: Rounder | None = None,
    scales: Any = None,
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
        group: int32[in], which of the scales is that of an input.
        group_size: inputs whose scale is found together, where none are given.
        mask: bool[in, out], weights that stay (True); the others become zero.
        selection: how a mask is chosen; with it leave out `mask`.
        block: inputs after which errors are pushed on to all that follow.
    """
    n, out = w.shape
    found = group_size if rounder is not None and scales is None else None
    events = [size for size in (found, selection and selection.size) if size]
    sizes = _sizes(n, block, events)
    coupled = bool(found and rounder and rounder.coupled) or bool(selection and selection.coupled)
    group = jnp.zeros(n, jnp.int32) if group is None else group

    total = sizes[0]
    w, group = filled(w, total), jnp.pad(group, (0, -n % total), mode="edge")
    mask = None if mask is None else filled(mask, total)
    u = _extended(u, w.shape[0])
    rows = _Rows(1 / jnp.diagonal(u)[:, None], group, mask)
    loop = _Loop(rounder, found, selection, None if rounder is None else rounder.shared(w[:n]))

    def panel(w: jax.Array, mask: jax.Array | None, scales: Any) -> Any:
        return loop.unrolled(sizes, w, u.T, rows._replace(mask=mask), scales)

    parts = 1 if coupled else out // _panel(out)
    if parts == 1:
        rounded, table, errors = panel(w, mask, scales)
    else:
        args = jax.tree.map(lambda a: _split(a, parts), (w, mask, scales))
        done = lax.map(lambda a: panel(*a), args)
        rounded, table, errors = jax.tree.map(_merged, done)
    values, codes, mask = jax.tree.map(lambda a: a[:n], rounded)
    table = jax.tree.map(lambda a: a[: groups_of(n, found)], table)
    return Solution(values, errors[0], codes, table if scales is None else scales, mask)


@dataclasses.dataclass(frozen=True)
class _Loop:
    rounder: Rounder | None
    found: int | None  # inputs whose scale is found together
    selection: Selection | None
    shared: Any

    def unrolled(
        self, sizes: Sequence[int], w: jax.Array, ut: jax.Array, rows: _Rows, scales: Any
    ) -> tuple[Any, Any, jax.Array]:
        """Solves all inputs, a few long chunks of them in turn.

        Returns:
            (values, codes, mask) of the rows, the scales found, and the sums of squared errors.
        """
        n = w.shape[0]
        step = math.ceil(n / sizes[0] / _UNROLLED) * sizes[0]
        errors, parts = jnp.zeros((0, w.shape[1])), []
        for i in range(0, n, step):
            here = slice(i, min(i + step, n))
            now = w[here] - ut[here, :i] @ errors
            inner = jax.tree.map(lambda a, here=here: a[here], rows)
            e, part = self.chunk(sizes, now, ut[here, here], inner, scales, i)
            errors = jnp.concatenate([errors, e])
            parts.append(part)
        done, table = jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
        return done, table, jnp.sum(errors * errors, axis=0, keepdims=True)

    def chunk(
        self,
        sizes: Sequence[int],
        w: jax.Array,
        ut: jax.Array,
        rows: _Rows,
        scales: Any,
        start: Any,
    ) -> tuple[jax.Array, Any]:
        """Solves a chunk whose weights have all errors before it, cut into chunks of sizes[0].

        Args:
            sizes: of the chunks in it, of those in them, ..., 1.
            w: float32[n, out].
            ut: transpose of U there, [n, n].
            rows: of these inputs.
            scales: leaves [groups, out], or [1, out] if they were found for this chunk.
            start: number of the first input.

        Returns:
            errors float32[n, out], and ((values, codes, mask) of the rows, scales found).
        """
        (n, out), size = w.shape, sizes[0]

        def step(errors: jax.Array, x: tuple) -> tuple[jax.Array, Any]:
            i, w, ut, rows = x
            w = w - ut @ errors
            first = start + i * size
            inner, table = scales, None
            if self.selection and size == self.selection.size:
                rows = rows._replace(mask=self.selection.choose(w, 1 / rows.inverse, first))
            if size == self.found:
                assert self.rounder is not None
                kept = w if rows.mask is None else jnp.where(rows.mask, w, 0)
                inner = table = self.rounder.find(kept, self.shared)
            if size == 1:
                e, done = self.row(w, rows, inner)
            else:
                own = lax.dynamic_slice_in_dim(ut, i * size, size, axis=1)
                e, (done, deeper) = self.chunk(sizes[1:], w, own, rows, inner, first)
                table = deeper if table is None else table
            return lax.dynamic_update_slice_in_dim(errors, e, i * size, 0), (done, table)

        cut = jax.tree.map(lambda a: a.reshape(n // size, size, *a.shape[1:]), (w, ut, rows))
        errors, done = lax.scan(step, jnp.zeros((n, out)), (jnp.arange(n // size), *cut))
        return errors, jax.tree.map(lambda a: a.reshape(-1, out), done)

    def row(self, w: jax.Array, rows: _Rows, scales: Any) -> tuple[jax.Array, Any]:
        """Rounds the weights of one input, [1, out]; returns e, and (values, codes, mask)."""
        values, codes = w, None
        if self.rounder is not None:
            if not self.found:
                pick = lambda a: lax.dynamic_slice_in_dim(a, rows.group[0], 1)  # noqa: E731
                scales = jax.tree.map(pick, scales)
            zeroed = w if rows.mask is None else jnp.where(rows.mask, w, 0)
            grid = self.rounder.to_grid(zeroed, scales)
            codes = self.rounder.format.to_codes(grid)
            values = self.rounder.from_grid(grid, scales)
        if rows.mask is not None:
            values = jnp.where(rows.mask, values, 0)
        return (w - values) * rows.inverse, (values, codes, rows.mask)


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
        sizes.add(_divisor(needed[-1], block))
    unit = max(sizes, default=min(_SMALL, block))
    if unit <= block:  # blocks of one size, with as little filling as there can be
        units = math.ceil(n / unit)
        sizes.add(unit * math.ceil(units / math.ceil(units / (block // unit))))
    sizes.add(_divisor(min(sizes), _SMALL))
    return sorted(sizes | {1}, reverse=True)


def _divisor(n: int, most: int) -> int:
    """Returns the largest divisor of n that is at most so much."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def _panel(out: int) -> int:
    """Returns how many outputs go together."""
    if jax.default_backend() != "cpu":
        return out
    panel = _divisor(out, _PANEL)
    return panel if panel >= _PANEL // 4 else out


def _extended(u: jax.Array, n: int) -> jax.Array:
    """Returns u of so many inputs, the new ones apart from the others."""
    gap = n - u.shape[0]
    if not gap:
        return u
    new = jnp.arange(n) >= u.shape[0]
    return jnp.pad(u, ((0, gap), (0, gap))) + jnp.diag(new.astype(u.dtype))


def _split(a: jax.Array, parts: int) -> jax.Array:
    return jnp.moveaxis(a.reshape(a.shape[0], parts, -1), 1, 0)


def _merged(a: jax.Array) -> jax.Array:
    return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1)
