# SPDX-License-Identifier: Apache-2.0
"""DoReFa: weights and activations in fixed ranges, nothing stored and nothing learned.

    quant_k(r) = round((2^k - 1) r) / (2^k - 1) for 0 <= r <= 1, straight through
    w_q = 2 quant_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1        a_q = quant_k(clip(a, 0, 1))

Weights come out between -1 and 1, whatever their size was. The paper's quantized gradients are
not part of this.

Zhou et al. 2016, DoReFa-Net, equations 5, 9 and 11.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def quant_k(r: jax.Array, levels: float) -> jax.Array:
    """r, between 0 and 1, rounded to `levels` steps; the tangent passes straight through.

    >>> quant_k(jnp.array([0.1, 0.6]), 3.0)
    Array([0.       , 0.6666667], dtype=float32)
    """
    return jnp.round(levels * r) / levels


quant_k.defjvp(lambda levels, primals, tangents: (quant_k(*primals, levels), tangents[0]))


def dorefa_weight(w: jax.Array, levels: float) -> jax.Array:
    """Weights of DoReFa, between -1 and 1; `levels` is 2^k - 1 for k bits.

    >>> dorefa_weight(jnp.array([-2.0, 0.1, 2.0]), 1.0)
    Array([-1.,  1.,  1.], dtype=float32)
    """
    t = jnp.tanh(w)
    top = jnp.maximum(jnp.max(jnp.abs(t)), 2.0**-126)
    return 2 * quant_k(t / (2 * top) + 0.5, levels) - 1


def dorefa_activation(a: jax.Array, levels: float) -> jax.Array:
    """Activations of DoReFa, between 0 and 1; `levels` is 2^k - 1 for k bits.

    >>> dorefa_activation(jnp.array([-1.0, 0.6, 5.0]), 3.0)
    Array([0.       , 0.6666667, 1.       ], dtype=float32)
    """
    return quant_k(jnp.clip(a, 0.0, 1.0), levels)
