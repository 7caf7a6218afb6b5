# SPDX-License-Identifier: Apache-2.0
"""What concrete arrays must hold: floating numbers, no NaN, nothing infinite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._errors import FormatError

_SMALL = 2**16  # values that are faster read than a program is compiled


def check_floating(dtype: Any, what: str) -> None:
    """Raises FormatError unless `dtype` is floating; `what` names the caller."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise FormatError(
            f"{what} takes an array of floating dtype, got {jnp.dtype(dtype)}. "
            "Convert it with .astype(float32) if its integers are values and not codes."
        )


def count_nonfinite(x: Any) -> int:
    """Returns how many NaNs and infinities a concrete array has; none where it holds integers."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return 0
    if np.size(x) <= _SMALL and getattr(x, "is_fully_addressable", True):
        return int(np.sum(~np.isfinite(np.asarray(x))))
    return int(_nonfinite(x))


def reject_nan(v: jax.Array, name: str, *, infinite: bool = False) -> None:
    """Raises FormatError if the concrete array v has NaNs, which format `name` cannot hold.

    Args:
        v: floating, any shape.
        name: of the format.
        infinite: whether values that are infinite in float32 are as bad.
    """
    if isinstance(v, Tracer):
        return
    v = v if v.dtype.itemsize <= 4 else v.astype(jnp.float32)
    if not count_nonfinite(v):
        return
    values = np.asarray(v.astype(jnp.float32))
    bad = ~np.isfinite(values) if infinite else np.isnan(values)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise FormatError(
            f"{name} has no NaN, but {bad.sum()} of {v.size} scaled values are NaN, the first at "
            f"index {first}. Look for NaN or infinity in the array and its scale."
        )


@jax.jit
def _nonfinite(x: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(x))
