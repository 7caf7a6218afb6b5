# SPDX-License-Identifier: Apache-2.0
"""Pruning and rounding in one pass: each makes up for the other's errors."""

from __future__ import annotations

from ..._core.qtensor import QTensor
from ..._errors import RecipeError
from ..._solvers import sparsity as rules
from ..._solvers.sparsegpt import sparsegpt as solve
from ..rounder import QuantizerRounder
from ._method import Layer, Method
from ._mse import searched


def sparsegpt(
    *,
    sparsity: float | None = None,
    nm: tuple[int, int] | None = None,
    damping: float = 0.01,
    search: bool = True,
    block: int = 128,
    precision: str = "float32",
) -> Method:
    """SparseGPT with quantization: weights that are not pruned are rounded when their turn comes.

    As "gptq", in the order of the inputs; what is pruned has the code of zero.

    Args:
      sparsity, nm, damping, block, precision: as in `jc.prune.sparsegpt`.
      search: choose every scale as "mse" does, by the squared error of the weights.

    Raises:
      RecipeError: not one of sparsity and nm, or out of range; (when used) a format without zero.

    >>> sparsegpt(nm=(2, 4)).needs
    ('gram',)

    References: Frantar and Alistarh 2023, section 3.5.
    """
    rules.check(1 if nm is None else nm[1], sparsity, nm)

    def round(layer: Layer) -> QTensor:
        q = layer.weight.quantizer
        needs_zero(q.format, "sparsegpt")
        done = solve(
            layer.w,
            layer.statistics["gram"],
            sparsity=sparsity,
            nm=nm,
            rounder=QuantizerRounder(searched(q) if search else q),
            group_size=layer.group_size,
            damping=damping,
            block=block,
            precision=precision,
        )
        assert done.codes is not None
        s = done.scales
        return layer.packed(done.codes, s.scale, s.zero_point, s.global_scale)

    settings = {
        "sparsity": sparsity, "nm": nm, "damping": damping, "search": search, "block": block,
        "precision": precision,
    }  # fmt: skip
    return Method(
        "sparsegpt", round=round, needs=("gram",), sequential=True,
        settings=tuple(settings.items()),
    )  # fmt: skip


def needs_zero(fmt: object, name: str) -> None:
    """Raises unless a format can hold zero.

    Raises:
      RecipeError: it cannot.
    """
    if not (fmt.values() == 0).any():  # type: ignore[attr-defined]
        raise RecipeError(
            f"{name} makes weights zero, and the format `{fmt.name}` has no zero."  # type: ignore[attr-defined]
        )
