# SPDX-License-Identifier: Apache-2.0
"""Wanda (Sun et al. 2023): weights times the norms of their inputs, compared in each output."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from . import checks
from . import sparsity as rules
from .lead import over_lead, over_outputs
from .select import largest, n_of_m


def wanda(
    w: Any, norm: Any, *, sparsity: float | None = None, nm: rules.Pattern | None = None
) -> jax.Array:
    """Chooses the weights that stay: in each output those of the largest |w_ij| ‖x_j‖.

    Args:
        w: float[*lead, out, in].
        norm: float[*lead, in], norms of the inputs over calibration tokens: the square root of the
            diagonal of the Hessian. Ones make it magnitude pruning by outputs.
        sparsity: fraction of the inputs of each output that becomes zero, rounded half to even.
        nm: instead, (N, M): N of every M consecutive inputs stay.

    Returns:
        bool[*lead, out, in], True where weights stay. Of equal scores the first stay.

    Raises:
        RecipeError: if not one of sparsity and nm is given, or it is out of range.
        FormatError: if shapes do not fit, M does not divide the inputs, or an array is not finite.

    Example:
        >>> wanda([[1.0, -2.0, 3.0, 4.0]], [9.0, 1.0, 1.0, 1.0], nm=(2, 4))
        Array([[ True, False, False,  True]], dtype=bool)

    References: Sun et al. 2023, equation 1 and Algorithm 1.
    """
    w = checks.weights(w)
    norm = checks.inputs(norm, w, 1, "norm")
    rules.check(w.shape[-1], sparsity, nm)
    count = w.shape[-1] - round(w.shape[-1] * (sparsity or 0))
    return _choose(w, norm, count, nm)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _choose(w: jax.Array, norm: jax.Array, count: int, nm: rules.Pattern | None) -> jax.Array:
    def one(w: jax.Array, norm: jax.Array) -> jax.Array:
        def panel(w: jax.Array) -> jax.Array:
            scores = jnp.abs(w) * norm[None]
            if nm is not None:
                return n_of_m(scores, *nm, axis=-1)
            return jax.vmap(lambda row: largest([row], count)[0])(scores)

        return over_outputs(panel, nm is not None)(w)

    return over_lead(one, w.ndim - 2)(w, norm)
