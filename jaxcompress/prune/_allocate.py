# SPDX-License-Identifier: Apache-2.0
"""From scores to masks: how many of which array are kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._errors import RecipeError
from .._solvers.select import largest
from ._distributions import Distribution, distribution_of
from ._structures import Structure, pool, spread, unit_sizes, unstructured
from ._targets import Target


def pruned_count(sparsity: Any, size: int) -> Any:
    """How many of `size` become zero: sparsity * size, rounded half to even.

    Exact for a number; of a float32[] it is what float32 makes of the product.

    >>> pruned_count(0.9, 25), int(pruned_count(jnp.float32(0.9), 25))
    (22, 22)
    """
    if isinstance(sparsity, (int, float)):
        if not 0 <= sparsity <= 1:
            raise RecipeError(
                f"the schedule gave the sparsity {sparsity!r}, which is not in [0, 1]"
            )
        return round(sparsity * size)
    share = jnp.clip(jnp.asarray(sparsity, jnp.float32), 0, 1)
    return jnp.round(share * size).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Allocation:
    """How scores become masks.

    Attributes:
      distribution: name or function; None for one threshold over all arrays.
      structure: the units that are pruned together.
    """

    distribution: Distribution | None
    structure: Structure

    @classmethod
    def of(cls, distribution: str | Distribution, structure: Structure = unstructured):
        return cls(distribution_of(distribution), structure)

    def check(self, targets: Sequence[Target]) -> None:
        """Raises where structures do not fit, or two settings contradict each other."""
        for t in targets:
            sizes = unit_sizes(self.structure, t.shape, t.path)
            if self.distribution is None and t.layers is not None:
                raise RecipeError(
                    f'distribution="global" has one threshold for everything, and per_layer asks '
                    f"for one count in each layer of `{t.path}`. Leave one of them out."
                )
            if self.distribution is None and math.prod(sizes) > 1:
                raise RecipeError(
                    'distribution="global" compares single weights, and the units of '
                    f"`{t.path}` have {math.prod(sizes)}. Use uniform or erk."
                )

    def kept(self, targets: Sequence[Target], sparsity: Any) -> list[Any]:
        """How many units of each target (of each layer) are kept."""
        assert self.distribution is not None
        shapes = [t.shape for t in targets for _ in range(t.layers or 1)]
        shares, found, place = list(self.distribution(shapes, sparsity)), [], 0
        for t in targets:
            sizes = unit_sizes(self.structure, t.shape, t.path)
            units = math.prod(t.shape) // math.prod(sizes)
            found.append(units - pruned_count(shares[place], units))
            place += t.layers or 1
        return found

    def masks(
        self, targets: Sequence[Target], scores: Sequence[jax.Array], sparsity: Any
    ) -> list[jax.Array]:
        """Masks that keep the largest scores."""
        if self.distribution is None:
            size = sum(x.size for x in scores)
            return largest(scores, size - pruned_count(sparsity, size))
        counts = self.kept(targets, sparsity)
        return [self.top(t, x, k) for t, x, k in zip(targets, scores, counts, strict=True)]

    def top(self, target: Target, scores: jax.Array, count: Any) -> jax.Array:
        """The mask that keeps the `count` best units of a target (of each layer)."""
        sizes = unit_sizes(self.structure, target.shape, target.path)

        def one(scores: jax.Array) -> jax.Array:
            return spread(largest([pool(scores, sizes)], count)[0], sizes)

        return one(scores) if target.layers is None else jax.vmap(one)(scores)


def random_scores(key: jax.Array, targets: Sequence[Target]) -> list[jax.Array]:
    """Uniform random numbers for each target."""
    out = []
    for i, t in enumerate(targets):
        shape = t.shape if t.layers is None else (t.layers, *t.shape)
        out.append(jax.random.uniform(jax.random.fold_in(key, i), shape))
    return out


def key_of(key: int | jax.Array) -> jax.Array:
    """A random key; an integer is a seed."""
    return jax.random.key(key) if isinstance(key, int) else key
