# SPDX-License-Identifier: Apache-2.0
"""AWQ (Lin et al. 2023): inputs that are large get weights that are scaled up before rounding."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._errors import FormatError
from ..formats import Format
from . import checks
from .gram import folded, output_errors
from .lead import over_lead, over_outputs
from .rounder import Rounder, nearest, rounder_of, table

_SMALLEST = np.float32(1e-4)


class AWQResult(NamedTuple):
    """Scales of inputs.

    Attributes:
        scale: multiplies the weights and divides the inputs, float32[*lead, in].
        ratio: r that was chosen, float32[*lead].
        losses: squared errors of the outputs over all tokens for each ratio,
            float32[*lead, ratios]. The first is that of rounding to nearest.
    """

    scale: jax.Array
    ratio: jax.Array
    losses: jax.Array


def awq(
    w: Any,
    gram: Any,
    magnitude: Any,
    rounder: Format | Rounder,
    *,
    group_size: int | None = None,
    ratios: int = 20,
) -> AWQResult:
    """Finds scales of inputs for which rounding to nearest errs least in the outputs.

        s = a^r / sqrt(max a^r min a^r)      r = argmin ‖W x - (Q(W s) / s) x‖²

    The loss is that of the outputs of these weights over all tokens, exactly, from their Gram
    matrix: it costs no tokens, and takes as long for many as for few.

    Args:
        w: weights, float[*lead, out, in], or several that read the same input and get the same
            scale, as query, key and value; their losses are added.
        gram: float[*lead, in, in], sum or mean of x xᵀ over calibration tokens.
        magnitude: a, float[*lead, in], mean of |x|.
        rounder: number format, or how values that share a scale are rounded.
        group_size: consecutive inputs that share a scale; by default all.
        ratios: how many r are tried: 0, 1 / ratios, ...

    Raises:
        FormatError: if an argument has a wrong shape or is not finite.
        SiteError: if the Gram matrix is zero.

    Example:
        >>> from jaxcompress import formats
        >>> w, x = jnp.array([[0.3, 1.0]]), jnp.array([[8.0, 0.1]])
        >>> found = awq(w, x.T @ x, jnp.abs(x[0]), formats.int2)
        >>> bool(found.losses.min() < found.losses[0])
        True

    References: Lin et al. 2023, equations 4 and 5, and the code published with it, which compares
    the outputs of a whole block of layers on a sample of tokens.
    """
    parts = w if isinstance(w, Sequence) and jnp.ndim(w[0]) > 1 else [w]
    arrays = [checks.weights(part, group_size) for part in parts]
    if len({(*a.shape[:-2], a.shape[-1]) for a in arrays}) > 1:
        shapes = [list(a.shape) for a in arrays]
        raise FormatError(f"Weights that read the same input have the same inputs, got {shapes}.")
    joined = jnp.concatenate(arrays, axis=-2)
    g = checks.inputs(gram, joined, 2, "gram")
    a = checks.inputs(magnitude, joined, 1, "magnitude")
    checks.second_moments(g)
    if not isinstance(ratios, int) or ratios < 1:
        raise FormatError(f"ratios={ratios!r}: expected how many to try, at least 1.")
    return AWQResult(*_search(joined, g, a, rounder_of(rounder), group_size, ratios))


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _search(
    w: jax.Array, gram: jax.Array, magnitude: jax.Array,
    rounder: Rounder, group_size: int | None, ratios: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    grid = jnp.asarray(np.arange(ratios, dtype=np.float32) / ratios)

    def one(w, gram, magnitude) -> tuple:
        f = folded(gram)
        scales = jax.vmap(lambda r: scale_of(magnitude, r))(grid)
        shared = lax.map(lambda s: rounder.shared((w * s[None]).T), scales)

        def panel(w: jax.Array) -> jax.Array:
            w = w.T

            def loss(x: tuple[jax.Array, Any]) -> jax.Array:
                s, shared = x
                v = w * s[:, None]
                found = table(v, rounder, group_size, shared)
                values = nearest(v, found, rounder, group_size)[1]
                return output_errors(values / s[:, None] - w, f)

            return lax.map(loss, (scales, shared)).T

        losses = jnp.sum(over_outputs(panel, rounder.coupled)(w), axis=0)
        best = jnp.argmin(losses)
        return scales[best], grid[best], losses

    return over_lead(one, w.ndim - 2)(w, gram, magnitude)


def scale_of(magnitude: jax.Array, ratio: Any) -> jax.Array:
    """Returns a^r / sqrt(max a^r min a^r), where a^r is at least 1e-4.

    >>> scale_of(jnp.array([16.0, 1.0]), 0.5)
    Array([2. , 0.5], dtype=float32)
    """
    s = jnp.maximum(magnitude**ratio, _SMALLEST)
    return s / jnp.sqrt(jnp.max(s) * jnp.min(s))
