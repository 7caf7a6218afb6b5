# SPDX-License-Identifier: Apache-2.0
"""What concrete arrays must hold: floating numbers, no NaN, nothing infinite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._errors import FormatError


def check_floating(dtype: Any, what: str) -> None:
    """Raises FormatError unless `dtype` is floating; `what` names the caller."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise FormatError(
            f"{what} takes an array of floating dtype, got {jnp.dtype(dtype)}. "
            "Convert it with .astype(float32) if its integers are values and not codes."
        )


def count_nonfinite(x: Any) -> int:
    """Returns how many NaNs and infinities a concrete array has; none where it holds integers."""
    return int(_nonfinite(x)) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else 0


def reject_nan(v: jax.Array, name: str, *, infinite: bool = False) -> None:
    """Raises FormatError if the concrete array v has NaNs, which format `name` cannot hold.

    Args:
        v: floating, any shape.
        name: of the format.
        infinite: whether values that are infinite in float32 are as bad.
    """
    if isinstance(v, Tracer) or not _has_bad(v, infinite):
        return
    bad = np.asarray(_bad(v, infinite))
    first = tuple(int(i) for i in np.argwhere(bad)[0])
    raise FormatError(
        f"{name} has no NaN, but {bad.sum()} of {v.size} scaled values are NaN, the first at "
        f"index {first}. Look for NaN or infinity in the array and its scale."
    )


# One program for an array instead of one for each operation.


@jax.jit
def _nonfinite(x: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(x))


def _bad(v: jax.Array, infinite: bool) -> jax.Array:
    return ~jnp.isfinite(v.astype(jnp.float32)) if infinite else jnp.isnan(v)


_has_bad = jax.jit(lambda v, infinite: jnp.any(_bad(v, infinite)), static_argnums=1)
