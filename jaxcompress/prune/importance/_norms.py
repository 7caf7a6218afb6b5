# SPDX-License-Identifier: Apache-2.0
"""Norms of everything that is removed with an index."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from ._base import Importance, Measure

if TYPE_CHECKING:
    from ..._core.channels.terms import Leaf
    from .._structured.problem import Problem


def over_members(reduce: Callable[[Any], Any], finish: Callable[[Any], Any]) -> Callable:
    """`finish(sum over members of reduce(values))`, values [..., size, n]."""

    def prepare(problem: Problem, leaves: list[Leaf]) -> Measure:
        def score(leaf: Leaf) -> Any:
            found = [
                reduce(x.astype(np.float32))
                for _, _, x in problem.slices(leaf)
                if jnp.issubdtype(x.dtype, jnp.floating)
            ]
            return finish(sum(found) if found else np.zeros(leaf.size))

        return score

    return prepare


def l1() -> Importance:
    """The sum of absolute values in all members: sum_k |w_k|.

    References: Li et al. 2017, Pruning Filters for Efficient ConvNets, section 3.1, over all
    members of the coupled group.

    >>> l1().name
    'l1'
    """
    return Importance("l1", over_members(lambda x: np.sum(np.abs(x), -1), lambda s: s))


def l2() -> Importance:
    """The Euclidean norm of all members together: sqrt(sum_k w_k²).

    References: Fang et al. 2023, DepGraph, equation 4.

    >>> l2().name
    'l2'
    """
    return Importance("l2", over_members(lambda x: np.sum(x * x, -1), np.sqrt))
