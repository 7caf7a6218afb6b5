# SPDX-License-Identifier: Apache-2.0
"""SparseGPT (Frantar and Alistarh 2023): pruning that makes up for it in the weights to come."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import RecipeError
from ..formats import Format
from . import checks, obq
from . import sparsity as rules
from .cholesky import inverse_cholesky
from .lead import over_lead, over_outputs
from .rounder import Rounder, groups_of, rounder_of, table
from .select import largest, n_of_m


class SparseGPTResult(NamedTuple):
    """Weights of which some are zero.

    Attributes:
        mask: bool[*lead, out, in], True where weights stay.
        w: float32[*lead, out, in], zero elsewhere; values of the codes if there are any.
        loss: (w0 - w) (H + λ I) (w0 - w)ᵀ for each output, with the weights w0 that were given,
            float32[*lead, out].
        damping: as in `GPTQResult`.
        codes: [*lead, out, in], or None without a format.
        scales: of the rounder, leaves [*lead, out, groups], or None.
    """

    mask: jax.Array
    w: jax.Array
    loss: jax.Array
    damping: jax.Array
    codes: jax.Array | None
    scales: Any


def sparsegpt(
    w: Any,
    hessian: Any,
    *,
    sparsity: float | None = None,
    nm: rules.Pattern | None = None,
    rounder: Format | Rounder | None = None,
    group_size: int | None = None,
    scales: Any = None,
    mask: Any = None,
    damping: float = 0.01,
    block: int = 128,
    precision: str = "float32",
) -> SparseGPTResult:
    """Makes weights zero, and rounds the others if asked to, one input after the other.

        score_i = w_i² / U_ii²     e_i = (w_i - m_i Q(w_i)) / U_ii     w_j -= U_ij e_i for j > i

    The mask m keeps the largest scores of a block of inputs and all outputs, as the weights are
    when the block begins; or N of the M inputs that come next, in each output.

    Args:
        w: weights, float[*lead, out, in].
        hessian: float[*lead, in, in], sum or mean of x xᵀ over calibration tokens.
        sparsity: fraction of all weights that becomes zero, spread evenly over blocks; their total
            is exact, rounded half to even.
        nm: instead, (N, M): N of every M consecutive inputs stay.
        rounder: number format, or how values that share a scale are rounded, for pruning and
            quantization jointly. Codes of weights that are zero are those of the number closest to
            zero.
        group_size, scales, damping, precision: as in `gptq`. Without groups scales are those of
            the weights given.
        mask: instead of sparsity and nm, which weights stay, bool[*lead, out, in].
        block: inputs whose weights are compared with each other, with `sparsity`.

    Raises:
        RecipeError: if not one of sparsity, nm and mask is given, or it is out of range.
        FormatError: if an argument has a wrong shape or is not finite; if groups, M and block do
            not divide each other.
        SiteError: if the Hessian is zero or cannot be factorized.

    Example:
        >>> x = jnp.array([[1.0, 1.0], [0.0, 0.1]])  # two inputs that are almost the same
        >>> sparsegpt([[1.0, 2.0]], x.T @ x, nm=(1, 2), damping=1e-4).w.round(2)
        Array([[0.  , 2.99]], dtype=float32)

    References: Frantar and Alistarh 2023, Algorithm 1 and section 3.4. The code published with it
    prunes one weight more in each block, and every weight at its threshold; here counts are exact.
    """
    w = checks.weights(w, group_size)
    h = checks.inputs(hessian, w, 2, "hessian")
    if mask is None:
        rules.check(w.shape[-1], sparsity, nm)
    elif sparsity is not None or nm is not None:
        raise RecipeError("mask= says which weights stay: leave out sparsity= and nm=.")
    else:
        mask = checks.mask(mask, w)
    rounder = None if rounder is None else rounder_of(rounder)
    if scales is not None:
        checks.scales(scales, w, groups_of(w.shape[-1], group_size))
    factor = inverse_cholesky(h, damping=damping, precision=precision)
    static = rounder is not None and (scales is not None or group_size is None)
    selection = None if mask is not None else _Some(block, sparsity or 0.0, w.shape[-1])
    if nm is not None:
        selection = _NofM(nm[1], nm[0])
    mask, values, loss, codes, found = _solve(
        w, factor.u, factor.dead, scales, mask, selection, rounder, group_size, static, block
    )
    return SparseGPTResult(mask, values, loss, factor.damping, codes, found)


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8, 9))
def _solve(
    w: jax.Array, u: jax.Array, dead: jax.Array, scales: Any, mask: Any,
    selection: obq.Selection | None,
    rounder: Rounder | None, group_size: int | None, static: bool, block: int,
) -> tuple:  # fmt: skip
    """Returns (mask, values, loss, codes, scales)."""
    group = jnp.arange(w.shape[-1]) // (group_size or w.shape[-1])
    coupled = isinstance(selection, _Some) or (rounder is not None and rounder.coupled)

    def one(w, u, dead, scales, mask) -> tuple:
        def panel(w: jax.Array, scales: Any, mask: Any) -> tuple:
            w = jnp.where(dead[None], 0, w)
            w, scales, mask = jax.tree.map(jnp.transpose, (w, scales, mask))
            if static and scales is None:
                assert rounder is not None
                scales = table(w, rounder, group_size, shared)
            done = obq.solve(
                w, u, rounder=rounder, scales=scales, shared=shared, group=group,
                group_size=group_size, mask=mask, selection=selection, block=block,
            )  # fmt: skip
            mask, values, codes, found = jax.tree.map(
                jnp.transpose, (done.mask, done.values, done.codes, done.scales)
            )
            return mask, values, done.loss, codes, found

        shared = None if rounder is None else rounder.shared(jnp.where(dead[None], 0, w).T)
        return over_outputs(panel, coupled)(w, scales, mask)

    return over_lead(one, w.ndim - 2)(w, u, dead, scales, mask)


@dataclasses.dataclass(frozen=True)
class _NofM:
    """N of M inputs, in each output."""

    size: int
    n: int

    def choose(self, w: jax.Array, diagonal: jax.Array, start: jax.Array) -> jax.Array:
        return n_of_m(jnp.square(w / diagonal), self.n, self.size, axis=0)


@dataclasses.dataclass(frozen=True)
class _Some:
    """A fraction of the weights of a block of inputs."""

    size: int
    sparsity: float
    inputs: int

    def choose(self, w: jax.Array, diagonal: jax.Array, start: jax.Array) -> jax.Array:
        size, out = w.shape
        ends = np.minimum(np.arange(0, self.inputs + size, size), self.inputs) * out
        pruned = np.diff([round(int(end) * self.sparsity) for end in ends])
        count = jnp.asarray(np.diff(ends) - pruned, jnp.int32)[start // size]
        filling = start + jnp.arange(size)[:, None] >= self.inputs
        scores = jnp.where(filling, -1.0, jnp.square(w / diagonal))
        return largest([scores], count)[0]
