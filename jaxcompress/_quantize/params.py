# SPDX-License-Identifier: Apache-2.0
"""`QuantParams`: the state of a recipe inside a train step that knows nothing of it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._core import autodiff, typed
from .._files.nodes import own
from .recipe import Recipe
from .stateful import quantize_aware_with_state


@own
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuantParams(typed.TypedParams):
    """Held where the parameters were: weights, learned step sizes, and statistics.

    `jc.quantize_aware(step, recipe)` unwraps it wherever the step differentiates; the new
    statistics come back with the gradient and `jc.quant_tx` puts them in place.

    Attributes:
      weights: the parameters; None in a variable of an NNX model, whose others they are.
      learned: by site name, step sizes and clipping values; the optimizer trains them.
      statistics: ranges and counts by site name, and the scalar `weight`, always 0.
    """


def quant_params(fn: Callable, recipe: str | Recipe) -> Callable[..., Any]:
    """Makes the `QuantParams` of a function for a recipe.

    Args:
      fn: forward pass or loss whose first argument are the parameters.
      recipe: name of a recipe, or a `Recipe`.

    Returns:
      A function of `(params, *inputs)` that runs `fn` once on them, in float, and returns
      `params` with the first ranges and step sizes. For a calibration over several batches:
      `QuantParams(params, state.learned, state.statistics)` with the state of `jc.calibrate`.
      Of a Flax NNX model: a copy that holds them as one more parameter, `quantization`, whose
      value is `QuantParams(None, learned, statistics)`; steps change it in place.

    Raises:
      RecipeError, SiteError: as `quantize_aware_with_state`.

    >>> from jaxcompress._quantize.recipe import Rule
    >>> from jaxcompress._quantize.quantizer import Quantizer
    >>> recipe = Recipe([Rule("*", activation=Quantizer("int8", "tensor", range="ema"))])
    >>> params = quant_params(lambda w, x: x @ w, recipe)(jnp.eye(2), jnp.ones((1, 2)))
    >>> float(params.statistics["ranges"]["arg0"]["activation"]["high"][0, 0])
    1.0
    """
    init, _ = quantize_aware_with_state(fn, recipe)

    def make(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        state = init(params, *inputs, **kwargs)
        nnx = sys.modules.get("flax.nnx")
        if nnx is None or not isinstance(params, nnx.Module):
            return QuantParams(params, state.learned, state.statistics)
        model = nnx.clone(params)
        held = QuantParams(None, state.learned, state.statistics)
        setattr(model, "quantization", nnx.Param(held))  # noqa: B010
        return model

    return make


def quant_tx(tx: Any) -> optax.GradientTransformationExtraArgs:
    """An optimizer for `QuantParams`: trains weights and step sizes, replaces statistics.

    Goes outermost: what is inside sees (weights, learned) and no statistics, so that norms,
    momenta and weight decay are those of the plain optimizer. The statistics of a gradient are a
    sum of new statistics over whatever the gradient was summed over, and come with the number of
    summands, so that sums over microbatches, means over devices, clipping by a global norm and
    loss scaling give their average. A gradient that carries none keeps the old ones. Rescaling
    leaf by leaf and a cast of gradients to float16 would lose them: the next call raises.

    A step that holds `QuantParams` and an optimizer without `quant_tx` is an error of
    `jc.quantize_aware(step, recipe)` when it is traced. Without that wrapper around the step
    (an optimizer outside of it) the next call notices it, if it is made outside of `jit`.

    Args:
      tx: an optax transformation, or an object with `init` and `update` (`optax.MultiSteps`).

    >>> tx = quant_tx(optax.adam(1e-3))
    >>> zero = {"ranges": {}, "weight": jnp.zeros(())}
    >>> state = tx.init(QuantParams(jnp.ones(2), {}, zero))
    """

    if isinstance(tx, optax.GradientTransformation):
        tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        return tx.init(_trained(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        autodiff.note_restored()
        if params is None:
            raise TypeError("quant_tx needs the parameters: tx.update(gradients, state, params).")
        trained, state = tx.update(_trained(updates), state, _trained(params), **extra)

        def put(leaf: Any, gradient: Any, change: Any) -> Any:
            old = _held(leaf)
            if old is None:
                return change
            new = typed.restored(typed.only(gradient), old)
            statistics = jax.tree.map(jnp.subtract, new, old.statistics)
            moved = QuantParams(change.weights, change.learned, statistics)
            return jax.tree.map(lambda _: moved, leaf, is_leaf=typed.is_typed)

        leaves, tree = jax.tree.flatten(params, is_leaf=_holds)
        parts = (tree.flatten_up_to(t) for t in (updates, trained))
        done = [put(*leaf) for leaf in zip(leaves, *parts, strict=True)]
        return jax.tree.unflatten(tree, done), state

    return optax.GradientTransformationExtraArgs(init, update)


def _trained(tree: Any) -> Any:
    """The pytree with (weights, learned) for every `QuantParams`.

    No variable of NNX is left around them: an `nnx.Optimizer` takes apart what one holds.
    """

    def pick(x: Any) -> Any:
        held = _held(x)
        return x if held is None else typed.Trained(held.weights, held.learned)

    return jax.tree.map(pick, tree, is_leaf=_holds)


def _held(x: Any) -> QuantParams | None:
    """What x is, or holds if it is a variable of Flax NNX; None if that is no `QuantParams`."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(x, nnx.Variable):
        x = x.get_raw_value()
    return x if isinstance(x, QuantParams) else None


def _holds(x: Any) -> bool:
    return _held(x) is not None
