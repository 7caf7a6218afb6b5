# SPDX-License-Identifier: Apache-2.0
"""A `Quantizer` as solvers see it: the same scales and the same rounding, one output a column."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ..formats import Format
from . import ranges, scales
from .quantizer import Quantizer
from .scales import Scales


@dataclasses.dataclass(frozen=True)
class QuantizerRounder:
    """The `Rounder` of a quantizer; values along the first axis share a scale."""

    quantizer: Quantizer
    coupled = False

    @property
    def format(self) -> Format:
        return self.quantizer.format

    def shared(self, w: jax.Array) -> Any:
        """The second-level scale of the array, of formats that have one."""
        fmt = self.format
        if not fmt.two_level:
            return None
        return fmt.global_scale(ranges.absmax(w, tuple(range(w.ndim)), ()))

    def find(self, v: jax.Array, shared: Any) -> Scales:
        g = None if shared is None else jnp.broadcast_to(shared, (1, v.shape[1]))
        return scales.find(v, self.quantizer, (0,), (), True, g)

    def to_grid(self, v: jax.Array, s: Scales) -> jax.Array:
        return scales.to_grid(v, self.quantizer, s, None, "half_even")

    def from_grid(self, grid: jax.Array, s: Scales) -> jax.Array:
        return scales.from_grid(grid, self.quantizer, s)


def rounder_of(quantizer: Quantizer) -> QuantizerRounder:
    """The rounder of a quantizer with one scale an output, or a group of its inputs."""
    return QuantizerRounder(quantizer)
