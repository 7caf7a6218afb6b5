# SPDX-License-Identifier: Apache-2.0
"""From two functions and a loss to an ordinary loss of the student's parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._errors import JaxCompressError
from ._batch import Selector, pick
from ._labels import cross_entropy
from ._match import Match, Pair, compared, observed, projections_for
from ._top_k import TopK


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What `loss_fn` returns: a loss of the student's parameters, to be called."""

    student: Callable
    teachers: tuple[Callable | None, ...]
    loss: Callable | None
    match: tuple[Match, ...]
    hard_labels: Selector | None
    inputs: Selector | None
    mask: Selector | None
    alpha: float
    schedule: Callable | None
    teacher_weights: tuple[float, ...]
    teacher_dtype: Any

    def __call__(
        self,
        params: Any,
        batch: Any,
        projections: dict[str, dict[str, Array]] | None = None,
        *,
        teacher_params: Any = None,
        teacher_outputs: Any = None,
        step: Any = None,
    ) -> tuple[Array, dict[str, Array]]:
        """(loss, metrics); see `loss_fn`."""
        labels, mask = pick(batch, self.hard_labels), pick(batch, self.mask)
        logits, outputs, pairs = self._run(params, batch, teacher_params, teacher_outputs)
        total, metrics = jnp.zeros(()), {}
        if self.loss is not None:
            for weight, said in zip(self.teacher_weights, outputs, strict=True):
                said = said.logits(logits) if isinstance(said, TopK) else said
                total += weight * self.loss(logits, said, labels=labels, mask=mask)
            metrics["distill"] = total
        for i, m in enumerate(self.match):
            found = compared(m, pairs[i], (projections or {}).get(f"match/{i}", {}), labels, mask)
            metrics[f"match/{i}"] = found
            total += m.weight * found
        if self.schedule is not None:
            if step is None:
                raise JaxCompressError(
                    "loss_fn was given a schedule: call loss(params, batch, step=...) with the "
                    "number of the step."
                )
            total = self.schedule(step) * total
        total = self.alpha * total
        if labels is not None and self.alpha < 1:
            metrics["labels"] = cross_entropy(logits, labels, mask)
            total += (1 - self.alpha) * metrics["labels"]
        return total, metrics | {"loss": total}

    def init(
        self, key: Array, params: Any, batch: Any, *, teacher_params: Any = None
    ) -> dict[str, dict[str, Array]]:
        """Projections for the features whose widths differ, by match and pair; empty if none do.

        They are the third argument of the loss, and are trained with the student. Nothing runs.
        """
        shapes: list[list[Pair]] = []

        def features(params, batch, teacher_params):
            for pairs in self._run(params, batch, teacher_params, None)[2]:
                shapes.append([p.shapes() for p in pairs])

        jax.eval_shape(features, params, batch, teacher_params)
        found = {
            f"match/{i}": projections_for(jax.random.fold_in(key, i), m, pairs)
            for i, (m, pairs) in enumerate(zip(self.match, shapes, strict=True))
        }
        return {name: matrices for name, matrices in found.items() if matrices}

    def _run(self, params: Any, batch: Any, teacher_params: Any, stored: Any):
        """(student's output, what each teacher says, pairs of features of each match)."""
        x = batch if self.inputs is None else pick(batch, self.inputs)
        wanted = [(m.student_pattern, m.output) for m in self.match]
        logits, ours = observed(self.student, "student", wanted, params, x)
        outputs, theirs = [], {}
        count = len(self.teachers)
        everyone = (teacher_params,) if count == 1 else teacher_params or (None,) * count
        recorded = (stored,) if count == 1 else stored or (None,) * count
        for t, (teacher, p, known) in enumerate(
            zip(self.teachers, everyone, recorded, strict=True)
        ):
            own = [i for i, m in enumerate(self.match) if m.teacher == t]
            if known is not None:
                said, seen = _recalled(known, len(own))
            else:
                said, seen = self._taught(teacher, p, x, [self.match[i] for i in own])
            outputs.append(lax.stop_gradient(said))
            theirs |= dict(zip(own, seen, strict=True))
        return logits, outputs, [m.pair(ours[i], theirs[i]) for i, m in enumerate(self.match)]

    def _taught(self, teacher: Callable | None, params: Any, x: Any, matches: Sequence[Match]):
        """What a teacher says and its features, as constants."""
        if teacher is None:
            raise JaxCompressError(
                "loss_fn has no teacher: call loss(params, batch, teacher_outputs=...) with what "
                "was recorded."
            )

        def run(params, x):
            return teacher(x) if params is None else teacher(params, x)

        params, x = lax.stop_gradient((params, x))
        if self.teacher_dtype is not None:
            params, x = jax.tree.map(self._cast, (params, x))
        wanted = [(m.teacher_pattern, m.output) for m in matches]
        return observed(run, "teacher", wanted, params, x)

    def _cast(self, x):
        if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating):
            return x.astype(self.teacher_dtype)
        return x


def _recalled(known: Any, count: int) -> tuple[Any, list[dict[str, Array]]]:
    """(output, features for each of its matches) of a stored batch."""
    if not isinstance(known, dict):
        known = {"output": known}
    features = known.get("features", ())
    if len(features) != count:
        raise JaxCompressError(
            f"the recording has the features of {len(features)} patterns and {count} matches ask "
            'for them: {"output": ..., "features": one list of arrays for each match}.'
        )
    return known["output"], [
        {f"recorded[{i}]": jnp.asarray(x) for i, x in enumerate(found)} for found in features
    ]


def loss_fn(
    student: Callable,
    teacher: Callable | Sequence[Callable] | None,
    loss: Callable | None,
    *,
    match: Match | Sequence[Match] = (),
    hard_labels: Selector | bool | None = None,
    alpha: float | None = None,
    schedule: Callable | None = None,
    inputs: Selector | None = None,
    mask: Selector | None = None,
    teacher_weights: Sequence[float] | None = None,
    teacher_dtype: Any = None,
) -> Distillation:
    """Returns `loss(student_params, batch, projections=None, ...) -> (loss, metrics)`.

    total = alpha * schedule(step) * (loss + weighted matches) + (1 - alpha) * cross entropy.
    It is differentiated like any loss: `jax.value_and_grad(loss, has_aux=True)(params, batch)`.
    The teacher runs once and gets no gradient. `jc.quantize_aware(loss, recipe)` quantizes the
    student alone: quantization-aware distillation.

    The call takes, beside the student's parameters and a batch:
      projections: from `loss.init(key, params, batch)`, where features differ in width.
      teacher_params: the teacher is then called as `teacher(teacher_params, inputs)`, and keeps
        the sharding of its parameters; a tuple of them for several teachers.
      teacher_outputs: stored outputs of this batch instead of running the teacher:
        logits, a `TopK`, or `{"output": ..., "features": ...}`, as `record` stores them.
      step: for the schedule.

    Args:
      student: `student(params, inputs)` -> logits float[..., classes].
      teacher: `teacher(inputs)`, or `teacher(teacher_params, inputs)`; several; or None if all
        outputs are stored.
      loss: a loss of logits, such as `kl(temperature=4.0)`; None for features alone.
      match: `match(...)`, or several: losses of features inside.
      hard_labels: where in a batch the labels int[...] are (index, key or function of the batch);
        True is index 1.
      alpha: weight of distillation, 1 - alpha that of the labels. Without it 0.9 where there are
        labels, else 1.
      schedule: step -> factor of the distillation, such as a warm-up.
      inputs: where in a batch the inputs are; index 0 if there are labels, else all of it.
      mask: where in a batch bool or weights for the rows are.
      teacher_weights: factors of several teachers; equal ones that add up to 1 if left out.
      teacher_dtype: such as `jnp.bfloat16`: parameters and inputs of the teacher are cast to it.

    Raises:
      JaxCompressError: settings that do not fit, or (when called) operands that do not.
      SiteError: when called, a pattern that matches nothing, features that do not pair up.

    >>> import jax, jax.numpy as jnp
    >>> from jaxcompress import distill
    >>> student = teacher = lambda params, x: x @ params
    >>> w, x = jnp.eye(2), jnp.ones((4, 2))
    >>> loss = distill.loss_fn(student, lambda x: teacher(2 * w, x), distill.kl(temperature=4.0))
    >>> (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(w, x)
    >>> sorted(metrics)
    ['distill', 'loss']

    References: Hinton et al. 2015, section 2; Polino et al. 2018, Model Compression via
    Distillation and Quantization, section 3.
    """
    if teacher is None or callable(teacher):
        teachers: tuple[Callable | None, ...] = (teacher,)
    else:
        teachers = tuple(teacher)
    matches = (match,) if isinstance(match, Match) else tuple(match)
    labels = 1 if hard_labels is True else hard_labels
    labels = None if labels is False else labels
    if alpha is None:
        alpha = 1.0 if labels is None else 0.9
    if not 0 <= alpha <= 1:
        raise JaxCompressError(f"loss_fn: alpha={alpha!r}; it must lie between 0 and 1.")
    if alpha < 1 and labels is None:
        raise JaxCompressError(
            f"loss_fn: alpha={alpha!r} leaves {1 - alpha:g} to labels and there are none: give "
            "hard_labels=, such as hard_labels=True for batches (inputs, labels)."
        )
    if loss is None and not matches:
        raise JaxCompressError("loss_fn: neither a loss of logits nor a match; there is no loss.")
    weights = teacher_weights or (1 / len(teachers),) * len(teachers)
    if len(weights) != len(teachers) or any(m.teacher >= len(teachers) for m in matches):
        raise JaxCompressError(
            f"loss_fn: {len(teachers)} teachers, {len(weights)} teacher_weights, and matches for "
            f"teachers {sorted({m.teacher for m in matches})} (counted from 0)."
        )
    if inputs is None and labels is not None:
        inputs = 0
    return Distillation(
        student, teachers, loss, matches, labels, inputs, mask, float(alpha), schedule,
        tuple(weights), teacher_dtype,
    )  # fmt: skip
