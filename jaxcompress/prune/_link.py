# SPDX-License-Identifier: Apache-2.0
"""Hard pruners: the last link of a chain of optax.

A pruner replaces the update of a pruned weight by -weight. Whatever the links in front of it do,
the sum of the two is exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer

from .._core.typed import Trained
from .._errors import JaxCompressError, RecipeError
from ._bits import Bits, opened
from ._targets import Target


class PruneState(NamedTuple):
    """State of a pruner.

    Attributes:
      count: steps done, int32[].
      level: how far the pruner has gone: the sparsity (or N of N:M) chosen last, float32[].
      masks: pytree like the parameters; one bit for each weight that may be pruned, True in
        place of what is left alone.
      grown: the same for what came back at the last step; None if nothing ever does.
    """

    count: jax.Array
    level: jax.Array
    masks: Any
    grown: Any


class Weights(NamedTuple):
    """What a pruner chooses by; for each target an array (or None).

    Attributes:
      values: the weights as they will be after the update, pruned ones at zero.
      masks: which of them are kept so far.
      gradients: dense gradients, if the pruner needs them.
    """

    values: list[jax.Array]
    masks: list[jax.Array]
    gradients: list[Any]


class Rule(NamedTuple):
    """What makes a pruner.

    Attributes:
      name: what users call it.
      level: from a step to how far the pruner goes, a number or float32[].
      choose: (targets, level, step, weights) -> new masks.
      start: level before the first step.
      first: targets -> the masks before the first step; all True if None.
      due: (step) -> whether masks may change.
      regrows: whether weights may come back.
      gradients: `"gradients"`: dense ones are needed; `"updates"`: the updates stand in for them.
    """

    name: str
    level: Callable[[Any], Any]
    choose: Callable[[Sequence[Target], Any, Any, Weights], Sequence[jax.Array]]
    start: float
    due: Callable[[Any], Any]
    check: Callable[[Sequence[Target]], None] = lambda targets: None
    first: Callable[[Sequence[Target]], Sequence[jax.Array]] | None = None
    regrows: bool = False
    gradients: str = ""


class Pruner(optax.GradientTransformationExtraArgs):
    """A pruner: an optax transformation that must be the last link of its chain."""


class Finder(Protocol):
    """What says which arrays of a pytree are pruned: `Targets`, for one."""

    def find(self, params: Any) -> list[Target]: ...


def pruner(rule: Rule, targets: Finder) -> Pruner:
    """The optax transformation of a rule."""

    def init(params: Any) -> PruneState:
        params = weights_of(params)
        leaves, tree = jax.tree.flatten(params)
        found = targets.find(params)
        rule.check(found)
        if rule.first is None:
            masks = [jnp.ones_like(leaves[t.index], bool) for t in found]
        else:
            masks = list(rule.first(found))
        none = [Bits.of(jnp.zeros_like(m)) for m in masks]
        return PruneState(
            jnp.zeros((), jnp.int32),
            jnp.asarray(rule.start, jnp.float32),
            _tree(tree, leaves, found, [Bits.of(m) for m in masks]),
            _tree(tree, leaves, found, none) if rule.regrows else None,
        )

    def update(
        updates: Any, state: Any, params: Any = None, *, grads: Any = None, **extra: Any
    ) -> tuple[Any, PruneState]:
        del extra
        if params is None:
            raise JaxCompressError(
                f"{rule.name} needs the parameters: tx.update(gradients, state, params)."
            )
        whole, params, inside = updates, weights_of(params), weights_of(updates)
        leaves, tree = jax.tree.flatten(params)
        found = targets.find(params)
        changes = tree.flatten_up_to(inside)
        kept = tree.flatten_up_to(state.masks)
        bits = [kept[t.index] for t in found]
        for t, old in zip(found, bits, strict=True):
            if changes[t.index] is None or isinstance(changes[t.index], optax.MaskedNode):
                raise JaxCompressError(
                    f"{rule.name}: `{t.path}` is to be pruned and gets no update. Leave it out "
                    f'with exclude="{t.path}", or train it.'
                )
            _check_last(rule, t, leaves[t.index], old, state.count)
        gradients = _gradients(rule, grads, inside, tree, found, bits)
        moved = [(leaves[t.index], changes[t.index]) for t in found]
        level = rule.level(state.count)  # counts are exact where it is a number of Python
        due = rule.due(state.count) & (jnp.asarray(level, jnp.float32) != state.level)

        # All but one `where` happens only when masks change.
        def choose(held: tuple) -> tuple[list[Bits], list[Bits]]:
            bits, moved, gradients = held
            masks = [b.mask() for b in bits]
            values = [
                jnp.where(mask, (x + u).astype(x.dtype), jnp.zeros((), x.dtype))
                for (x, u), mask in zip(moved, masks, strict=True)
            ]
            held = Weights(values, masks, gradients)
            new = list(rule.choose(found, level, state.count, held))
            grown = [n & ~m for n, m in zip(new, masks, strict=True)] if rule.regrows else []
            return [Bits.of(n) for n in new], [Bits.of(g) for g in grown]

        def keep(held: tuple) -> tuple[list[Bits], list[Bits]]:
            bits = held[0]
            none = [Bits(jnp.zeros_like(b.packed), b.last) for b in bits] if rule.regrows else []
            return bits, none

        bits, grown = lax.cond(due, choose, keep, (bits, moved, gradients))
        for i, (t, new, (x, u)) in enumerate(zip(found, bits, moved, strict=True)):
            if rule.regrows:  # what grows starts from zero
                new = Bits(new.packed & ~grown[i].packed, new.last)
            dtype = jnp.promote_types(x.dtype, u.dtype)
            changes[t.index] = jnp.where(new.mask(), u.astype(dtype), -x.astype(dtype))
        state = PruneState(
            state.count + 1,
            jnp.where(due, jnp.asarray(level, jnp.float32), state.level),
            _tree(tree, leaves, found, bits),
            _tree(tree, leaves, found, grown) if rule.regrows else None,
        )
        return _put(whole, jax.tree.unflatten(tree, changes)), state

    return Pruner(init, update)


def _tree(tree: Any, leaves: Sequence, found: Sequence[Target], masks: Sequence[Bits]) -> Any:
    """Masks in the structure of the parameters; True for what is left alone."""
    out: list[Any] = [jnp.asarray(True) for _ in leaves]
    for t, mask in zip(found, masks, strict=True):
        out[t.index] = mask
    return jax.tree.unflatten(tree, out)


def _gradients(
    rule: Rule, grads: Any, updates: Any, tree: Any, found: Sequence[Target], bits: Sequence[Bits]
) -> list[Any]:
    """The gradients by which weights grow, for each target; None where none are needed.

    Raises:
      JaxCompressError: there are none, or (outside of jit) they are zero wherever it matters.
    """
    if not rule.gradients:
        return [None] * len(found)
    if rule.gradients == "updates":
        grads = updates
    elif grads is None:
        raise JaxCompressError(
            f"{rule.name} lets the weights with the largest gradients grow and was given none. "
            "Hand them over with tx.update(gradients, state, params, grads=gradients), make the "
            "chain with jc.prune.chain, which does, or take the updates of the optimizer for "
            'them with growth="updates".'
        )
    leaves = tree.flatten_up_to(weights_of(grads))
    out = [leaves[t.index] for t in found]
    if rule.gradients == "gradients" and not _traced(out, bits):
        pruned = [~b.mask() for b in bits]
        any_pruned = any(bool(m.any()) for m in pruned)
        if any_pruned and not any(bool((g != 0)[m].any()) for g, m in zip(out, pruned)):
            raise JaxCompressError(
                f"{rule.name}: all gradients at pruned weights are zero, so that nothing says "
                "which of them should grow. Differentiate the loss itself, not "
                "jc.prune.masked(loss): the parameters are zero there already."
            )
    return out


def _check_last(rule: Rule, t: Target, x: Any, bits: Bits, count: Any) -> None:
    """Raises where a pruned weight is not zero: something changed the updates behind the pruner.

    Only outside of jit, where values are known.
    """
    if not _traced(x, bits, count) and count > 0 and bool(jnp.any((x != 0) & ~bits.mask())):
        raise RecipeError(
            f"{rule.name}: pruned weights of `{t.path}` are not zero. The pruner must be the last "
            "link of the chain: what changes updates goes in front of it; and every update must "
            "be applied to the parameters."
        )


def _traced(*tree: Any) -> bool:
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def weights_of(tree: Any) -> Any:
    """The pytree without what an optimizer trains beside the weights (`jc.QuantParams`)."""

    def pick(x: Any) -> Any:
        return x.weights if isinstance(x, Trained) else x

    return jax.tree.map(pick, tree, is_leaf=lambda x: isinstance(x, Trained))


def _put(whole: Any, weights: Any) -> Any:
    """Undoes `weights_of` with other weights."""
    is_trained = lambda x: isinstance(x, Trained)  # noqa: E731
    parts, tree = jax.tree.flatten(whole, is_leaf=is_trained)
    if not any(map(is_trained, parts)):
        return weights
    stripped = jax.tree.unflatten(tree, [0] * len(parts))
    new = jax.tree.structure(stripped).flatten_up_to(weights)
    put = [x._replace(weights=w) if is_trained(x) else w for x, w in zip(parts, new, strict=True)]
    return jax.tree.unflatten(tree, put)


def find_states(opt_state: Any) -> list[PruneState]:
    """All states of pruners in the state of an optimizer.

    Raises:
      RecipeError: one of them is not the last of its chain.
    """
    found: list[PruneState] = []

    def visit(x: Any) -> bool:
        if isinstance(x, PruneState):
            found.append(x)
            return True
        ours = [isinstance(part, PruneState) for part in x] if type(x) is tuple else []
        if ours != sorted(ours):
            raise RecipeError(
                "a pruner is not the last link of its chain: what stands behind it may move "
                "pruned weights away from zero. Put it last: optax.chain(optimizer, pruner)."
            )
        return False

    jax.tree.leaves(opt_state, is_leaf=visit)
    return found


def masks(opt_state: Any) -> Any:
    """The masks of the pruner in the state of an optimizer.

    Args:
      opt_state: as `tx.init` and `tx.update` return it, also nested in other states.

    Returns:
      A pytree like the parameters: bool arrays, True where a weight is kept, and a scalar True
      for what the pruner leaves alone. Several pruners are joined: kept by all.

    Raises:
      JaxCompressError: there is no pruner in it.
      RecipeError: it is not the last of its chain.

    >>> import jaxcompress as jc
    >>> tx = optax.chain(optax.sgd(0.1), jc.prune.magnitude(0.5))
    >>> masks(tx.init({"w": jnp.ones((2, 2)), "b": jnp.ones(2)}))["b"]
    Array(True, dtype=bool)
    """
    states = find_states(opt_state)
    if not states:
        raise JaxCompressError(
            "found no state of a pruner. Put one into the chain, "
            "optax.chain(optimizer, jc.prune.magnitude(...)), and give the state of the chain."
        )
    first, *others = [opened(state.masks) for state in states]
    for other in others:
        first = jax.tree.map(jnp.logical_and, first, other)
    return first
