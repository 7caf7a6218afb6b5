# SPDX-License-Identifier: Apache-2.0
"""How far an index is from all others: what lies in the middle can be expressed by the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

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
            w = np.concatenate([x.astype(np.float32) for _, _, x in problem.slices(leaf)], axis=-1)
            square = np.sum(w * w, -1)
            dots = np.einsum("...ik,...jk->...ij", w, w)
            apart = square[..., :, None] + square[..., None, :] - 2 * dots
            return np.sum(np.sqrt(np.maximum(apart, 0)), -1)

        return score

    return Importance("fpgm", prepare)
