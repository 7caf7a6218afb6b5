# SPDX-License-Identifier: Apache-2.0
"""Random scores: what every other importance has to be better than."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

from ._base import Importance, Measure

if TYPE_CHECKING:
    from ..._core.channels.terms import Leaf
    from .._structured.problem import Problem


def random(key: Any) -> Importance:
    """Uniform scores; every group, and every layer, gets its own.

    Args:
      key: a random key, or a seed.

    >>> random(0).name
    'random'
    """

    def prepare(problem: Problem, leaves: list[Leaf]) -> Measure:
        base = jax.random.key(key) if isinstance(key, int) else key
        number = {leaf: k for k, leaf in enumerate(problem.groups)}

        def score(leaf: Leaf) -> Any:
            layers = problem.groups[leaf].layers
            shape = (layers, leaf.size) if layers else (leaf.size,)
            return jax.random.uniform(jax.random.fold_in(base, number[leaf]), shape)

        return score

    return Importance("random", prepare)
