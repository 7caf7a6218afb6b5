# SPDX-License-Identifier: Apache-2.0
"""Rounding that makes up for its errors in the weights to come."""

from __future__ import annotations

from ..._core.qtensor import QTensor
from ..._solvers.gptq import gptq as solve
from ..rounder import QuantizerRounder
from ._method import Layer, Method
from ._mse import searched
from ._sparsegpt import needs_zero


def gptq(
    *,
    damping: float = 0.01,
    act_order: bool = True,
    static_groups: bool = False,
    search: bool = True,
    block: int = 128,
    precision: str = "float32",
    keep_zeros: bool = False,
) -> Method:
    """GPTQ: inputs are rounded one after the other, each error is corrected in those that follow.

        H = sum x x^T        e_i = (w_i - Q(w_i)) / U_ii        w_j -= U_ij e_i for j > i
        with U^T U = (H + damping mean(diag H) I)^-1

    Any format, groups and zero points, as the recipe says; matmuls, convolutions (their patches are
    the inputs), experts and scanned layers. By default a block of layers sees the inputs that the
    rounded blocks before it make. Lookup tables and weights that several sites read are rounded to
    nearest; the report says so.

    Args:
      damping: share of the mean of the Hessian's diagonal that is added to it.
      act_order: begin with the inputs of the largest diagonal of the Hessian; the scales of all
        groups are then found first, since a group is stored as inputs that follow each other.
      static_groups: find the scales of all groups before anything is corrected.
      search: choose every scale as "mse" does, by the squared error of the weights; at 3 bits and
        less the range of the largest weight is a poor one.
      block: inputs after which errors are pushed on; a matter of speed.
      precision: of the factorization, "float32" or "float64" (on the host).
      keep_zeros: weights that are zero stay zero: of pruned parameters.

    >>> gptq(damping=0.1).needs
    ('gram',)

    References: Frantar et al. 2022, GPTQ, Algorithm 1; the options as in the code published with
    it, where `act_order` and `mse` (search) are off by default. As there without
    `true_sequential`, the sites of a block are rounded for inputs that its float weights make.
    """
    static = static_groups or act_order

    def round(layer: Layer) -> QTensor:
        q = layer.weight.quantizer
        if keep_zeros:
            needs_zero(q.format, "gptq(keep_zeros=True)")
        done = solve(
            layer.w,
            layer.statistics["gram"],
            QuantizerRounder(searched(q) if search else q),
            group_size=layer.group_size,
            act_order=act_order,
            static_groups=static,
            damping=damping,
            block=block,
            mask=layer.w != 0 if keep_zeros else None,
            precision=precision,
        )
        s = done.scales
        return layer.packed(done.codes, s.scale, s.zero_point, s.global_scale)

    settings = {
        "damping": damping, "act_order": act_order, "static_groups": static, "search": search,
        "block": block, "precision": precision, "keep_zeros": keep_zeros,
    }  # fmt: skip
    return Method(
        "gptq", round=round, needs=("gram",), sequential=True, settings=tuple(settings.items())
    )
