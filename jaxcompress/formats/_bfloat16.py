# SPDX-License-Identifier: Apache-2.0
"""bfloat16: the upper half of a float32, rounded in integers so that subnormals are not flushed."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from ._base import Format
from ._rounding import check


@dataclasses.dataclass(frozen=True, repr=False)
class BFloat16(Format):
    """The finite numbers of bfloat16; infinities saturate. Used without a scale."""

    has_nan: ClassVar[bool] = True
    default_range: ClassVar[str] = "fixed"

    def values(self) -> np.ndarray:
        codes = np.arange(2**16, dtype=np.uint16)
        finite = codes[codes & 0x7F80 != 0x7F80].view(ml_dtypes.bfloat16)
        return np.unique(finite.astype(np.float64) + 0.0)

    def round(self, v: Any, rounding: str = "half_even", key: Any = None) -> jax.Array:
        v = jnp.asarray(v)
        check(rounding, key)
        bits = lax.bitcast_convert_type(v, jnp.uint32)
        low = np.uint32(0xFFFF)
        if rounding == "half_even":
            more = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        elif rounding == "half_away":
            more = np.uint32(0x8000)
        elif rounding == "floor":
            more = (bits >> np.uint32(31)) * low
        else:
            more = jax.random.bits(key, v.shape, jnp.uint16).astype(jnp.uint32)
        rounded = lax.bitcast_convert_type((bits + more) & ~low, jnp.float32)
        high = np.float32(self.max)  # infinity has to saturate, and NaN may have become one
        rounded = lax.select(lax.abs(rounded) <= high, rounded, lax.sign(v) * high)
        return lax.select(jnp.isnan(v), v, rounded)


_max = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
bfloat16 = BFloat16("bfloat16", 16, -_max, _max, jnp.dtype(jnp.bfloat16))
