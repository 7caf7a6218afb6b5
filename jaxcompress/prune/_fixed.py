# SPDX-License-Identifier: Apache-2.0
"""Masks that are given and stay: those made at initialization, lottery tickets."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .._core.provenance import key_path
from .._errors import JaxCompressError
from ._bits import opened
from ._link import Pruner, Rule, pruner
from ._targets import Target


@dataclasses.dataclass(frozen=True)
class Given:
    """The arrays that have a mask."""

    masks: Any

    def find(self, params: Any) -> list[Target]:
        ours, theirs = jax.tree.structure(params), jax.tree.structure(self.masks)
        if ours != theirs:
            raise JaxCompressError(
                f"fixed: the parameters are {ours} and the masks {theirs}. Masks have the "
                "structure of the parameters, with True for what is left alone."
            )
        found = []
        flat, _ = jax.tree_util.tree_flatten_with_path(params)
        for i, ((path, x), mask) in enumerate(zip(flat, jax.tree.leaves(self.masks), strict=True)):
            name = key_path(path)
            if jnp.ndim(mask) and mask.shape != x.shape:
                raise JaxCompressError(
                    f"fixed: the mask of `{name}` is {list(mask.shape)} and the array "
                    f"{list(x.shape)}."
                )
            if jnp.ndim(mask):
                found.append(Target(i, name, x.shape, None))
        return found


def fixed(masks: Any) -> Pruner:
    """Keeps what the masks keep, from the first step on; the last link of a chain of optax.

    Args:
      masks: pytree like the parameters, bool arrays, or a scalar True for what is left alone.

    Raises:
      JaxCompressError: (in `init`) masks of another structure or shape.

    >>> import optax
    >>> tx = optax.chain(optax.sgd(0.1), fixed({"w": jnp.array([True, False])}))
    >>> params = {"w": jnp.ones(2)}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].tolist()
    [0.8999999761581421, 0.0]
    """
    masks = opened(masks)
    leaves = [jnp.asarray(mask) for mask in jax.tree.leaves(masks)]
    rule = Rule(
        "fixed",
        level=lambda step: 0.0,  # where it starts: masks never change
        choose=lambda targets, level, step, weights: weights.masks,
        start=0.0,
        due=lambda step: step < 0,
        first=lambda targets: [leaves[t.index] for t in targets],
    )
    return pruner(rule, Given(masks))
