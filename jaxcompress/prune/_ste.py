# SPDX-License-Identifier: Apache-2.0
"""Straight-through pruning: small weights are read as zero, and go on being trained."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._errors import RecipeError
from .._solvers.select import n_of_m
from ._allocate import Allocation
from ._distributions import Distribution
from ._nm import axis_of
from ._schedules import Schedule, schedule_of
from ._soft import Gate, SoftPruned
from ._structures import Structure, unstructured
from ._targets import Patterns, Target, Targets


def ste(
    fn: Callable,
    sparsity: float | Schedule | tuple[int, int],
    *,
    distribution: str | Distribution = "uniform",
    structure: Structure = unstructured,
    axis: int | Mapping[str, int] = -2,
    pattern: Patterns = "*",
    exclude: Patterns = (),
    per_layer: Patterns = (),
    min_ndim: int = 2,
) -> SoftPruned:
    """`fn` of the weights of largest absolute value, zeros in place of the others.

    Every weight gets the gradient of what was read in its place, pruned or not, so that it may
    come back. There is no state beside the weights.

    Args:
      fn: any function whose first argument are the parameters.
      sparsity: a number in [0, 1), a function from the step (calls then want `prune_step=`), or
        (n, m): n of every m consecutive weights are kept along `axis`.
      distribution, structure, pattern, exclude, per_layer, min_ndim: as in `magnitude`.
      axis: as in `nm`.

    Raises:
      RecipeError: a sparsity outside [0, 1), N > M; when called, a pattern that matches nothing.
      SiteError: (when called) units or groups that do not divide an array.

    >>> loss = ste(lambda w, x: jnp.sum(x @ w), (1, 2))
    >>> w = jnp.array([[1.0], [3.0]])
    >>> jax.value_and_grad(loss)(w, jnp.array([[5.0, 7.0]]))
    (Array(21., dtype=float32), Array([[5.],
           [7.]], dtype=float32))

    References: Bengio et al. 2013; Zhou et al. 2021, equation 6.
    """
    targets = Targets(pattern, exclude, per_layer, min_ndim)
    return _through("ste", fn, sparsity, 0.0, distribution, structure, axis, targets)


def sr_ste(
    fn: Callable,
    sparsity: float | Schedule | tuple[int, int],
    *,
    decay: float = 2e-4,
    distribution: str | Distribution = "uniform",
    structure: Structure = unstructured,
    axis: int | Mapping[str, int] = -2,
    pattern: Patterns = "*",
    exclude: Patterns = (),
    per_layer: Patterns = (),
    min_ndim: int = 2,
) -> SoftPruned:
    """`ste` whose pruned weights decay: their gradient is g + decay * w.

    It makes masks change less and less. `decay` is lambda_W of the paper, where the learning rate
    is 0.1. Everything else as in `ste`. Forward mode is not defined.

    >>> loss = sr_ste(lambda w, x: jnp.sum(x @ w), (1, 2), decay=0.5)
    >>> jax.grad(loss)(jnp.array([[1.0], [3.0]]), jnp.array([[5.0, 7.0]])).ravel().tolist()
    [5.5, 7.0]

    References: Zhou et al. 2021, Learning N:M Fine-grained Structured Sparse Neural Networks From
    Scratch, equation 9.
    """
    if not 0 <= decay < float("inf"):
        raise RecipeError(f"sr_ste(decay={decay!r}): expected a number, at least 0.")
    targets = Targets(pattern, exclude, per_layer, min_ndim)
    return _through("sr_ste", fn, sparsity, decay, distribution, structure, axis, targets)


def _through(name, fn, sparsity, decay, distribution, structure, axis, targets) -> SoftPruned:
    read = functools.partial(_decaying, decay) if decay else _straight
    masks, check, level = selection(name, sparsity, distribution, structure, axis)
    gate = Gate(
        name,
        level,
        start=None,
        masks=lambda targets, weights, scores, level: masks(
            targets, [jnp.abs(w) for w in weights], level
        ),
        forward=lambda w, s, mask, key, target: read(w, mask),
        harden=lambda w, s, mask, target: jnp.where(mask, w, jnp.zeros((), w.dtype)),
    )
    return SoftPruned(fn, gate, targets, check, not callable(sparsity))


def selection(
    name: str,
    sparsity: float | Schedule | tuple[int, int],
    distribution: str | Distribution,
    structure: Structure,
    axis: int | Mapping[str, int],
) -> tuple[Callable, Callable, Schedule]:
    """((targets, scores, level) -> masks of the largest, what checks targets, the schedule)."""
    if isinstance(sparsity, tuple):
        n, m = sparsity if len(sparsity) == 2 else (0, 0)
        if not (isinstance(n, int) and isinstance(m, int) and 0 < n <= m):
            raise RecipeError(
                f"{name}: N:M is {sparsity!r}: N of every M weights are kept, 0 < N <= M. 2:4 is "
                "(2, 4)."
            )

        def check(targets: Sequence[Target]) -> None:
            for t in targets:
                axis_of(axis, t, m)

        def groups(targets: Sequence[Target], scores: list, level: Any) -> list[jax.Array]:
            pairs = zip(targets, scores, strict=True)
            return [n_of_m(x, n, m, axis_of(axis, t, m)) for t, x in pairs]

        return groups, check, lambda step: 0.0
    allocation = Allocation.of(distribution, structure)
    return allocation.masks, allocation.check, schedule_of(sparsity)


@jax.custom_jvp
def _straight(w: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, w, jnp.zeros((), w.dtype))


@_straight.defjvp
def _(primals: tuple, tangents: tuple) -> tuple:
    return _straight(*primals), tangents[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decaying(decay: float, w: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, w, jnp.zeros((), w.dtype))


def _decaying_forward(decay: float, w: jax.Array, mask: jax.Array) -> tuple:
    return _decaying(decay, w, mask), (w, mask)


def _decaying_backward(decay: float, held: tuple, g: jax.Array) -> tuple:
    w, mask = held
    return g + jnp.where(mask, jnp.zeros((), g.dtype), decay * w.astype(g.dtype)), None


_decaying.defvjp(_decaying_forward, _decaying_backward)
