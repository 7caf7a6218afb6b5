# SPDX-License-Identifier: Apache-2.0
"""Eight-bit floats of the OCP 8-bit Floating Point Specification (OFP8), saturating.

The casts of XLA and ml_dtypes do not saturate (465 becomes NaN in E4M3, infinity in E5M2), so
values are clipped first: infinity and everything too large become the largest finite number, as
in the saturating mode of OFP8 section 5.2.1. NaN stays NaN.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from ._base import Format


@dataclasses.dataclass(frozen=True, repr=False)
class Minifloat(Format):
    """The finite numbers of an 8-bit floating dtype; the codes are of that dtype."""

    affine: ClassVar[bool] = False
    has_nan: ClassVar[bool] = True

    def values(self) -> np.ndarray:
        every = np.arange(256, dtype=np.uint8).view(self.dtype).astype(np.float64)
        return np.unique(every[np.isfinite(every)])

    def round(self, v: jax.Array) -> jax.Array:
        clipped = lax.clamp(np.float32(self.min), v, np.float32(self.max))
        return clipped.astype(self.dtype).astype(jnp.float32)


def _ofp8(dtype: np.dtype) -> Minifloat:
    high = float(ml_dtypes.finfo(dtype).max)
    return Minifloat(dtype.name, 8, -high, high, dtype)


float8_e4m3fn = _ofp8(jnp.dtype(jnp.float8_e4m3fn))
float8_e5m2 = _ofp8(jnp.dtype(jnp.float8_e5m2))
