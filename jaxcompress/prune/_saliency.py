# SPDX-License-Identifier: Apache-2.0
"""Masks made before training, from gradients at the initial weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from .._errors import JaxCompressError, RecipeError
from ._allocate import Allocation
from ._distributions import Distribution
from ._schedules import checked
from ._targets import Patterns, Target, Targets

MaskMaker = Callable[..., Any]


def snip(
    loss: Callable,
    sparsity: float,
    *,
    distribution: str | Distribution = "global",
    pattern: Patterns = "*",
    exclude: Patterns = (),
    min_ndim: int = 2,
) -> MaskMaker:
    """Keeps the weights whose removal changes the loss most, to first order: |w dL/dw|.

    Args:
      loss: a function of parameters and inputs that returns a scalar.
      sparsity: the part of the weights that become zero, in [0, 1).
      distribution, pattern, exclude, min_ndim: as in `magnitude`; by default one threshold.

    Returns:
      A function of the arguments of `loss` that returns masks, as `jc.prune.masks` does.

    Raises:
      RecipeError: a sparsity outside [0, 1); when called, a pattern that matches nothing.
      JaxCompressError: (when called) no gradient reaches an array.

    >>> loss = lambda p, x: jnp.sum((x @ p["w"]) ** 2)
    >>> make = snip(loss, 0.5)
    >>> make({"w": jnp.array([[3.0], [1.0]])}, jnp.eye(2))["w"].tolist()
    [[True], [False]]

    References: Lee et al. 2019, equations 5 and 6.
    """

    def scores(f: Callable, weights: list[jax.Array]) -> list[jax.Array]:
        return [jnp.abs(w * g) for w, g in zip(weights, jax.grad(f)(weights))]

    targets = Targets(pattern, exclude, (), min_ndim)
    return _maker("snip", loss, scores, sparsity, distribution, targets)


def grasp(
    loss: Callable,
    sparsity: float,
    *,
    distribution: str | Distribution = "global",
    pattern: Patterns = "*",
    exclude: Patterns = (),
    min_ndim: int = 2,
) -> MaskMaker:
    """Keeps the weights whose removal would reduce the norm of the gradient most: w (H g).

    H is the Hessian of the loss and g its gradient, with respect to what may be pruned.

    Args:
      loss: a function of parameters and inputs that returns a scalar. The paper divides logits by
        a temperature of 200 in it.
      sparsity, distribution, pattern, exclude, min_ndim: as in `snip`.

    Raises:
      RecipeError, JaxCompressError: as `snip`.

    >>> loss = lambda p, x: jnp.sum((x @ p["w"]) ** 2)
    >>> grasp(loss, 0.5)({"w": jnp.array([[3.0], [1.0]])}, jnp.eye(2))["w"].tolist()
    [[True], [False]]

    References: Wang et al. 2020, algorithm 2: the largest -w (H g) are removed.
    """

    def scores(f: Callable, weights: list[jax.Array]) -> list[jax.Array]:
        gradient = jax.grad(f)
        _, product = jax.jvp(gradient, (weights,), (gradient(weights),))
        return [w * hg for w, hg in zip(weights, product)]

    targets = Targets(pattern, exclude, (), min_ndim)
    return _maker("grasp", loss, scores, sparsity, distribution, targets)


def synflow(
    fn: Callable,
    sparsity: float,
    *,
    rounds: int = 100,
    distribution: str | Distribution = "global",
    pattern: Patterns = "*",
    exclude: Patterns = (),
    min_ndim: int = 2,
) -> MaskMaker:
    """Keeps synaptic flow, without data, in rounds: |w| dR/d|w| with R = sum fn(|params|, 1).

    After round k of n a part (1 - sparsity)^(k / n) of the weights is left, those with the largest
    scores among what was left before.

    Args:
      fn: a forward pass; its other floating-point inputs are replaced by ones.
      sparsity, distribution, pattern, exclude, min_ndim: as in `snip`.
      rounds: n, at least 1.

    Raises:
      RecipeError, JaxCompressError: as `snip`.

    >>> fn = lambda p, x: x @ p["w"] @ p["v"]
    >>> params = {"w": jnp.array([[3.0, -1.0]]), "v": jnp.array([[1.0], [-2.0]])}
    >>> synflow(fn, 0.5)(params, jnp.zeros((1, 1)))["w"].tolist()
    [[True, False]]

    References: Tanaka et al. 2020, algorithm 1. Very deep networks overflow float32.
    """
    if not isinstance(rounds, int) or rounds < 1:
        raise RecipeError(f"synflow(rounds={rounds!r}): expected a number, at least 1.")
    allocation = Allocation.of(distribution)
    sparsity = checked("sparsity", sparsity)

    def make(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        positive = jax.tree.map(lambda x: jnp.abs(x) if _is_float(x) else x, params)
        found, weights, put = _parts(Targets(pattern, exclude, (), min_ndim), positive)
        allocation.check(found)
        ones = jax.tree.map(lambda x: jnp.ones_like(x) if _is_float(x) else x, inputs)

        def flow(weights: list[jax.Array]) -> jax.Array:
            return jnp.sum(fn(put(weights), *ones, **kwargs))

        def masks(masks: list[jax.Array], level: Any) -> list[jax.Array]:
            kept = [jnp.where(m, w, 0) for m, w in zip(masks, weights)]
            pairs = zip(kept, jax.grad(flow)(kept), masks)
            return allocation.masks(found, [jnp.where(m, w * g, -1) for w, g, m in pairs], level)

        def one(k: jax.Array, old: list[jax.Array]) -> list[jax.Array]:
            return masks(old, 1 - jnp.float32(1 - sparsity) ** ((k + 1) / rounds))

        start = [jnp.ones_like(w, bool) for w in weights]
        _check("synflow", found, [w * g for w, g in zip(weights, jax.grad(flow)(weights))])
        last = masks(lax.fori_loop(0, rounds - 1, one, start), sparsity)
        return _tree(params, found, last)

    return make


def _maker(
    name: str,
    loss: Callable,
    scores: Callable[[Callable, list], list],
    sparsity: float,
    distribution: str | Distribution,
    targets: Targets,
) -> MaskMaker:
    sparsity, allocation = checked("sparsity", sparsity), Allocation.of(distribution)

    def make(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        found, weights, put = _parts(targets, params)
        allocation.check(found)
        values = scores(lambda w: loss(put(w), *inputs, **kwargs), weights)
        _check(name, found, values)
        return _tree(params, found, allocation.masks(found, values, sparsity))

    return make


def _parts(targets: Targets, params: Any) -> tuple[list[Target], list[Any], Callable]:
    """(what to prune, its arrays, a function that puts other arrays in their place)."""
    found, (leaves, tree) = targets.find(params), jax.tree.flatten(params)

    def put(weights: Sequence[jax.Array]) -> Any:
        new = list(leaves)
        for t, w in zip(found, weights, strict=True):
            new[t.index] = w
        return jax.tree.unflatten(tree, new)

    return found, [leaves[t.index] for t in found], put


def _tree(params: Any, found: Sequence[Target], masks: Sequence[jax.Array]) -> Any:
    leaves, tree = jax.tree.flatten(params)
    out: list[Any] = [jnp.asarray(True) for _ in leaves]
    for t, mask in zip(found, masks, strict=True):
        out[t.index] = mask
    return jax.tree.unflatten(tree, out)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _check(name: str, found: Sequence[Target], scores: Sequence[jax.Array]) -> None:
    for t, score in zip(found, scores, strict=True):
        if not isinstance(score, Tracer) and not bool(jnp.any(score != 0)):
            raise JaxCompressError(
                f"{name}: no gradient reaches `{t.path}`: all its scores are zero, and nothing "
                f'says what to keep. Leave it out with exclude="{t.path}".'
            )
