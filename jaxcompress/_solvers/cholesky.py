# SPDX-License-Identifier: Apache-2.0
"""The inverse of a Hessian as OBQ needs it: upper triangular U with Uᵀ U = (H + λ I)⁻¹.

    flip both axes of H, L Lᵀ = H flipped, U = L⁻¹ flipped back

which is one Cholesky factorization and one triangular inverse where the published loop takes two
factorizations and an inverse. Both are made together, by halves:

    L = [[A, 0], [B, C]]   A Aᵀ = H11   B = H21 A⁻ᵀ   C Cᵀ = H22 - B Bᵀ   L⁻¹21 = -C⁻¹ B A⁻¹

so that nearly all of the work is in matmuls.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from .._errors import FormatError, SiteError
from . import checks
from .lead import over_lead

_RAISED = 10.0  # times the damping of the last attempt
_SMALLEST, _LARGEST = 1e-6, 1e4
_LEAF, _MOST_LEAVES = 128, 16  # inputs that are factorized at once, at least, and how often


class Factor(NamedTuple):
    """The factor of an inverse Hessian.

    Attributes:
        u: float32[*lead, in, in], upper triangular.
        damping: float32[*lead], as a fraction of the mean of the diagonal, which it really took.
        dead: bool[*lead, in], inputs that were zero in all tokens.
    """

    u: jax.Array
    damping: jax.Array
    dead: jax.Array


def inverse_cholesky(hessian: Any, *, damping: float = 0.01, precision: str = "float32") -> Factor:
    """Factorizes the inverse of a damped Hessian.

    λ is `damping` times the mean of the diagonal over inputs that are not dead. Where the matrix is
    not positive definite in the precision of the computation, λ is raised tenfold until it is.
    Dead inputs get that mean for their diagonal, so that U does not depend on the unit of H
    except for a factor.

    Args:
        hessian: float[*lead, in, in], sum or mean of x xᵀ over tokens.
        damping: at least 0.
        precision: "float32" on the device, or "float64" on the host, for arrays that are not
            traced.

    Raises:
        FormatError: if an argument is wrong, or the Hessian is not finite.
        SiteError: if the Hessian is zero, or is not positive definite with any damping.

    Example:
        >>> inverse_cholesky(jnp.diag(jnp.array([4.0, 1.0])), damping=0.0).u
        Array([[0.5, 0. ],
               [0. , 1. ]], dtype=float32)

    References: Frantar et al. 2022 (GPTQ), section 3.3, step 3.
    """
    h = jnp.asarray(hessian)
    if h.ndim < 2 or h.shape[-1] != h.shape[-2]:
        raise FormatError(f"A Hessian is [*lead, in, in], got {list(h.shape)}.")
    checks.finite(h, "hessian")
    checks.second_moments(h)
    if not damping >= 0:
        raise FormatError(f"damping={damping!r}: expected a fraction of the mean, at least 0.")
    if precision == "float64":
        factor = _on_host(h, float(damping))
    elif precision == "float32":
        factor = _on_device(h.astype(jnp.float32), damping)
    else:
        raise FormatError(f"precision={precision!r}: expected 'float32' or 'float64'.")
    if not isinstance(factor.damping, Tracer) and (np.asarray(factor.damping) > _LARGEST).any():
        raise SiteError(
            "The Hessian is not positive definite however much is added to its diagonal: it is "
            "no sum of x xᵀ. Check what was accumulated."
        )
    return factor


@jax.jit
def _on_device(h: jax.Array, damping: Any) -> Factor:
    return over_lead(lambda h: _one(h, damping), h.ndim - 2)(h)


def _one(h: jax.Array, damping: Any) -> Factor:
    h, mean, dead = _alive(h, jnp)
    eye = jnp.eye(h.shape[0], dtype=h.dtype)
    flipped = h[::-1, ::-1]

    def inverse(damping: jax.Array) -> jax.Array:
        return _inverse(flipped + damping * mean * eye, max(_LEAF, h.shape[0] // _MOST_LEAVES))

    def again(state: tuple) -> tuple:
        damping = jnp.maximum(state[0] * np.float32(_RAISED), np.float32(_SMALLEST))
        return damping, inverse(damping)

    def failed(state: tuple) -> jax.Array:
        return ~jnp.all(jnp.isfinite(state[1])) & (state[0] <= _LARGEST)

    damping = jnp.asarray(damping, jnp.float32)
    damping, low = lax.while_loop(failed, again, (damping, inverse(damping)))
    return Factor(low[::-1, ::-1], damping, dead)


def _inverse(h: jax.Array, leaf: int) -> jax.Array:
    """Returns L⁻¹, where L Lᵀ = h; NaNs where there is no such L."""
    n = h.shape[0]
    if n <= leaf:
        low = lax.linalg.cholesky(h, symmetrize_input=False)
        eye = jnp.eye(n, dtype=h.dtype)
        return lax.linalg.triangular_solve(low, eye, left_side=True, lower=True)
    k = n // 2
    a = _inverse(h[:k, :k], leaf)
    b = h[k:, :k] @ a.T
    c = _inverse(h[k:, k:] - b @ b.T, leaf)
    zeros = jnp.zeros((k, n - k), h.dtype)
    return jnp.block([[a, zeros], [-c @ (b @ a), c]])


def _on_host(h: jax.Array, damping: float) -> Factor:
    if isinstance(h, Tracer):
        raise FormatError("precision='float64' is for arrays that are not traced by jit.")
    host = np.asarray(h, np.float64)
    lead = host.shape[:-2]
    found = [_one_on_host(a, damping) for a in host.reshape(-1, *host.shape[-2:])]
    u, used, dead = (np.stack(part) for part in zip(*found, strict=True))
    shape = (*lead, *h.shape[-2:])
    return Factor(
        jnp.asarray(u.astype(np.float32).reshape(shape)),
        jnp.asarray(used.astype(np.float32).reshape(lead)),
        jnp.asarray(dead.reshape(*lead, -1)),
    )


def _one_on_host(h: np.ndarray, damping: float) -> tuple[np.ndarray, float, np.ndarray]:
    h, mean, dead = _alive(h, np)
    while damping <= _LARGEST:
        try:
            low = np.linalg.cholesky(h[::-1, ::-1] + damping * mean * np.eye(len(h)))
            return np.tril(np.linalg.inv(low))[::-1, ::-1], damping, dead
        except np.linalg.LinAlgError:
            damping = max(damping * _RAISED, _SMALLEST)
    return h, damping, dead


def _alive(h: Any, np_: Any) -> tuple[Any, Any, Any]:
    """Returns H with the mean of the others for dead inputs, that mean, and which are dead."""
    diagonal = np_.diagonal(h)
    dead = diagonal == 0
    mean = np_.sum(diagonal) / np_.maximum(np_.sum(~dead), 1)
    return h + np_.diag(np_.where(dead, mean, 0)), mean, dead
