# SPDX-License-Identifier: Apache-2.0
"""What a method of post-training quantization is, and the layer that it gets to see."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..._calibration.rows import Rows
from ..._core.qtensor import QTensor
from .. import layout
from ..quantizer import Quantizer
from ..weights import Weight


@dataclasses.dataclass(frozen=True)
class Method:
    """One step on the way from a float function to a quantized one. Made by the functions here.

    Attributes:
      name: of the method.
      prepare: `prepare(job) -> job` with another function or other parameters that compute the
        same; before anything is rounded.
      round: `round(layer) -> QTensor` of the weight of one layer.
      correct: `correct(job, packed) -> job`, which changes float parameters after rounding.
      needs: collectors whose statistics `round` reads.
      sequential: whether by default each layer sees the inputs that the rounded layers before it
        make.
      settings: of the method, for the report.
    """

    name: str
    prepare: Callable[[Any], Any] | None = None
    round: Callable[[Layer], QTensor] | None = None
    correct: Callable[[Any, Mapping[str, QTensor]], Any] | None = None
    needs: tuple[str, ...] = ()
    sequential: bool = False
    settings: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Layer:
    """The weight of a site, to be rounded.

    Attributes:
      name: of the site.
      weight: its quantizer and how it is read.
      v: the weight as the site sees it, float[*stack, *shape]; `stack` are scanned layers.
      rows: its layout as [*lead, out, in]; None for lookups and what else has none.
      statistics: by collector, of its input, [*stack, *lead, ...].
    """

    name: str
    weight: Weight
    v: jax.Array
    rows: Rows | None
    statistics: Mapping[str, Any]

    @property
    def w(self) -> jax.Array:
        """float32[*stack, *lead, out, in]."""
        assert self.rows is not None
        return self._mapped(self.rows.of)(self.v.astype(jnp.float32))

    @property
    def group_size(self) -> int | None:
        """How many consecutive inputs share a scale; None for one scale an output."""
        assert self.rows is not None
        q = self.weight.quantizer
        return None if self._blocks() is None else (q.granularity.size or q.format.block)

    def solvable(self) -> bool:
        """Whether scales are laid out as solvers have them: an output, or groups of its inputs."""
        q = self.weight.quantizer
        plain = q.granularity.kind in ("channel", "group", "token")
        return self.rows is not None and plain and not q.special

    def nearest(self, quantizer: Quantizer | None = None) -> QTensor:
        """The weight rounded to nearest, by its own quantizer or another one."""
        return self.weight.nearest(self.v, quantizer)

    def packed(self, codes: jax.Array, scale: jax.Array, zero: Any, shared: Any) -> QTensor:
        """The weight of codes [*stack, *lead, out, in] and scales [*stack, *lead, out, groups].

        Args:
          codes: of the dtype of the format.
          scale: as the format stores it.
          zero: zero points like `scale`, or None.
          shared: second-level scale like `scale`, constant in each layer; or None.
        """
        rows = self.rows
        assert rows is not None
        fmt, blocks = self.weight.quantizer.format, self._blocks()

        def one(codes: jax.Array, scale: jax.Array, zero: Any, shared: Any) -> QTensor:
            def back(s: jax.Array) -> jax.Array:
                s = rows.back(s, inside=False)
                return s if blocks is not None else s.reshape(self._channel_shape())

            z = None if zero is None else fmt.to_codes(back(zero))
            g = None if shared is None else shared.ravel()[0]
            return QTensor.from_codes(
                rows.back(codes), back(scale), z,
                format=fmt, dtype=self.v.dtype, blocks=blocks, global_scale=g,
            )  # fmt: skip

        return self._mapped(one)(codes, scale, zero, shared)

    def _channel_shape(self) -> tuple[int, ...]:
        assert self.rows is not None
        axis = self.rows.contracted
        return tuple(1 if d in axis else n for d, n in enumerate(self.rows.shape))

    def _blocks(self) -> Any:
        assert self.rows is not None
        q, rows = self.weight.quantizer, self.rows
        return layout.cut(rows.shape, rows.contracted, q.granularity, q.indivisible)[0]

    def _mapped(self, f: Callable) -> Callable:
        assert self.rows is not None
        return self.rows.over_stack(f, self.v)
