# SPDX-License-Identifier: Apache-2.0
"""Arguments of solvers: their shapes, and what concrete arrays must hold."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._errors import FormatError, SiteError
from ..formats._checks import check_floating, count_nonfinite


def weights(w: Any, group_size: int | None = None) -> jax.Array:
    """Returns w, [*lead, out, in], in float32.

    Raises:
        FormatError: if it is no floating array of two axes or more, not finite, or if the groups
            are no groups.
    """
    w = jnp.asarray(w)
    check_floating(w.dtype, "a solver")
    if w.ndim < 2 or not w.size:
        raise FormatError(f"A solver takes weights [*lead, out, in], got the shape {w.shape}.")
    if group_size is not None and (not isinstance(group_size, int) or group_size < 1):
        raise FormatError(f"group_size={group_size!r}: expected a number of inputs, or None.")
    finite(w, "weights")
    return w.astype(jnp.float32)


def inputs(a: Any, w: jax.Array, axes: int, what: str) -> jax.Array:
    """Returns `a` in float32, which has the leading axes of w and its inputs on so many axes more.

    Raises:
        FormatError: if it has another shape or is not finite.
    """
    a = jnp.asarray(a)
    wanted = (*w.shape[:-2], *(w.shape[-1],) * axes)
    if a.shape != wanted:
        raise FormatError(
            f"{what} of weights {list(w.shape)} ([*lead, out, in]) has the shape {list(wanted)}, "
            f"got {list(a.shape)}."
        )
    finite(a, what)
    return a.astype(jnp.float32)


def mask(a: Any, w: jax.Array) -> jax.Array:
    """Returns a mask of the weights w.

    Raises:
        FormatError: if it is not boolean or has another shape.
    """
    a = jnp.asarray(a)
    if a.dtype != bool or a.shape != w.shape:
        raise FormatError(
            f"A mask of weights {list(w.shape)} is bool{list(w.shape)}, True where they stay, "
            f"got {a.dtype}{list(a.shape)}."
        )
    return a


def scales(tree: Any, w: jax.Array, groups: int) -> None:
    """Raises FormatError unless all leaves have the shape of scales of the weights w."""
    wanted = (*w.shape[:-1], groups)
    for a in jax.tree.leaves(tree):
        if jnp.shape(a) != wanted:
            raise FormatError(
                f"Scales of weights {list(w.shape)} in {groups} groups have the shape "
                f"{list(wanted)}, got {list(jnp.shape(a))}."
            )


def finite(a: jax.Array, what: str) -> None:
    """Raises FormatError if a concrete array holds NaN or infinity."""
    if isinstance(a, Tracer) or not count_nonfinite(a):
        return
    bad = ~np.isfinite(np.asarray(a, np.float32))
    first = tuple(int(i) for i in np.argwhere(bad)[0])
    raise FormatError(
        f"{int(bad.sum())} of {bad.size} numbers of the {what} are NaN or infinite, the first at "
        f"index {first}. Look for them in the parameters and the calibration batches."
    )


def second_moments(h: jax.Array) -> None:
    """Raises SiteError if a concrete sum of x xᵀ, [*lead, in, in], is one of no tokens.

    Raises:
        FormatError: if its diagonal is negative somewhere.
    """
    if isinstance(h, Tracer):
        return
    diagonal = np.asarray(jnp.diagonal(h, axis1=-2, axis2=-1))
    if (diagonal < 0).any():
        raise FormatError(
            "The hessian has negative numbers on its diagonal, which should be sums of squares."
        )
    empty = ~diagonal.any(axis=-1)
    if empty.any():
        where = [tuple(int(i) for i in index) for index in np.argwhere(empty)]
        of = f" of {where[:5]}, {len(where)} of {empty.size}," if empty.ndim else ""
        raise SiteError(
            f"The hessian{of} is zero: no token came there, or only zeros. Calibrate with more or "
            "other batches, or round to nearest there."
        )
