# SPDX-License-Identifier: Apache-2.0
"""A `Quantizer` as solvers see it: its range, convention and rounding for one group at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .._errors import RecipeError
from ..formats import Format
from . import ranges, scales
from .quantizer import Quantizer
from .scales import from_grid, to_grid


@dataclasses.dataclass(frozen=True)
class QuantizerRounder:
    """Rounds weights float32[in, out] as the quantizer does along their inputs.

    Groups are what the solver is told; the quantizer says what happens inside one. Scales that
    several outputs share are repeated for each of them.

    Attributes:
        quantizer: with a range that is found from the values, and rounding half to even.

    Raises:
        RecipeError: with a stored range, or another rounding.
    """

    quantizer: Quantizer

    def __post_init__(self):
        q = self.quantizer
        if q.special or q.rounding != "half_even":
            raise RecipeError(
                f"A solver rounds half to even in a range of the values, got range={q.range!r} "
                f"and rounding={q.rounding!r}. Use another range, or round to nearest."
            )

    @property
    def format(self) -> Format:
        return self.quantizer.format

    @property
    def coupled(self) -> bool:
        return self.quantizer.granularity.kind in ("tensor", "block")

    def shared(self, w: jax.Array) -> Any:
        fmt = self.format
        return fmt.global_scale(ranges.absmax(w, (0, 1), ())) if fmt.two_level else None

    def find(self, v: jax.Array, shared: Any) -> scales.Scales:
        granularity = self.quantizer.granularity
        rows = {"tensor": v.shape[1], "block": granularity.rows}.get(granularity.kind) or 1
        out, gap = v.shape[1], -v.shape[1] % rows
        cut = jnp.pad(v, ((0, 0), (0, gap))).reshape(v.shape[0], -1, rows)
        g = None if shared is None else shared.reshape(1, 1, 1)
        found = scales.find(cut, self.quantizer, (0, 2), (), True, g)
        full = (1, (out + gap) // rows, rows)
        each = lambda a: jnp.broadcast_to(a, full).reshape(1, -1)[:, :out]  # noqa: E731
        return jax.tree.map(each, found)

    def to_grid(self, v: jax.Array, scales: Any) -> jax.Array:
        return to_grid(v, self.quantizer, scales, None, "half_even")

    def from_grid(self, grid: jax.Array, scales: Any) -> jax.Array:
        return from_grid(grid, self.quantizer, scales)
