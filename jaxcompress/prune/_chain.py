# SPDX-License-Identifier: Apache-2.0
"""A chain of optax that knows that a pruner ends it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from .._errors import RecipeError
from ._bits import is_bits
from ._link import Pruner, find_states, weights_of


def chain(*links: Any) -> optax.GradientTransformationExtraArgs:
    """`optax.chain` for links of which the last is a pruner.

    It checks that, hands the gradients that come in over to the pruner (`grads=`), and sets the
    moments of weights that grow again to zero: every array in the state of the other links that
    belongs to such a weight by its key path and has its shape. Factored moments (Adafactor) have
    another shape and stay.

    Args:
      *links: optax transformations, then pruners. With `optax.MultiSteps` around it, this is what
        goes inside.

    Raises:
      RecipeError: the last link is no pruner, or another one stands behind a pruner.

    >>> import jaxcompress as jc
    >>> tx = chain(optax.adam(1e-3), jc.prune.rigl(0.9))
    """
    ours = [isinstance(link, Pruner) for link in links]
    if not any(ours) or ours != sorted(ours):
        where = [i for i, is_ours in enumerate(ours) if is_ours]
        raise RecipeError(
            f"jc.prune.chain: the last link must be a pruner and is none ({len(links)} links, "
            f"pruners at {where}). What stands behind a pruner may move pruned weights away from "
            "zero: jc.prune.chain(optimizer, pruner)."
        )
    inner = optax.chain(*links)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        extra.setdefault("grads", updates)
        changes, state = inner.update(updates, state, params, **extra)
        for pruning in find_states(state):
            if pruning.grown is not None:
                state = _reset(state, pruning.grown, weights_of(params))
        return changes, state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _reset(state: Any, grown: Any, params: Any) -> Any:
    """The state with zeros where weights have grown."""
    back = jax.tree_util.tree_leaves_with_path(grown, is_leaf=is_bits)
    pairs = zip(back, jax.tree.leaves(params), strict=True)
    known = {path: (bits, x.shape) for (path, bits), x in pairs if is_bits(bits)}
    flat, tree = jax.tree_util.tree_flatten_with_path(state)
    leaves, found = [x for _, x in flat], {}
    for i, (path, x) in enumerate(flat):
        tails = (path[k:] for k in range(len(path) + 1))
        bits, shape = next((known[tail] for tail in tails if tail in known), (None, None))
        if jnp.shape(x) == shape:
            found[i] = bits

    def zeros(moments: list[jax.Array]) -> list[jax.Array]:
        pairs = zip(moments, found.values(), strict=True)
        return [jnp.where(bits.mask(), jnp.zeros((), x.dtype), x) for x, bits in pairs]

    some = jnp.any(jnp.stack([jnp.any(bits.packed) for bits, _ in known.values()]))
    moments = lax.cond(some, zeros, lambda x: x, [leaves[i] for i in found])
    for i, x in zip(found, moments, strict=True):
        leaves[i] = x
    return jax.tree.unflatten(tree, leaves)
