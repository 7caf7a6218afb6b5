# SPDX-License-Identifier: Apache-2.0
"""Masks: pytrees of bools, True where a weight is kept."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .._errors import JaxCompressError
from ._bits import opened


def apply_masks(params: Any, masks: Any) -> Any:
    """The parameters with exact zeros where a mask is False.

    Args:
      params: pytree of arrays.
      masks: pytree of the same structure: bool arrays, or a scalar True for what is left alone;
        as `jc.prune.masks` gives them.

    Raises:
      JaxCompressError: other structures or shapes.

    >>> apply_masks({"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([True, False])})
    {'w': Array([1., 0.], dtype=float32)}
    """
    masks = opened(masks)
    ours, theirs = jax.tree.structure(params), jax.tree.structure(masks)
    if ours != theirs:
        raise JaxCompressError(
            f"apply_masks: the parameters are {ours} and the masks {theirs}. Masks have the "
            "structure of the parameters, with True for what is left alone."
        )

    def one(path: Any, x: Any, mask: Any) -> Any:
        if mask is True:
            return x
        if (
            not jnp.issubdtype(jnp.result_type(mask), bool)
            or jnp.ndim(mask)
            and jnp.shape(mask) != jnp.shape(x)
        ):
            raise JaxCompressError(
                f"apply_masks: the mask of `{jax.tree_util.keystr(path)}` is "
                f"{jnp.result_type(mask)}{list(jnp.shape(mask))}, expected bool{list(jnp.shape(x))}"
                " or a scalar."
            )
        return jnp.where(mask, x, jnp.zeros((), jnp.result_type(x))) if jnp.ndim(mask) else x

    return jax.tree_util.tree_map_with_path(one, params, masks)


def sparsity(tree: Any, *, min_ndim: int = 2) -> Any:
    """The part of the weights that are zero (of a tree of masks: False).

    Args:
      tree: pytree of arrays.
      min_ndim: arrays with fewer axes do not count: biases, norms. Pruners leave the same alone.

    Returns:
      A number in [0, 1]; float32[] inside of jit.

    >>> sparsity({"w": jnp.array([[1.0, 0.0]]), "b": jnp.zeros(4)})
    0.5
    """
    leaves = [x for x in jax.tree.leaves(opened(tree)) if jnp.ndim(x) >= max(min_ndim, 1)]
    size = sum(x.size for x in leaves)
    if not size:
        return 0.0
    if any(isinstance(x, Tracer) for x in leaves):
        return sum(jnp.sum(x == 0, dtype=jnp.float32) for x in leaves) / size
    return sum(int(jnp.sum(x == 0)) for x in leaves) / size
