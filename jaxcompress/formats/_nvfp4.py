# SPDX-License-Identifier: Apache-2.0
"""NVFP4: blocks of 16 E2M1 values, E4M3 scales, and a float32 scale of the tensor.

    g = max|x| / (6 * 448)      s_b = e4m3(max_b |x| / 6 / g)      q = e2m1(x / (s_b g))

Without g, weights of size 1e-3 would have scales below the smallest E4M3 number and vanish.
Four-over-six (Cook et al. 2025) may map the largest value of a block to 4 instead of 6, where the
steps are finer, whichever gives the smaller squared error; 256 then takes the place of 448, so
that 1.5 times the largest scale still is an E4M3 number.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ._base import safe_scale
from ._block import BlockFormat
from ._minifloat import float4_e2m1fn, float8_e4m3fn


@dataclasses.dataclass(frozen=True, repr=False)
class NVFP4(BlockFormat):
    """E2M1 elements with scales of two levels. Scales are stored as `float8_e4m3fn`.

    Attributes:
        scale_top: the E4M3 number that the largest scale of the tensor is mapped to.
        search: how many times the extent of a block its scale is made for, tried in this order.
    """

    scale_top: float
    search: tuple[float, ...]

    block: ClassVar[int] = 16
    two_level: ClassVar[bool] = True

    @property
    def scale_dtype(self) -> np.dtype:
        return float8_e4m3fn.dtype

    def global_scale(self, absmax: jax.Array) -> jax.Array:
        return safe_scale(absmax, self.max * self.scale_top)

    def find_scale(self, extent: jax.Array, global_scale: Any = None) -> jax.Array:
        """Returns e4m3(extent / 6 / global_scale), and 1 where the extent is zero."""
        g = jnp.float32(1) if global_scale is None else global_scale
        scale = float8_e4m3fn.round(extent / np.float32(self.max) / g)
        scale = jnp.where(extent > 0, scale, jnp.where(jnp.isnan(extent), extent, np.float32(1)))
        return scale.astype(self.scale_dtype)

    def factors(self, scale: Any, global_scale: Any = None) -> tuple[jax.Array, ...]:
        scale = jnp.asarray(scale).astype(jnp.float32)
        return (scale if global_scale is None else scale * global_scale,)


def _make(name: str, scale_top: float, search: tuple[float, ...]) -> NVFP4:
    element = float4_e2m1fn
    return NVFP4(name, 4.5, element.min, element.max, element.dtype, element, scale_top, search)


nvfp4 = _make("nvfp4", 448.0, (1.0,))
nvfp4_four_over_six = _make("nvfp4_four_over_six", 256.0, (1.0, 1.5))
