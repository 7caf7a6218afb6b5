# SPDX-License-Identifier: Apache-2.0
"""The learned scales of norms, as network slimming compares them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..._core.patterns import matches
from ..._errors import RecipeError
from ._base import Importance, Measure

if TYPE_CHECKING:
    from ..._core.channels.terms import Leaf
    from .._structured.problem import Problem


def gamma(pattern: str) -> Importance:
    """The absolute scale of the norm behind a channel, |γ|, over the members that match.

    Args:
      pattern: of the key paths of the scales, such as `"*/scale"`.

    >>> gamma("*/scale").name
    'gamma'

    References: Liu et al. 2017, Network Slimming, section 3.
    """

    def prepare(problem: Problem, leaves: list[Leaf]) -> Measure:
        def score(leaf: Leaf) -> Any:
            found = [x for path, _, x in problem.slices(leaf) if matches(pattern, path)]
            if not found:
                raise RecipeError(
                    f"importance gamma: no member of the group of `{problem.groups[leaf].name}` "
                    f"matches {pattern!r}: {', '.join(map(str, problem.groups[leaf].members))}. "
                    "Name other groups in keep, or use another importance."
                )
            return sum(np.sum(np.abs(x), -1) for x in found)

        return score

    return Importance("gamma", prepare)
