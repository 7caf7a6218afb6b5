# SPDX-License-Identifier: Apache-2.0
"""A function with masked weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .._core import typed
from .._errors import JaxCompressError
from ._masks import apply_masks


def masked(fn: Callable, masks: Any, *, argnums: int | str = 0) -> Callable:
    """`fn` with zeros in place of the weights that masks leave out.

    Gradients at these weights are zero. A masked weight is still a weight to the other transforms,
    by the same name, at every site that reads it: `quantize_aware(masked(fn, masks), recipe)` and
    `masked(quantize_aware(fn, recipe), masks)` compute the same, also with `jc.QuantParams`.

    For a forward pass or a loss. A train step with a pruner in its optimizer needs none: its
    parameters have the zeros already.

    Args:
      fn: any function of parameters.
      masks: pytree like the parameters, bool arrays or True.
      argnums: position (or name of the keyword) of the argument that holds the parameters.

    Returns:
      A function with the signature of `fn`.

    Raises:
      JaxCompressError: (when called) masks of another structure, or no such argument.

    >>> import jax, jax.numpy as jnp
    >>> loss = masked(lambda p, x: x @ p["w"], {"w": jnp.array([True, False])})
    >>> jax.grad(loss)({"w": jnp.ones(2)}, jnp.array([2.0, 3.0]))["w"].tolist()
    [2.0, 0.0]
    """

    def apply(params: Any) -> Any:
        if typed.is_typed(params) and params.weights is not None:
            weights = apply_masks(params.weights, masks)
            return type(params)(weights, params.learned, params.statistics)
        return apply_masks(params, masks)

    @functools.wraps(fn, updated=())
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if isinstance(argnums, int) and -len(args) <= argnums < len(args):
            place = argnums % len(args)
            args = (*args[:place], apply(args[place]), *args[place + 1 :])
        elif argnums in kwargs:
            kwargs[argnums] = apply(kwargs[argnums])
        else:
            raise JaxCompressError(
                f"masked: argnums={argnums!r} names no argument of a call with {len(args)} "
                f"positional arguments and the keywords {sorted(kwargs)}."
            )
        return fn(*args, **kwargs)

    return wrapped
