# SPDX-License-Identifier: Apache-2.0
"""Parameters that carry the state of a transform through a train step that knows nothing of it.

A step holds one `TypedParams` where it held its parameters. Where it differentiates, the function
sees the weights alone, and the new state leaves `value_and_grad` as the cotangent of the old one:
eps * new, together with eps for one extra scalar, the `weight`. Whatever a step does linearly to
its gradients (sums over microbatches, means over devices, clipping by a global norm, loss
scaling) it does to both, so that their quotient is the new state, averaged where gradients were.
eps = 2^-64 keeps the state out of any norm.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._errors import JaxCompressError, RecipeError
from . import _compat
from .provenance import DATA, Label
from .qtensor import is_stored
from .staging import is_array, split

EPS = 2.0**-64


@dataclasses.dataclass(frozen=True, eq=False)
class TypedParams:
    """Weights, and what a transform keeps for its sites. Subclasses are registered pytrees.

    Attributes:
      weights: the parameters as the function knows them; None if they lie around it, as the
        other variables of a Flax NNX model do.
      learned: by site name, arrays that are trained with the weights.
      statistics: `{"ranges": by site name, arrays that follow the data, "weight": scalar 0}`.
    """

    weights: Any
    learned: dict[str, Any]
    statistics: dict[str, Any]

    def __contains__(self, name: object) -> bool:
        """False: this is no mapping. Flax's `TrainState` asks whether it has a special key."""
        return False


class Trained(NamedTuple):
    """What an optimizer sees of `TypedParams`: what it trains, no statistics."""

    weights: Any
    learned: Any


def is_typed(x: Any) -> bool:
    return isinstance(x, TypedParams)


def find(tree: Any) -> list[TypedParams]:
    """All `TypedParams` in a pytree."""
    return [x for x in jax.tree.leaves(tree, is_leaf=is_typed) if is_typed(x)]


def only(tree: Any) -> TypedParams:
    """The `TypedParams` of a call.

    Raises:
      JaxCompressError: there are several.
    """
    found = find(tree)
    if len(found) != 1:
        raise JaxCompressError(
            f"found {len(found)} QuantParams among the arguments, expected one. Hold all "
            "parameters in one pytree, and make one QuantParams of it."
        )
    return found[0]


def unwrap(tree: Any) -> Any:
    """The pytree with the weights alone; what lies beside its weights stays as it is."""

    def weights(x):
        return x.weights if is_typed(x) and x.weights is not None else x

    return jax.tree.map(weights, tree, is_leaf=is_typed)


def unwrapping(fn: Callable) -> Callable:
    """A function of the same arguments whose `fn` sees the weights alone."""

    @functools.wraps(fn, updated=())
    def run(*args, **kwargs):
        try:
            return fn(*unwrap(args), **unwrap(kwargs))
        except ValueError as e:  # JAX's, where two trees were to be put together
            if "QuantParams" not in str(e) or isinstance(e, JaxCompressError):
                raise
        raise RecipeError(
            "QuantParams reach what is differentiated in two parts, as Equinox's filters make "
            "them. There, wrap the loss and leave the step as it is: "
            "eqx.filter_value_and_grad(jaxcompress.quantize_aware(loss, recipe))."
        )

    return run


def labels_of(tree: Any, own: list[Label], floats: bool = True) -> list[Label]:
    """Labels of the arrays of `unwrap(tree)`: `own` for the weights, data for all else."""
    out: list[Label] = []
    for x in jax.tree.leaves(tree, is_leaf=lambda x: is_typed(x) or is_stored(x)):
        if is_typed(x):
            out += own
        elif is_array(x, floats):
            out.append(DATA)
    return out


def deliver(out: Any, params: TypedParams, state: dict[str, Any]) -> Any:
    """`out`, whose derivative delivers the new state as the cotangent of the old one."""
    new = {"ranges": state, "weight": jnp.ones((), jnp.float32)}
    new = _tied(jax.tree.map(_alike, new, params.statistics))
    call, arrays = split(out)
    inexact = [i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.inexact)]
    passed = _deliver([arrays[i] for i in inexact], params.statistics, new)
    for i, x in zip(inexact, passed, strict=True):
        arrays[i] = x
    return call.merge(arrays)


def _alike(new: jax.Array, old: jax.Array) -> jax.Array:
    """The new value with the mesh axes of the old one: averaged over those that it lacks."""
    new, axes = lax.stop_gradient(new), _compat.varying_axes(old)
    if more := _compat.varying_axes(new) - axes:
        new = lax.pmean(new, tuple(sorted(more)))
    if less := axes - _compat.varying_axes(new):
        new = lax.pcast(new, tuple(sorted(less)), to="varying")
    return new


def _tied(new: Any) -> Any:
    """The same values, each depending on all of them.

    Under `vmap` JAX adds up the cotangents of what is batched, and passes on one of what is not:
    a count that is the same in every example would be summed less often than a range.
    """
    zero = sum(jnp.where(jnp.isnan(x.ravel()[0]), 0.0, 0.0) for x in jax.tree.leaves(new))
    return jax.tree.map(lambda x: x + zero, new)


@jax.custom_vjp
def _deliver(out: list, old: Any, new: Any) -> list:
    return out


def _forward(out: list, old: Any, new: Any) -> tuple[list, Any]:
    return out, new


def _backward(new: Any, cotangents: list) -> tuple[list, Any, Any]:
    return cotangents, jax.tree.map(lambda x: EPS * x, new), jax.tree.map(jnp.zeros_like, new)


_deliver.defvjp(_forward, _backward)


def restored(gradient: TypedParams, params: TypedParams) -> dict[str, Any]:
    """The new statistics from a gradient; the old ones where no gradient carried any.

    NaN, the weight included, if the gradient was rescaled leaf by leaf: then the weight is larger
    than loss scaling and sums make it, or a value is 2^40 times larger than the old ones explain.

    Raises:
      JaxCompressError: the gradient was cast to float16, in which it is zero.
    """
    weight = gradient.statistics["weight"]
    if weight.dtype == jnp.float16:
        raise JaxCompressError(
            "the gradients were cast to float16, which has no numbers for the statistics of "
            "QuantParams. Cast inside jaxcompress.quant_tx, or to bfloat16."
        )
    known = jnp.isfinite(weight) & (weight != 0)
    safe = jnp.where(known, weight, 1.0)
    ranges = jax.tree.map(lambda x: x / safe, gradient.statistics["ranges"])
    torn = known & ((jnp.abs(weight) > EPS * 2.0**48) | _jumped(ranges, params))

    def pick(new, old):
        return jnp.where(torn, jnp.nan, jnp.where(known, new, old)).astype(old.dtype)

    ranges = jax.tree.map(pick, ranges, params.statistics["ranges"])
    return {"ranges": ranges, "weight": pick(jnp.zeros_like(weight), jnp.zeros_like(weight))}


def _jumped(new: Any, params: TypedParams) -> jax.Array:
    """Whether a value is far larger than the old ones explain."""
    pairs = zip(*map(jax.tree.leaves, (new, params.statistics["ranges"])), strict=True)
    return sum((jnp.any(jnp.abs(x) > 2.0**40 * (1 + jnp.abs(y))) for x, y in pairs), jnp.bool_(0))
