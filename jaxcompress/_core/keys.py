# SPDX-License-Identifier: Apache-2.0
"""The random key of a transform: an extra keyword argument of the function that it makes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from .._errors import RecipeError
from .arguments import name_of

if TYPE_CHECKING:
    from .transform import Transform

TAKES_KEY = "_jaxcompress_takes"  # attribute of a transformed function: its extra keyword


def _takes(fn: Callable, keyword: str) -> bool:
    """Whether a function takes a keyword argument of this name, as far as its signature says."""
    if getattr(fn, TAKES_KEY, None) == keyword:
        return True
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return True
    return keyword in parameters or any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    )


def take_key(fn: Callable, transform: Transform, kwargs: dict[str, Any]) -> Any:
    """Takes the random key of a transform out of the keyword arguments of a call; None if absent.

    Raises:
      RecipeError: it is no key, or nothing is random.
    """
    if transform.keyword not in kwargs:
        return None
    if not transform.random:
        if _takes(fn, transform.keyword):
            return None
        raise RecipeError(
            f"{transform.keyword}= was given to {name_of(fn)}, and nothing in it is rounded at "
            'random: no rule has a gradient with rounding="stochastic". Leave it out.'
        )
    key = kwargs.pop(transform.keyword)
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (shape == () if typed_key else dtype == jnp.uint32 and shape == (2,)):
        found = type(key).__name__ if dtype is None else f"{dtype}{list(shape or ())}"
        raise RecipeError(
            f"{transform.keyword}= takes one random key, jax.random.key(seed), found {found}. "
            "Give a new one at every step: jax.random.fold_in(key, step)."
        )
    return key


def own_key(key: Any, i: int, stack: tuple[int, ...]) -> Any:
    """The key of the i-th site; one for each layer of the scans over stacked layers around it.

    Not by name: where a step holds its parameters is part of it.
    """
    key = jax.random.fold_in(key, i)
    return jax.random.split(key, stack) if stack else key
