# SPDX-License-Identifier: Apache-2.0
"""Contrastive representation distillation, with the other examples of the batch as negatives."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ._loss import RULED_OUT, Loss, described, positive, reduced, unit
from ._similarity import gram


def crd(temperature: float = 0.07) -> Loss:
    """Mean of -log(exp(s_i t_i / T) / sum_j exp(s_i t_j / T)), s and t of length 1.

    Operands are features float[n, width]; `match` learns the projection where widths differ.
    With labels int[n], other examples of the same class are no negatives. The paper draws
    negatives from a memory of all examples; here they are those of the batch. The loss is not 0
    where student and teacher are equal, but smallest where pairs agree and others do not.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    >>> print(round(float(crd(1.0)(x, x)), 4))  # log(1 + exp(-1))
    0.3133

    References: Tian et al. 2020, Contrastive Representation Distillation, section 3 (with the
    objective of van den Oord et al. 2018, InfoNCE, equation 4).
    """
    name = described("crd", temperature=temperature)
    positive(name, temperature=temperature)

    def compute(student, teacher, labels, weights):
        n = len(student)
        s, t = (unit(x.reshape(n, -1)) for x in (student, teacher))
        taken = jnp.broadcast_to((weights > 0)[None], (n, n))
        if labels is not None:
            labels = jnp.asarray(labels)
            taken &= (labels[:, None] != labels[None]) | jnp.eye(n, dtype=bool)
        scores = jnp.where(taken, gram(s, t) / temperature, RULED_OUT)
        rows = jax.nn.logsumexp(scores, axis=-1) - jnp.diagonal(scores)
        return reduced(rows, weights)

    return Loss(name, compute, leading=1)
