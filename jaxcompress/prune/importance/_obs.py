# SPDX-License-Identifier: Apache-2.0
"""What the outputs lose without an index when the weights of all others make up for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..._errors import RecipeError
from ._base import Importance, Measure

if TYPE_CHECKING:
    from ..._core.channels.terms import Leaf
    from .._structured.problem import Problem


def obs(damping: float = 0.01) -> Importance:
    """The squared error of the sites that read an index, after their least-squares repair.

        I = sum over outputs  w_S ((H⁻¹)_SS)⁻¹ w_Sᵀ        H = sum x xᵀ + λ I

    S are the inputs of an index, as the 64 of a head. Indices are scored one by one: what two of
    them share is counted for both.

    Args:
      damping: λ as a fraction of the mean of the diagonal.

    >>> obs().name
    'obs'

    References: Hassibi and Stork 1993, Optimal Brain Surgeon, equation 5, for groups as in Kurtić
    et al. 2023, ZipLM, equation 3.
    """

    def prepare(problem: Problem, leaves: list[Leaf]) -> Measure:
        from .._structured.consumers import of_layers, reading, statistics  # takes long to import
        from .._structured.weights import site_weight

        sites = reading(problem, leaves)
        found = statistics(problem, list(sites), ("gram",), "importance obs") if sites else {}
        parts: dict[Leaf, list] = {leaf: [] for leaf in leaves}
        for name, (consumer, held) in sites.items():
            w = site_weight(problem, consumer)
            if w is None:
                raise RecipeError(
                    f"importance obs: the weight of `{name}` is computed, not a parameter as a "
                    "whole. Use activation, or another importance."
                )
            gram = np.asarray(found[name]["gram"], np.float64)
            w = np.broadcast_to(np.asarray(w, np.float64), (*gram.shape[:-2], *w.shape[-2:]))
            for leaf in held:
                at = consumer.places(leaf)
                scores = np.zeros((*gram.shape[:-2], leaf.size))
                for index in np.ndindex(gram.shape[:-2]):
                    scores[index] = _losses(w[index], gram[index], at, damping)
                parts[leaf].append(of_layers(problem, consumer, leaf, scores))

        def score(leaf: Leaf) -> Any:
            if not parts[leaf]:
                raise RecipeError(
                    "importance obs: no matmul or convolution reads the group of "
                    f"`{problem.groups[leaf].name}`. Use another importance there."
                )
            return sum(parts[leaf])

        return score

    return Importance("obs", prepare)


def _losses(w: np.ndarray, gram: np.ndarray, at: np.ndarray, damping: float) -> np.ndarray:
    """float[size]: the loss of w [out, in] without the inputs `at` of each index."""
    mean = np.mean(np.diagonal(gram)) or 1.0
    inverse = np.linalg.inv(gram + damping * mean * np.eye(len(gram)))
    if at.shape[1] == 1:
        places = at[:, 0]
        return np.sum(w[:, places] ** 2, 0) / np.diagonal(inverse)[places]
    blocks = inverse[at[:, :, None], at[:, None, :]]  # [size, n, n]
    taken = w[:, at].transpose(1, 2, 0)  # [size, n, out]
    return np.sum(taken * np.linalg.solve(blocks, taken), (1, 2))
