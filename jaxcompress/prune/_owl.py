# SPDX-License-Identifier: Apache-2.0
"""OWL: blocks of layers with more outliers are pruned less."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from .._errors import RecipeError

Profile = Callable[[Sequence[Sequence[jax.Array]], float], list[float]]
"""From the scores |w| ‖x‖ of the weights of each block and a sparsity to one for each block."""


def owl(m: float = 5.0, lam: float = 0.08) -> Profile:
    """A layer profile by outliers, for `jc.prune.wanda` and `jc.prune.sparsegpt`.

        D_l = share of the scores A_ij = |W_ij| ‖x_j‖ of block l above m mean(A)
        density_l = 2 λ (D_l - min D) / (max D - min D), moved to the mean 1 - sparsity

    The mean is over weights, so that as many become zero in all as without a profile, up to
    rounding; with blocks of one size it is that of the paper.

    Args:
      m: how many times the mean an outlier is, M in the paper.
      lam: λ, by how much the sparsity of a block may differ from the whole, roughly.

    Raises:
      RecipeError: m or λ not above zero, or (when used) a block that would get a sparsity outside
        [0, 1).

    >>> a, b = jnp.ones((2, 8)), jnp.ones((2, 8)).at[0, 0].set(100.0)
    >>> [round(s, 3) for s in owl()([[a], [b]], 0.5)]
    [0.58, 0.42]

    References: Yin et al. 2024 (OWL), section 3.2; defaults as there for LLaMA.
    """
    if not (m > 0 and lam > 0):
        raise RecipeError(f"owl(m={m!r}, lam={lam!r}): both must be above zero.")

    def profile(blocks: Sequence[Sequence[jax.Array]], sparsity: float) -> list[float]:
        sizes = [sum(a.size for a in block) for block in blocks]
        outliers = []
        for block, size in zip(blocks, sizes, strict=True):
            mean = sum(float(jnp.sum(a)) for a in block) / size
            outliers.append(sum(int(jnp.sum(a > m * mean)) for a in block) / size)
        low, high = min(outliers), max(outliers)
        raw = [2 * lam * (d - low) / (high - low) if high > low else 0.0 for d in outliers]
        mean = sum(r * n for r, n in zip(raw, sizes, strict=True)) / sum(sizes)
        found = [sparsity - (r - mean) for r in raw]
        if not all(0 <= s < 1 for s in found):
            raise RecipeError(
                f"owl(lam={lam}) around a sparsity of {sparsity} gives blocks sparsities from "
                f"{min(found):.3f} to {max(found):.3f}, outside [0, 1). Choose a smaller lam."
            )
        return found

    return profile
