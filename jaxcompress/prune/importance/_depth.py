# SPDX-License-Identifier: Apache-2.0
"""Layers of a scan, by what the output changes without each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ._base import Importance, Measure

if TYPE_CHECKING:
    from ..._core.channels.terms import Leaf
    from .._structured.problem import Problem


def cosine() -> Importance:
    """1 - the mean cosine between the outputs with and without an index.

    Every index is removed once and the function is run: it is made for layers of a scan, which
    `jaxcompress.prune.shrink` scores so by itself. Outputs are compared along their last axis, on
    the calibration batches, or the inputs if there are none.

    >>> cosine().name
    'cosine'

    References: the removal test of Men et al. 2024 (ShortGPT), section 2.2, on outputs.
    """

    def prepare(problem: Problem, leaves: list[Leaf]) -> Measure:
        from .._structured.small import small_function, small_params  # takes long to import

        def score(leaf: Leaf) -> Any:
            shapes = [isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(problem.inputs)]
            if any(shapes):
                problem.data("importance cosine, of shapes in place of inputs,")
            calls = (
                [(problem.inputs, {})]
                if problem.batches is None
                else [(b.args, b.kwargs) for b in problem.batches]
            )
            before = [_rows(jax.jit(problem.fn)(problem.params, *a, **k)) for a, k in calls]
            out = []
            for index in range(leaf.size):
                kept = {leaf: np.delete(np.arange(leaf.size), index)}
                fn, params = small_function(problem, kept, True), small_params(problem, kept)
                after = [_rows(fn(params, *a, **k)) for a, k in calls]
                out.append(1 - np.mean([_cosine(a, b) for a, b in zip(before, after)]))
            return np.array(out)

        return score

    return Importance("cosine", prepare)


def _rows(tree: Any) -> list:
    return [x.astype(jnp.float32) for x in jax.tree.leaves(tree) if jnp.ndim(x)]


def _cosine(a: list, b: list) -> float:
    found = [
        jnp.mean(
            jnp.sum(x * y, -1)
            / jnp.maximum(jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1), 1e-30)
        )
        for x, y in zip(a, b, strict=True)
    ]
    return float(np.mean([np.asarray(x) for x in found]))
