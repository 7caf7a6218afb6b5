# SPDX-License-Identifier: Apache-2.0
"""Clip search: how far the values of a group may go, so that rounding them errs least."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._errors import FormatError
from ..formats import Format
from . import checks
from .gram import of_groups
from .lead import over_lead, over_outputs
from .rounder import Rounder, filled, rounder_of

FACTORS = tuple((1 - np.arange(10) / 20).tolist())


def clip(
    w: Any,
    rounder: Format | Rounder,
    *,
    group_size: int | None = None,
    importance: Any = None,
    factors: Sequence[float] = FACTORS,
) -> jax.Array:
    """Finds the extent a to which weights are clipped: Q(clip(w, -a, a)) errs least.

        no importance         sum_i d_i²        with d = Q(clip(w, -a, a)) - w
        diagonal h of H       sum_i h_i d_i²
        Gram matrix           d G dᵀ of the group: the error of its share of the output (AWQ)

    Args:
        w: weights, float[*lead, out, in].
        rounder: number format, or how values that share a scale are rounded.
        group_size: consecutive inputs that share a scale; by default all.
        importance: None, float[*lead, in], or float[*lead, in, in], sums over calibration tokens.
        factors: times max|w| of a group; the first of equals is chosen.

    Returns:
        a, float32[*lead, out, groups]. Clip the weights and round them, or give `gptq` the scales
        of the clipped weights and those that are not clipped.

    Raises:
        FormatError: if an argument has a wrong shape or is not finite.

    Example:
        >>> from jaxcompress import formats
        >>> clip([[1.0, 1.0, -1.0, 2.0]], formats.ternary)
        Array([[2.]], dtype=float32)

    References: Lin et al. 2023 (AWQ), `auto_clip.py` of the code published with it, without its
    limit of 512 tokens; Frantar et al. 2022, the option `mse` of `quant.py`.
    """
    w = checks.weights(w, group_size)
    if importance is not None:
        axes = jnp.ndim(importance) - (w.ndim - 2)
        importance = checks.inputs(importance, w, 2 if axes == 2 else 1, "importance")
    if not factors or not all(0 < f <= 1 for f in factors):
        raise FormatError(f"factors={tuple(factors)}: expected numbers in (0, 1], one at least.")
    return _search(w, importance, rounder_of(rounder), group_size, tuple(factors))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _search(
    w: jax.Array, importance: Any, rounder: Rounder,
    group_size: int | None, factors: tuple[float, ...],
) -> jax.Array:  # fmt: skip
    size = group_size or w.shape[-1]

    def one(w, importance) -> jax.Array:
        shared = rounder.shared(w.T)
        if importance is None:
            weigh = lambda d: d  # noqa: E731
        elif importance.ndim == 1:
            h = filled(importance[:, None], size).reshape(-1, size, 1)
            weigh = lambda d: h * d  # noqa: E731
        else:
            gram = of_groups(importance, size)
            weigh = lambda d: gram @ d  # noqa: E731

        def panel(w: jax.Array) -> jax.Array:
            v = filled(w.T, size).reshape(-1, size, w.shape[0])
            extent = jnp.max(jnp.abs(v), axis=1, keepdims=True)

            def rounded(v: jax.Array) -> jax.Array:
                s = rounder.find(v, shared)
                return rounder.from_grid(rounder.to_grid(v, s), s)

            def step(state: tuple, factor: jax.Array) -> tuple[tuple, None]:
                least, best = state
                a = extent * factor
                d = jax.vmap(rounded)(jnp.clip(v, -a, a)) - v
                error = jnp.sum(d * weigh(d), axis=1, keepdims=True)
                better = error < least
                return (jnp.where(better, error, least), jnp.where(better, a, best)), None

            start = jnp.full_like(extent, jnp.inf), extent
            (_, best), _ = lax.scan(step, start, jnp.asarray(factors, jnp.float32))
            return best[:, 0].T

        return over_outputs(panel, rounder.coupled)(w)

    return over_lead(one, w.ndim - 2)(w, importance)
