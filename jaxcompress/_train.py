# SPDX-License-Identifier: Apache-2.0
"""The training loop of the command line: one compiled step, a progress bar, an eye on the loss."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._errors import JaxCompressError
from ._task import Train

CHECK_EVERY = 50  # steps between two looks at the loss: each look waits for the device


class TrainState(NamedTuple):
    """What one step hands to the next."""

    weights: Any  # the parameters' floating-point leaves, None in place of the others
    optimizer: Any
    step: jax.Array
    first_bad: jax.Array  # the first step whose loss was not finite, -1 before that


Step = Callable[[TrainState, Any, Any], tuple[TrainState, jax.Array]]


def fit(
    step: Step,
    params: Any,
    optimizer: optax.GradientTransformation,
    batches: Iterator[Any],
    steps: int,
    *,
    label: str = "training",
    quiet: bool = False,
) -> tuple[Any, list[float]]:
    """Trains `params` for so many steps: (parameters, the loss of each step).

    Those passed in stay as they are.

    Args:
      step: made by `compiled_step` with the same optimizer.
      params: pytree of arrays. Integer and key leaves are handed through untouched.
      optimizer: its state starts afresh.
      batches: an iterator that does not end.
      steps: how many.
      label: what the progress bar is called.
      quiet: no progress bar; there is none either where stderr is not a terminal.

    Raises:
      JaxCompressError: the loss is NaN or infinite; names the first such step.
    """
    state, frozen = start(params, optimizer)
    losses: list[float] = []
    waiting: list[jax.Array] = []  # on the device
    with _progress(label, steps, quiet) as show:
        for i in range(steps):
            state, value = step(state, frozen, next(batches))
            waiting.append(value)
            if (i + 1) % CHECK_EVERY == 0 or i + 1 == steps:
                if (bad := int(state.first_bad)) >= 0:
                    raise JaxCompressError(
                        f"{label}: the loss is not finite in step {bad} of {steps}. Lower the "
                        "learning rate, or look for a division by zero or a logarithm of zero."
                    )
                losses += map(float, waiting)
                waiting.clear()
                show(i + 1, losses[-1])
    return combine(state.weights, frozen), losses


def start(params: Any, optimizer: optax.GradientTransformation) -> tuple[TrainState, Any]:
    """The state before the first step, in its own arrays, and the leaves that are not trained."""

    def is_trained(leaf):
        return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)

    weights = jax.tree.map(lambda leaf: jnp.array(leaf) if is_trained(leaf) else None, params)
    frozen = jax.tree.map(lambda leaf: None if is_trained(leaf) else leaf, params)
    return TrainState(weights, optimizer.init(weights), jnp.int32(0), jnp.int32(-1)), frozen


def combine(weights: Any, frozen: Any) -> Any:
    """The parameters again, from both halves of `start`."""
    return jax.tree.map(
        lambda weight, other: other if weight is None else weight,
        weights,
        frozen,
        is_leaf=lambda leaf: leaf is None,
    )


def compiled_step(loss: Callable[[Any, Any], Any], optimizer: optax.GradientTransformation) -> Step:
    """One step, `step(state, frozen, batch) -> (state, loss)`. It takes over the state's arrays."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, frozen, batch):
        def loss_of(weights):
            return loss(combine(weights, frozen), batch)

        value, gradients = jax.value_and_grad(loss_of)(state.weights)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.weights)
        went_bad = (state.first_bad < 0) & ~jnp.isfinite(value)
        state = TrainState(
            optax.apply_updates(state.weights, updates),
            optimizer_state,
            state.step + 1,
            jnp.where(went_bad, state.step, state.first_bad),
        )
        return state, value

    return step


def stream(train: Train, seed: int | Sequence[int]) -> Iterator[Any]:
    """The batches of a task, without an end, in an order that depends on the seed alone.

    Raises:
      JaxCompressError: there is not a single batch.
    """
    rng = np.random.default_rng(seed)
    while True:
        batch = None
        for batch in train.batches(rng) if callable(train.batches) else train.batches:
            yield batch
        if batch is None:
            raise JaxCompressError("Train: `batches` is empty: it must give at least one batch.")


@contextlib.contextmanager
def _progress(label: str, steps: int, quiet: bool) -> Iterator[Callable[[int, float], None]]:
    """A bar on stderr, `show(step, loss)`, where stderr is a terminal and not `quiet`."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=quiet or not console.is_terminal) as bar:
        row = bar.add_task(label, total=steps)
        yield lambda step, loss: bar.update(
            row, completed=step, description=f"{label}, loss {loss:.4f}"
        )
