# SPDX-License-Identifier: Apache-2.0
"""Pruned parameters without their zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._core.qtensor import QTensor
from .._core.sparse import SparseTensor
from ._masks import apply_masks


def sparse(
    params: Any,
    masks: Any,
    *,
    pattern: tuple[int, int] | None = None,
    axis: int = -2,
    quantize: Callable[[jax.Array], QTensor] | None = None,
) -> Any:
    """The parameters with a `jc.SparseTensor` for every array that has a mask.

    Args:
      params: pytree of arrays.
      masks: as `jc.prune.masks` gives them.
      pattern, axis, quantize: as in `jc.SparseTensor.of`, for all of them.

    Raises:
      JaxCompressError: masks of another structure or shape.
      FormatError: masks that do not have the pattern.

    >>> import jaxcompress as jc
    >>> w = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> stored = sparse({"w": w}, {"w": jnp.array([[True, False], [False, False]])})
    >>> stored["w"].values.tolist(), jc.nbytes(stored)
    ([1.0], 5)
    """
    kept = jax.tree.map(jnp.asarray, masks)
    apply_masks(params, kept)  # says what does not fit

    def one(x: Any, mask: Any) -> Any:
        if not mask.ndim:
            return x
        return SparseTensor.of(x, mask, pattern=pattern, axis=axis, quantize=quantize)

    return jax.tree.map(one, params, kept)
