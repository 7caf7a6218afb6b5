# SPDX-License-Identifier: Apache-2.0
"""Soft pruners: functions of parameters that compute with some of them at zero, all being trained.

The masks follow from the weights, or from scores that are trained with them, at every call. When
training is over, `harden` hands them over: weights that are zero, and the masks that keep them so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._errors import JaxCompressError
from ._targets import Target, Targets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SoftParams:
    """Weights with the scores that decide which of them are pruned; any optimizer trains both.

    Attributes:
      weights: the parameters as the function knows them.
      scores: by key path of what is pruned, float32 arrays.
    """

    weights: Any
    scores: dict[str, jax.Array]


class Gate(NamedTuple):
    """What makes a soft pruner; all lists have an entry for each target.

    Attributes:
      name: what users call it.
      level: from a step to a sparsity; None if nothing depends on steps.
      start: (target, weight) -> first scores; None if there are none.
      masks: (targets, weights, scores, level) -> bool arrays, what is kept.
      forward: (weight, scores, mask, key, target) -> what the function computes with.
      harden: (weight, scores, mask, target) -> what takes the place of the weight in the end.
      penalty: scores -> what is to be added to the loss; None if nothing.
      random: whether calls take a key.
    """

    name: str
    level: Callable[[Any], Any] | None
    start: Callable[[Target, jax.Array], jax.Array] | None
    masks: Callable[[Sequence[Target], list, list, Any], Sequence[jax.Array]]
    forward: Callable[..., jax.Array]
    harden: Callable[..., jax.Array]
    penalty: Callable[[list], jax.Array] | None = None
    random: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class SoftPruned:
    """A function whose parameters are pruned as it reads them, as `ste`, `movement`, ... make it.

    Called like the function, with `init(params)` in the place of its parameters, the first
    argument. `jc.quantize_aware` may stand around it or inside of it.
    """

    fn: Callable = dataclasses.field(repr=False)
    gate: Gate = dataclasses.field(repr=False)
    targets: Targets = dataclasses.field(repr=False)
    check: Callable[[Sequence[Target]], None] = dataclasses.field(repr=False)
    every_step_alike: bool = dataclasses.field(default=True, repr=False)

    def init(self, params: Any) -> Any:
        """What is trained: `SoftParams`, or the parameters alone where there are no scores.

        Raises:
          RecipeError: a pattern matches nothing, or nothing that can be pruned.
          SiteError: units or groups that do not divide an array.
        """
        found, leaves = self.targets.find(params), jax.tree.leaves(params)
        self.check(found)
        if self.gate.start is None:
            return params
        return SoftParams(params, {t.path: self.gate.start(t, leaves[t.index]) for t in found})

    def __call__(
        self, held: Any, *inputs: Any, prune_step: Any = None, prune_key: Any = None, **kwargs: Any
    ) -> Any:
        """`fn(pruned parameters, *inputs, **kwargs)`.

        Args:
          held: from `init`, trained since.
          prune_step: number of the step, where the sparsity is a function of it.
          prune_key: random key, for `l0` alone; without it gates are what they will be in the end.
        """
        if prune_key is not None and not self.gate.random:
            raise JaxCompressError(f"{self.gate.name} draws nothing: leave prune_key out.")
        weights, found, parts, masks = self._masks(held, prune_step)
        leaves, tree = jax.tree.flatten(weights)
        for i, (t, (w, s), mask) in enumerate(zip(found, parts, masks, strict=True)):
            key = None if prune_key is None else jax.random.fold_in(prune_key, i)
            leaves[t.index] = self.gate.forward(w, s, mask, key, t).astype(w.dtype)
        return self.fn(jax.tree.unflatten(tree, leaves), *inputs, **kwargs)

    def harden(self, held: Any, prune_step: Any = None) -> tuple[Any, Any]:
        """(parameters with exact zeros, masks) for `jc.prune.fixed(masks)`.

        The function computes with them what this one computes without a key.
        """
        weights, found, parts, masks = self._masks(held, prune_step)
        leaves, tree = jax.tree.flatten(weights)
        kept: list[Any] = [jnp.asarray(True)] * len(leaves)
        for t, (w, s), mask in zip(found, parts, masks, strict=True):
            leaves[t.index] = self.gate.harden(w, s, mask, t).astype(w.dtype)
            kept[t.index] = mask
        return jax.tree.unflatten(tree, leaves), jax.tree.unflatten(tree, kept)

    def penalty(self, held: Any) -> jax.Array:
        """What makes scores small, to be added to the loss with a factor; 0 where there is none."""
        if self.gate.penalty is None:
            return jnp.zeros(())
        return self.gate.penalty(list(held.scores.values()))

    def _masks(self, held: Any, step: Any) -> tuple[Any, list[Target], list, Sequence[jax.Array]]:
        """(weights, targets, (weight, scores) of each, masks)."""
        if (self.gate.start is not None) != isinstance(held, SoftParams):
            raise JaxCompressError(
                f"{self.gate.name}: the first argument is a {type(held).__name__}; call it with "
                "what init(params) returned."
            )
        weights, scores = (
            (held.weights, held.scores) if isinstance(held, SoftParams) else (held, None)
        )
        found, leaves = self.targets.find(weights), jax.tree.leaves(weights)
        if scores is not None and scores.keys() != {t.path for t in found}:
            raise JaxCompressError(
                f"{self.gate.name}: there are scores for {sorted(scores)} and weights to prune "
                f"are {sorted(t.path for t in found)}."
            )
        level = None
        if self.gate.level is not None:
            if step is None and not self.every_step_alike:
                raise JaxCompressError(
                    f"{self.gate.name}: the sparsity depends on the step: give prune_step=..."
                )
            level = self.gate.level(0 if step is None else step)
        ours = [leaves[t.index] for t in found]
        theirs = [None] * len(found) if scores is None else [scores[t.path] for t in found]
        held_fast = jax.lax.stop_gradient((ours, theirs))
        masks = self.gate.masks(found, *held_fast, level)
        return weights, found, list(zip(ours, theirs)), masks
