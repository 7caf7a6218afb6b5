# SPDX-License-Identifier: Apache-2.0
"""GPTQ (Frantar et al. 2022): rounding that makes up for its errors in the weights to come."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..formats import Format
from . import checks, obq
from .cholesky import inverse_cholesky
from .lead import over_lead, over_outputs
from .rounder import Rounder, groups_of, rounder_of, table


class GPTQResult(NamedTuple):
    """Weights in a number format.

    Attributes:
        codes: of the dtype of the format, [*lead, out, in].
        scales: of the rounder, leaves [*lead, out, groups].
        w_q: the values of the codes, float32[*lead, out, in]; zero where a mask said so.
        loss: (w - w_q) (H + λ I) (w - w_q)ᵀ for each output, float32[*lead, out].
        damping: λ as a fraction of the mean of the diagonal, as it was really used,
            float32[*lead].
        group: which of the scales is that of an input, int32[*lead, in].
    """

    codes: jax.Array
    scales: Any
    w_q: jax.Array
    loss: jax.Array
    damping: jax.Array
    group: jax.Array


def gptq(
    w: Any,
    hessian: Any,
    rounder: Format | Rounder,
    *,
    group_size: int | None = None,
    scales: Any = None,
    act_order: bool = False,
    static_groups: bool = False,
    damping: float = 0.01,
    block: int = 128,
    mask: Any = None,
    precision: str = "float32",
) -> GPTQResult:
    """Rounds one input after the other and corrects those that follow for each error.

        e_i = (w_i - Q(w_i)) / U_ii        w_j -= U_ij e_i for all j > i        Uᵀ U = (H + λ I)⁻¹

    The weights of dead inputs, whose diagonal of H is zero, become zero first.

    Args:
        w: weights, float[*lead, out, in]. Each index of the leading axes is a problem of its own.
        hessian: float[*lead, in, in], sum or mean of x xᵀ over calibration tokens.
        rounder: number format, or how values that share a scale are rounded.
        group_size: consecutive inputs that share a scale, which is found when their turn comes,
            from the weights as corrected until then; by default one scale an output, found at the
            start.
        scales: to use instead, leaves [*lead, out, groups].
        act_order: begin with the inputs of the largest diagonal of H. Groups are then made of
            inputs that follow each other in this order, see `group` of the result.
        static_groups: find the scales of all groups at the start, of inputs that follow each
            other in the array, also with `act_order`.
        damping: λ as a fraction of the mean of the diagonal; raised where that does not suffice.
        block: inputs after which errors are pushed on to all that follow; a matter of speed.
        mask: bool[*lead, out, in], False where weights are zero and stay so; their part is made
            up for like any error.
        precision: of the factorization of H, "float32" or "float64" (on the host).

    Raises:
        FormatError: if an argument has a wrong shape or is not finite.
        SiteError: if the Hessian is zero or cannot be factorized.

    Example:
        >>> from jaxcompress import formats
        >>> w, x = jnp.array([[0.4, 3.0, 0.4]]), jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
        >>> result = gptq(w, x.T @ x, formats.int3, damping=1e-4)  # the outputs of x: 0.8, 3
        >>> result.w_q
        Array([[0., 3., 1.]], dtype=float32)

    References: Frantar et al. 2022 (GPTQ), Algorithm 1; activation order, static groups and dead
    inputs as in the code published with it. In that code the scale of a group inside a block lags
    behind the corrections of this block, and dead inputs get the diagonal 1; here it does not, and
    they get the mean of the others.
    """
    rounder = rounder_of(rounder)
    w = checks.weights(w, group_size)
    h = checks.inputs(hessian, w, 2, "hessian")
    groups = groups_of(w.shape[-1], group_size)
    static = static_groups or scales is not None or group_size is None
    if mask is not None:
        mask = checks.mask(mask, w)
    if scales is not None:
        checks.scales(scales, w, groups)
    order = _order(h) if act_order else None
    factor = inverse_cholesky(_ordered(h, order), damping=damping, precision=precision)
    codes, found, w_q, loss, group = _solve(
        w, factor.u, factor.dead, mask, scales, order, rounder, group_size, static, block
    )
    return GPTQResult(codes, found, w_q, loss, factor.damping, group)


@functools.partial(jax.jit, static_argnums=(6, 7, 8, 9))
def _solve(
    w: jax.Array, u: jax.Array, dead: jax.Array, mask: Any, scales: Any, order: Any,
    rounder: Rounder, group_size: int | None, static: bool, block: int,
) -> tuple:  # fmt: skip
    """Returns (codes, scales, w_q, loss, group)."""
    group = jnp.arange(w.shape[-1]) // (group_size or w.shape[-1])

    def one(w, u, dead, mask, scales, order) -> tuple:
        back = None if order is None else jnp.argsort(order)
        dead = dead if back is None else dead[back]
        own = group[order] if order is not None and static else group

        def panel(w: jax.Array, mask: Any, scales: Any) -> tuple:
            w, mask, scales = jax.tree.map(jnp.transpose, (w, mask, scales))
            w = obq.kept(jnp.where(dead[:, None], 0, w), mask)
            if scales is None and static:
                scales = table(w, rounder, group_size, shared)
            if order is not None:
                w, mask = w[order], None if mask is None else mask[order]
            done = obq.solve(
                w, u, rounder=rounder, scales=scales, shared=shared, group=own,
                group_size=group_size, mask=mask, block=block,
            )  # fmt: skip
            codes, values = done.codes, done.values
            assert codes is not None
            if back is not None:
                codes, values = codes[back], values[back]
            return *jax.tree.map(jnp.transpose, (codes, done.scales, values)), done.loss

        shared = rounder.shared(obq.kept(jnp.where(dead[None], 0, w), mask).T)
        done = over_outputs(panel, rounder.coupled)(w, mask, scales)
        return *done, own if back is None else own[back]

    return over_lead(one, w.ndim - 2)(w, u, dead, mask, scales, order)


@jax.jit
def _order(h: jax.Array) -> jax.Array:
    """Inputs by falling diagonal; equal ones in the order of the array."""
    return jnp.argsort(-jnp.diagonal(h, axis1=-2, axis2=-1), axis=-1, stable=True)


@jax.jit
def _ordered(h: jax.Array, order: jax.Array | None) -> jax.Array:
    if order is None:
        return h
    rows = jnp.take_along_axis(h, order[..., None], axis=-2)
    return jnp.take_along_axis(rows, order[..., None, :], axis=-1)
