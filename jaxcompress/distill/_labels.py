# SPDX-License-Identifier: Apache-2.0
"""Cross entropy with the true classes: the part of a loss that no teacher gives."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from ._loss import log_softmax, row_loss


def cross_entropy(logits: Array, labels: Any, mask: Any = None) -> Array:
    """Mean over rows, by their weights, of -log softmax(logits)[label]."""

    def values(student, teacher, one_hot):
        return -jnp.sum(jnp.where(one_hot, log_softmax(student, 1.0), 0), axis=-1)

    return row_loss("hard_labels", values, wants_labels=True)(
        logits, logits, labels=labels, mask=mask
    )
