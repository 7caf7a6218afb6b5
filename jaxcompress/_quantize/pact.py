# SPDX-License-Identifier: Apache-2.0
"""PACT: the clipping value of an activation is learned.

    y      = clip(x, 0, a)            q = a / (2^k - 1) round(y (2^k - 1) / a)
    dq/dx  = 1 for 0 <= x < a         dq/da = 1 for x >= a, summed over the values that share a

The paper also adds an L2 penalty on a to the loss, which is left to the optimizer: `a` is a leaf
named "clip" among the learned arrays.

Choi et al. 2018, PACT: Parameterized Clipping Activation, equations 1 to 3.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

_SMALLEST = 2.0**-126


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def pact(x: jax.Array, a: jax.Array, levels: float) -> jax.Array:
    """x clipped to [0, a] and rounded to `levels` steps, with the gradients of PACT.

    Args:
      x: float32.
      a: float32, positive, broadcasts to x without adding axes.
      levels: 2^k - 1 for k bits.

    >>> pact(jnp.array([-1.0, 0.4, 3.0]), jnp.array([2.0]), 2.0)
    Array([0., 0., 2.], dtype=float32)
    >>> jax.grad(lambda a: pact(jnp.array([0.4, 3.0]), a, 2.0).sum())(jnp.array([2.0]))
    Array([1.], dtype=float32)
    """
    step = jnp.broadcast_to(jnp.maximum(a, _SMALLEST) / levels, x.shape)
    return jnp.clip(jnp.round(x / step), 0, levels) * step


@pact.defjvp
def _rule(levels, primals, tangents):
    x, a = primals
    dx, da = tangents
    clipped = x >= jnp.broadcast_to(a, x.shape)
    passed = (x >= 0) & ~clipped
    da = jnp.broadcast_to(da, x.shape)
    return pact(*primals, levels), jnp.where(passed, dx, 0.0) + jnp.where(clipped, da, 0.0)
