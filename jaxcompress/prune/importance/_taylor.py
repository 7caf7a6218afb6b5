# SPDX-License-Identifier: Apache-2.0
"""What the loss would change by, to first order, without an index."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._errors import RecipeError
from ._base import Importance, Measure

if TYPE_CHECKING:
    from ..._core.channels.terms import Leaf
    from .._structured.problem import Problem


def taylor(loss: Callable) -> Importance:
    """The squared first-order change of the loss, over members and calibration batches.

        I = mean over batches, sum over members (sum_k g_k w_k)²

    Args:
      loss: `loss(params, *batch) -> float` scalar; batches are those of `calibration`, which may
        hold labels: `jaxcompress.Inputs` are not needed, a batch that is a tuple is spread.

    >>> taylor(lambda params, x: 0.0).name
    'taylor'

    References: Molchanov et al. 2019, Importance Estimation for Neural Network Pruning, equation 8
    and section 3.2.
    """

    def prepare(problem: Problem, leaves: list[Leaf]) -> Measure:
        batches = problem.data("importance taylor")
        grad = jax.jit(jax.grad(loss, allow_int=True))
        totals: dict[Leaf, Any] = dict.fromkeys(leaves, 0.0)
        count = 0
        for batch in batches:
            args = batch.args
            if len(args) == 1 and isinstance(args[0], tuple):
                args = args[0]
            g = problem.tree.arrays(grad(problem.params, *args, **batch.kwargs))
            change = [
                np.asarray(w, np.float32) * np.asarray(d, np.float32)
                if jnp.issubdtype(d.dtype, jnp.inexact)
                else np.zeros(np.shape(w))
                for w, d in zip(problem.arrays, g, strict=True)
            ]
            for leaf in leaves:
                for _, _, x in problem.slices(leaf, change):
                    totals[leaf] = totals[leaf] + np.sum(x, -1) ** 2
            count += 1
        if not count:
            raise RecipeError("importance taylor: calibration has no batches.")
        return lambda leaf: totals[leaf] / count

    return Importance("taylor", prepare)
