# SPDX-License-Identifier: Apache-2.0
"""What happens at one site: its operands are rounded, and its operation runs on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from jax import lax

from .._core.qtensor import dequantized, is_qtensor
from .._core.sites import Site
from . import flat, integer, straight_through
from .backward import with_backward
from .integer import Rounded, Spec
from .integer_dot import codes_of
from .native import Native
from .quantizer import Quantizer


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is done at a site. A sequence of quantizers, one per operand; None: left in float.

    Attributes:
      operands: these quantizers.
      gradient: the quantizer of what flows back, or None.
      product: how the operation is computed, in integers, in small floats or laid out anew; None:
        as written.
    """

    operands: tuple[Quantizer | None, ...]
    gradient: Quantizer | None = None
    product: Spec | Native | None = None

    def __iter__(self) -> Iterator[Quantizer | None]:
        return iter(self.operands)

    def __getitem__(self, i: int) -> Quantizer | None:
        return self.operands[i]

    @property
    def in_integers(self) -> bool:
        """Whether the operation is a product of integers."""
        return isinstance(self.product, Spec) and self.product.integers

    def for_operands(self, operands: Sequence) -> Setting:
        """The same for these operands: a product of codes may be one of packed weights only."""
        if isinstance(self.product, Native) and not self.product.takes(operands):
            return dataclasses.replace(self, product=self.product.otherwise)
        return self

    @property
    def changes(self) -> bool:
        """Whether anything is done at all."""
        return any(self.operands) or self.gradient is not None


def run(site: Site, setting: Setting, bind: Any, operands: Sequence[Rounded], learned: Any) -> Any:
    """The operation on operands that are quantized; backward as the setting says."""
    spec = setting.product if isinstance(setting.product, Spec) else None
    if spec is not None and not _fitting(spec, operands):
        spec = None
    if setting.gradient is None and spec is None:
        return bind(*(x.array for x in operands))
    operands = [Rounded(dequantized(x.value), x.codes) for x in operands]
    if setting.gradient is None:
        assert spec is not None
        return integer.run(spec, *operands)
    key = (learned or {}).get("key")
    return with_backward(site, bind, operands, setting.gradient, key, spec)


def _fitting(spec: Spec, operands: Sequence[Rounded]) -> bool:
    """Whether operands are what a product takes: codes, or arrays; nothing that a mesh splits."""
    if spec.integers and any(x.codes is None for x in operands):
        return False
    if not spec.integers and any(is_qtensor(x.value) for x in operands):
        return False
    arrays = [x.codes.codes if x.codes is not None else x.value for x in operands]
    return not flat.split_by_mesh(arrays)


def quantized(site: Site, setting: Setting, operands: Sequence) -> list:
    """The operands of a site rounded to their formats; packed weights already are."""
    pairs = enumerate(zip(operands, setting, strict=True))
    return [rounded_operand(site, i, q, x, False).value for i, (x, q) in pairs]


def rounded_operand(
    site: Site, i: int, quantizer: Quantizer | None, x: Any, codes: bool
) -> Rounded:
    """Operand `i` rounded to its format; in codes if they are asked for and known."""
    axis = site.contracting(i)
    if is_qtensor(x):
        return packed_operand(x, axis, codes)
    if quantizer is None:
        return Rounded(x)
    sync = site.operands[i].split_over(quantizer.shared_axes(x.shape, axis))
    known = None
    if codes:
        known = straight_through.codes_of(lax.stop_gradient(x), quantizer, axis, sync)
        if not quantizer.clips:  # its derivative is that of x
            return Rounded(x, known)
    return Rounded(quantizer.fake_quantize(x, axis, sync=sync), known)


def packed_operand(q: Any, axis: Sequence[int], codes: bool) -> Rounded:
    """A packed weight; with its codes if they are asked for, and scales are of whole rows."""
    known = codes_of(q) if codes else None
    if known is None or any(known.scale.shape[a] != 1 for a in axis):
        return Rounded(q)
    return Rounded(q, known)
