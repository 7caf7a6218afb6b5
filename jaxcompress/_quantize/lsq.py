# SPDX-License-Identifier: Apache-2.0
"""LSQ: the step size of a quantizer is learned with the weights.

    v^     = s round(clip(v / s, -Qn, Qp))
    dv^/dv = 1 inside, 0 outside
    dv^/ds = round(v / s) - v / s inside, -Qn below, Qp above, times g = 1 / sqrt(numel Qp)
    s      = 2 mean|v| / sqrt(Qp) at first

Signed formats use their full range, Qn = 2^(b-1) and Qp = 2^(b-1) - 1; numel is the number of
values that share s.

Esser et al. 2020, Learned Step Size Quantization, equations 1 to 5 and section 2.2.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

_SMALLEST = 2.0**-126  # a step that descended to zero or below: it keeps its gradient


def initial_step(mean: jax.Array, qp: float) -> jax.Array:
    """First step size from the mean of |v|; 1 where all values are zero.

    >>> float(initial_step(jnp.float32(3.0), 9.0))
    2.0
    """
    step = 2 * mean / qp**0.5
    return jnp.where(step < _SMALLEST, 1.0, step)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def lsq(v: jax.Array, s: jax.Array, qn: float, qp: float, numel: int) -> jax.Array:
    """v rounded to multiples of the step s, with the gradients of LSQ.

    Args:
      v: float32.
      s: float32, positive, broadcasts to v without adding axes.
      qn, qp: how many steps there are below and above zero.
      numel: how many values share one step.

    Returns:
      float32 in the shape of v.

    >>> f = lambda s: lsq(jnp.array([0.3, 2.0]), s, 4.0, 3.0, 2).sum()
    >>> bool(jnp.allclose(jax.grad(f)(jnp.array([0.5])), (1 - 0.6 + 3) / 6**0.5))
    True
    """
    codes, s = lsq_codes(v, s, qn, qp)
    return codes * jnp.broadcast_to(s, v.shape)


def lsq_codes(v: jax.Array, s: jax.Array, qn: float, qp: float) -> tuple[jax.Array, jax.Array]:
    """(whole numbers of steps as float32, the step as it is used)."""
    s = jnp.maximum(s, _SMALLEST)
    return jnp.round(jnp.clip(v / jnp.broadcast_to(s, v.shape), -qn, qp)), s


@lsq.defjvp
def _rule(qn, qp, numel, primals, tangents):
    v, s = primals
    dv, ds = tangents
    u = v / jnp.broadcast_to(jnp.maximum(s, _SMALLEST), v.shape)
    inside = (-qn <= u) & (u <= qp)
    slope = jnp.where(inside, jnp.round(u) - u, jnp.clip(u, -qn, qp))
    g = 1 / (numel * qp) ** 0.5
    ds = jnp.broadcast_to(ds, v.shape)
    return lsq(*primals, qn, qp, numel), jnp.where(inside, dv, 0.0) + slope * (g * ds)
