# SPDX-License-Identifier: Apache-2.0
"""GKD's choice of sequences: with probability lambda the student learns from what it writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._loss import fraction


def on_policy(sample: Callable, *, fraction_sampled: float = 0.5) -> Callable[..., Any]:
    """Returns `choose(key, student_params, batch) -> batch`, a step before the loss.

    With probability `fraction_sampled` (the paper's lambda) it is `sample(key, student_params,
    batch)`, such as a batch of prompts that the student continued, else the batch itself; both
    must have the same structure, shapes and dtypes. Nothing is differentiated through it. Any loss
    follows; the paper's is `jsd` (or `vocab_jsd`) at the tokens that were written.

    Args:
      sample: (key, student_params, batch) -> batch.
      fraction_sampled: probability in [0, 1].

    >>> import jax, jax.numpy as jnp
    >>> choose = on_policy(lambda key, params, batch: batch + 1, fraction_sampled=1.0)
    >>> print(choose(jax.random.key(0), None, jnp.array(1.0)))
    2.0

    References: Agarwal et al. 2024, On-Policy Distillation (GKD), algorithm 1.
    """
    fraction("on_policy", fraction_sampled=fraction_sampled)

    def choose(key: Any, student_params: Any, batch: Any) -> Any:
        key, coin = jax.random.split(key)
        batch = jax.tree.map(jnp.asarray, batch)
        sampled = jax.random.uniform(coin) < fraction_sampled
        params = lax.stop_gradient(student_params)
        return lax.stop_gradient(
            lax.cond(sampled, lambda: sample(key, params, batch), lambda: batch)
        )

    return choose
