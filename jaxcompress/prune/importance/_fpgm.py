# SPDX-License-Identifier: Apache-2.0
"""How far an index is from all others: what lies in the middle can be expressed by the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from ._base import Importance, Measure

if TYPE_CHECKING:
    from ..._core.channels.terms import Leaf
    from .._structured.problem import Problem


def fpgm() -> Importance:
    """The sum of distances to the other indices, over all members: sum_j ||w_i - w_j||.

    References: He et al. 2019, Filter Pruning via Geometric Median, equation 4.

    >>> fpgm().name
    'fpgm'
    """

    def prepare(problem: Problem, leaves: list[Leaf]) -> Measure:
        def score(leaf: Leaf) -> Any:
            w = jnp.concatenate(
                [x.astype(jnp.float32) for _, _, x in problem.slices(leaf)], axis=-1
            )
            square = jnp.sum(w * w, -1)
            dots = jnp.einsum("...ik,...jk->...ij", w, w)
            apart = square[..., :, None] + square[..., None, :] - 2 * dots
            return jnp.sum(jnp.sqrt(jnp.maximum(apart, 0)), -1)

        return score

    return Importance("fpgm", prepare)
