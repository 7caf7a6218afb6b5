# SPDX-License-Identifier: Apache-2.0
"""L0 regularization: each weight is multiplied with a random gate that may be exactly 0 or 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._errors import RecipeError
from ._soft import Gate, SoftPruned
from ._structures import Structure, spread, unit_sizes, unstructured
from ._targets import Patterns, Target, Targets

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1  # temperature and stretch, section 4 of the paper


def l0(
    fn: Callable,
    *,
    open_share: float = 0.5,
    structure: Structure = unstructured,
    pattern: Patterns = "*",
    exclude: Patterns = (),
    min_ndim: int = 2,
) -> SoftPruned:
    """`fn` of weights times hard-concrete gates z in [0, 1], whose log alpha is trained.

        s = sigmoid((log u - log(1 - u) + log alpha) / beta), u uniform
        z = min(1, max(0, s (zeta - gamma) + gamma))

    with beta = 2/3, gamma = -0.1, zeta = 1.1. Calls with `prune_key=` draw u; without it, and in
    `harden`, z = min(1, max(0, sigmoid(log alpha) (zeta - gamma) + gamma)). `penalty(held)` is the
    expected number of gates that are not 0, divided by the number of all; add it to the loss with
    a factor that sets the sparsity.

    Args:
      fn: any function whose first argument are the parameters.
      open_share: sigmoid(log alpha) at first, the same for all gates, in (0, 1).
      structure: what has a gate together: `unstructured`, `blocks(r, c)`, `channels(axis)`.
      pattern, exclude, min_ndim: as in `magnitude`.

    Raises:
      RecipeError: open_share out of range; when called, a pattern that matches nothing.
      SiteError: (in `init`) units that do not divide an array.

    >>> loss = l0(lambda w, x: jnp.sum(x @ w), structure=lambda shape: shape)
    >>> held = loss.init(jnp.array([[1.0], [3.0]]))
    >>> print(loss(held, jnp.array([[1.0, 1.0]])))  # the gate is half open
    2.0

    References: Louizos et al. 2018, Learning Sparse Neural Networks through L0 Regularization,
    equations 10 to 13.
    """
    if not 0 < open_share < 1:
        raise RecipeError(f"l0(open_share={open_share!r}): it must lie between 0 and 1.")
    first = math.log(open_share / (1 - open_share))

    def sizes(target: Target) -> tuple[int, ...]:
        return unit_sizes(structure, target.shape, target.path)

    def start(target: Target, w: jax.Array) -> jax.Array:
        units = tuple(n // u for n, u in zip(target.shape, sizes(target)))
        return jnp.full(units, first, jnp.float32)

    def masks(targets: Sequence[Target], weights: list, scores: list, level: Any) -> list:
        return [spread(_gate(s) > 0, sizes(t)) for t, s in zip(targets, scores, strict=True)]

    def forward(w: jax.Array, s: jax.Array, mask: Any, key: Any, target: Target) -> jax.Array:
        return w * spread(_gate(s, key), sizes(target)).astype(w.dtype)

    def check(targets: Sequence[Target]) -> None:
        for t in targets:
            sizes(t)

    gate = Gate(
        "l0",
        level=None,
        start=start,
        masks=masks,
        forward=forward,
        harden=lambda w, s, mask, target: forward(w, s, mask, None, target),
        penalty=_open,
        random=True,
    )
    return SoftPruned(fn, gate, Targets(pattern, exclude, (), min_ndim), check)


def _gate(log_alpha: jax.Array, key: Any = None) -> jax.Array:
    """z, drawn if there is a key."""
    s = jax.nn.sigmoid(log_alpha)
    if key is not None:
        u = jax.random.uniform(key, log_alpha.shape, minval=1e-6, maxval=1 - 1e-6)
        s = jax.nn.sigmoid((jnp.log(u) - jnp.log1p(-u) + log_alpha) / BETA)
    return jnp.clip(s * (HIGH - LOW) + LOW, 0, 1)


def _open(scores: list[jax.Array]) -> jax.Array:
    """The share of gates that are not zero, expected."""
    size = sum(s.size for s in scores)
    shift = BETA * math.log(-LOW / HIGH)
    return sum((jnp.sum(jax.nn.sigmoid(s - shift)) for s in scores), start=jnp.zeros(())) / size
