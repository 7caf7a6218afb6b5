# SPDX-License-Identifier: Apache-2.0
"""What flows through an index on the calibration data, alone or times the weights that read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..._errors import RecipeError
from ._base import Importance, Measure

if TYPE_CHECKING:
    from ..._core.channels.terms import Leaf
    from .._structured.consumers import Consumer
    from .._structured.problem import Problem


def activation() -> Importance:
    """The norm of what an index carries into the sites that read it: sqrt(sum_t x_t²).

    References: the activation criterion of Molchanov et al. 2017, section 2.2, with norms.

    >>> activation().name
    'activation'
    """

    def weighed(problem: Problem, consumer: Consumer, norm: np.ndarray) -> np.ndarray:
        return norm**2

    return Importance("activation", _over_consumers(weighed, "activation", np.sqrt))


def wanda() -> Importance:
    """Weights that read an index times the norm of what they read: sum_ij |w_ij| ||x_j||.

    References: Sun et al. 2023, equation 1, summed over what is removed with an index.

    >>> wanda().name
    'wanda'
    """

    def weighed(problem: Problem, consumer: Consumer, norm: np.ndarray) -> np.ndarray:
        from .._structured.weights import site_weight

        w = site_weight(problem, consumer)
        if w is None:
            raise RecipeError(
                f"importance wanda: the weight of `{consumer.site.name}` is computed, not a "
                "parameter as a whole. Use activation, or another importance."
            )
        return np.sum(np.abs(np.asarray(w, np.float32)), -2) * norm

    return Importance("wanda", _over_consumers(weighed, "wanda", lambda s: s))


def _over_consumers(weighed: Any, name: str, finish: Any) -> Any:
    """Sums `weighed` of [*stack, *lead, in] over the inputs of every index, and over the sites."""

    def prepare(problem: Problem, leaves: list[Leaf]) -> Measure:
        from .._structured.consumers import of_layers, reading, statistics  # takes long to import

        sites = reading(problem, leaves)
        norms = statistics(problem, list(sites), ("norm",), f"importance {name}") if sites else {}
        parts: dict[Leaf, list] = {leaf: [] for leaf in leaves}
        for site, (consumer, held) in sites.items():
            values = weighed(problem, consumer, np.asarray(norms[site]["norm"]))
            for leaf in held:
                at = consumer.places(leaf)
                picked = values[..., at.ravel()].reshape(*values.shape[:-1], *at.shape).sum(-1)
                parts[leaf].append(of_layers(problem, consumer, leaf, picked))

        def score(leaf: Leaf) -> Any:
            if not parts[leaf]:
                raise RecipeError(
                    f"importance {name}: no matmul or convolution reads the group of "
                    f"`{problem.groups[leaf].name}`. Use another importance there."
                )
            return finish(sum(parts[leaf]))

        return score

    return prepare
