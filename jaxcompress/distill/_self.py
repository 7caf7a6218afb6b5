# SPDX-License-Identifier: Apache-2.0
"""Teachers that come from the training itself: an average of the student, or its peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from .._errors import JaxCompressError
from ._labels import cross_entropy
from ._loss import fraction


class EMAState(NamedTuple):
    """State of `ema`: the averaged parameters, to be given as `teacher_params`."""

    params: Any


def ema(decay: float = 0.999) -> optax.GradientTransformationExtraArgs:
    """Keeps t <- decay t + (1 - decay) w of the parameters w: a teacher for self-distillation.

    The last link of an `optax.chain`; it leaves updates as they are. The teacher is
    `ema_params(opt_state)`, as `teacher_params` of a `loss_fn` with the student's own function.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(1.0), ema(0.5))
    >>> w = jnp.array(2.0)
    >>> _, state = tx.update(jnp.array(1.0), tx.init(w), w)
    >>> print(ema_params(state))  # half of 2 and half of 1
    1.5

    Raises:
      JaxCompressError: decay outside of [0, 1]; when updating, no parameters were given.

    References: Tarvainen and Valpola 2017, Mean teachers, equation 2.
    """
    fraction("ema", decay=decay)

    def init(params: Any) -> EMAState:
        return EMAState(jax.tree.map(jnp.asarray, params))

    def update(updates: Any, state: Any, params: Any = None, **_: Any):
        if params is None:
            raise JaxCompressError("ema: call tx.update(gradients, state, params).")
        new = optax.apply_updates(params, updates)
        mean = jax.tree.map(
            lambda t, w: (decay * t + (1 - decay) * w).astype(t.dtype), state.params, new
        )
        return updates, EMAState(mean)

    return optax.GradientTransformationExtraArgs(init, update)


def ema_params(opt_state: Any) -> Any:
    """The averaged parameters in the state of an optimizer.

    Raises:
      JaxCompressError: there is no `ema` in it, or several.
    """

    def found(x: Any) -> bool:
        return isinstance(x, EMAState)

    states = [x for x in jax.tree.leaves(opt_state, is_leaf=found) if found(x)]
    if len(states) != 1:
        raise JaxCompressError(f"ema_params: found {len(states)} states of ema, expected one.")
    return states[0].params


def mutual(
    students: Sequence[Callable], loss: Callable, *, alpha: float = 0.5
) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """Deep mutual learning: `loss(all_params, (inputs, labels)) -> (loss, metrics)`.

    The sum over students of (1 - alpha) cross entropy + alpha * the mean of the loss against each
    of the others, who are constants in it. `all_params` is a sequence, one for each student.

    >>> import jax.numpy as jnp
    >>> from jaxcompress import distill
    >>> f = lambda w, x: x @ w
    >>> loss = distill.mutual([f, f], distill.kl(), alpha=1.0)
    >>> batch = (jnp.eye(2), jnp.array([0, 1]))
    >>> print(float(loss([jnp.eye(2), jnp.eye(2)], batch)[0]))
    0.0

    References: Zhang et al. 2018, Deep Mutual Learning, equations 8 and 9.
    """
    fraction("mutual", alpha=alpha)
    if len(students) < 2:
        raise JaxCompressError(f"mutual: {len(students)} students; at least two learn mutually.")

    def run(all_params: Sequence[Any], batch: tuple[Any, Any]):
        x, labels = batch
        said = [f(p, x) for f, p in zip(students, all_params, strict=True)]
        soft, hard = jnp.zeros(()), jnp.zeros(())
        for i, own in enumerate(said):
            others = [loss(own, t, labels=labels) for j, t in enumerate(said) if j != i]
            soft += sum(others) / len(others)
            hard += cross_entropy(own, labels)
        total = alpha * soft + (1 - alpha) * hard
        return total, {"distill": soft, "labels": hard, "loss": total}

    return run
