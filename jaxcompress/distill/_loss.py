# SPDX-License-Identifier: Apache-2.0
"""What all losses share: one signature, masks, the mean over what is not masked, the checks.

A loss is made once with its settings and called as `loss(student, teacher, labels=..., mask=...)`.
Numbers are computed in float32, whatever the dtype of the operands (in float64 where they have
it). The teacher's operand is a constant: it gets exactly zero gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._core import _compat
from .._errors import JaxCompressError

RULED_OUT = -1e30  # what the logit -inf of an impossible class counts as
REDUCTIONS = ("mean", "sum", "none")


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss with its settings, as `row_loss` and `batch_loss` make it.

    Attributes:
      name: what made it, with its settings.
      compute: (student, teacher, labels, mask) -> value, on checked float operands.
      wants_labels: whether `labels` must be given.
      same_width: whether the last dimensions must be equal; `match` then learns a projection
        where they differ.
      leading: how many dimensions a mask may have, from the left; None for all but the last.
    """

    name: str
    compute: Callable = dataclasses.field(repr=False)
    wants_labels: bool = False
    same_width: bool = True
    leading: int | None = None

    def __call__(
        self,
        student: Array,
        teacher: Array,
        *,
        labels: Any | None = None,
        mask: Any | None = None,
    ) -> Array:
        """The loss of what the student says, given what the teacher says.

        Args:
          student, teacher: logits or features; shapes as the loss says.
          labels: int[...], the true classes; looked at by losses that want them.
          mask: bool or weights >= 0, for the leading dimensions. What has weight 0 counts for
            nothing, whatever its numbers are, and if everything has weight 0 the loss is 0.

        Raises:
          JaxCompressError: shapes or dtypes that do not fit, labels missing or out of range
            (inside jit, where a value cannot raise, the loss is NaN).
        """
        student, teacher = operands(self.name, student, teacher, self.same_width)
        weights = weights_of(self.name, student, mask, self.leading)
        student, teacher = cleared(student, weights), cleared(teacher, weights)
        if self.wants_labels and labels is None:
            raise JaxCompressError(
                f"{self.name} needs the true classes: give labels=int[...], or hard_labels= to "
                "jaxcompress.distill.loss_fn."
            )
        return self.compute(student, teacher, labels, weights)


def row_loss(
    name: str,
    values: Callable[..., Array],
    *,
    reduction: str = "mean",
    wants_labels: bool = False,
    logits: bool = True,
) -> Loss:
    """A loss that has one value for each row, float[..., classes] -> float[...].

    Args:
      name: what to call it in messages.
      values: (student, teacher) -> values of the rows, or (student, teacher, one_hot) for a loss
        that wants labels, with one_hot bool[..., classes].
      reduction: `"mean"` over the rows by their weights, `"sum"`, or `"none"`.
      logits: whether operands are logits, in which -inf rules a class out.
    """
    if reduction not in REDUCTIONS:
        raise JaxCompressError(f"{name}: reduction={reduction!r}; it is one of {REDUCTIONS}.")

    def compute(student, teacher, labels, weights):
        if logits:
            student, teacher = jnp.maximum(student, RULED_OUT), jnp.maximum(teacher, RULED_OUT)
        one_hot = ()
        if wants_labels:
            hot, labels_fit = one_hot_of(name, student, labels, weights)
            one_hot = (hot,)
        found = values(student, teacher, *one_hot)
        if wants_labels:
            found = jnp.where(labels_fit, found, jnp.nan)
        return reduced(found, weights, reduction)

    return Loss(name, compute, wants_labels)


def batch_loss(
    name: str, value: Callable[[Array, Array, Array], Array], *, same_width: bool = False
) -> Loss:
    """A loss about the examples of a batch together: [n, ...] and weights[n] -> one number."""

    def compute(student, teacher, labels, weights):
        return value(student, teacher, weights)

    return Loss(name, compute, same_width=same_width, leading=1)


def operands(name: str, student: Any, teacher: Any, same_width: bool) -> tuple[Array, Array]:
    """Both operands as floats of at least 32 bits, the teacher's as a constant."""
    pair = []
    for who, x in (("student", student), ("teacher", teacher)):
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 1:
            raise JaxCompressError(
                f"{name}: the {who}'s operand is {x.dtype}{list(x.shape)}; it must be an array of "
                "floating-point numbers with at least one dimension."
            )
        pair.append(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    student, teacher = pair
    n = student.ndim if same_width else 1
    if student.shape[:n] != teacher.shape[:n] or (same_width and student.ndim != teacher.ndim):
        what = "shapes" if same_width else "numbers of examples"
        raise JaxCompressError(
            f"{name}: different {what}: student {list(student.shape)}, teacher "
            f"{list(teacher.shape)}. Vocabularies and classes must be the same; for features of "
            "another width use jaxcompress.distill.match, which learns a projection."
        )
    return student, lax.stop_gradient(teacher)


def weights_of(name: str, x: Array, mask: Any, leading: int | None) -> Array:
    """Weights of the rows (all leading dimensions) or of the examples (`leading` of them)."""
    rows = x.shape[:-1] if leading is None else x.shape[:leading]
    if mask is None:
        return jnp.ones(rows, x.dtype)
    mask = lax.stop_gradient(jnp.asarray(mask)).astype(x.dtype)
    if mask.shape != rows[: mask.ndim]:
        raise JaxCompressError(
            f"{name}: mask {list(mask.shape)} does not fit operands {list(x.shape)}: it must have "
            f"their leading dimensions, at most {list(rows)}."
        )
    return jnp.broadcast_to(spread(mask, len(rows)), rows)


def spread(x: Array, ndim: int) -> Array:
    """x with dimensions of size 1 behind its own, `ndim` in all."""
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def cleared(x: Array, weights: Array) -> Array:
    """x with zeros where the weight is 0: a NaN there would survive a product with zero."""
    return jnp.where(spread(weights, x.ndim) > 0, x, jnp.zeros_like(x))


def reduced(values: Array, weights: Array, reduction: str = "mean") -> Array:
    """Sum of weights * values, over the sum of weights for `"mean"`; 0 if that is 0."""
    values = jnp.where(weights > 0, weights * values, 0)
    if reduction == "none":
        return values
    total = jnp.sum(weights) if reduction == "mean" else 1.0
    return jnp.sum(values) / jnp.where(total > 0, total, 1)


def one_hot_of(name: str, logits: Array, labels: Any, weights: Array) -> tuple[Array, Array]:
    """(bool[..., classes], whether each label is a class).

    Raises:
      JaxCompressError: labels of the wrong shape or dtype, or out of range where it is known.
    """
    labels, classes = jnp.asarray(labels), logits.shape[-1]
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != logits.shape[:-1]:
        raise JaxCompressError(
            f"{name}: labels are {labels.dtype}{list(labels.shape)} and logits "
            f"{list(logits.shape)}: labels must be integers of shape {list(logits.shape[:-1])}."
        )
    fit = (labels >= 0) & (labels < classes)
    wrong = ~fit & (weights > 0)
    if not isinstance(wrong, _compat.Tracer) and wrong.any():
        raise JaxCompressError(
            f"{name}: label {int(labels[wrong][0])} is out of range: there are {classes} classes. "
            "Give rows without a label the mask 0."
        )
    hot = labels[..., None] == jnp.arange(classes).reshape((1,) * labels.ndim + (-1,))
    return hot, fit


def positive(name: str, **settings: float) -> None:
    """Raises if a setting is not a positive finite number."""
    for key, value in settings.items():
        if not 0 < value < float("inf"):
            raise JaxCompressError(f"{name}: {key}={value!r}; it must be positive and finite.")


def fraction(name: str, **settings: float) -> None:
    """Raises if a setting is not in [0, 1]."""
    for key, value in settings.items():
        if not 0 <= value <= 1:
            raise JaxCompressError(f"{name}: {key}={value!r}; it must lie between 0 and 1.")


def described(name: str, **settings: Any) -> str:
    """`kl(temperature=4.0)`: how a loss is called in messages."""
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"


def log_softmax(logits: Array, temperature: float) -> Array:
    """log p of softmax(logits / T) over the last dimension."""
    return jax.nn.log_softmax(logits / temperature, axis=-1)


def relative_entropy(log_p: Array, log_q: Array) -> Array:
    """KL(p || q) over the last dimension; terms with p = 0 are 0."""
    p = jnp.exp(log_p)
    return jnp.sum(p * jnp.where(p > 0, log_p - log_q, 0), axis=-1)


def unit(x: Array, axis: int | tuple[int, ...] = -1) -> Array:
    """x / |x| along `axis`; a zero vector stays zero, with zero gradient."""
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0))
    x = x / jnp.where(largest > 0, largest, 1)  # squares neither overflow nor vanish
    squared = jnp.sum(x * x, axis=axis, keepdims=True)
    return x * lax.rsqrt(jnp.where(squared > 0, squared, 1))
