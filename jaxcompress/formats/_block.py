# SPDX-License-Identifier: Apache-2.0
"""`BlockFormat`: elements of a small format, and for each block of them a scale that is stored.

Codes are those of the elements; a subclass says which scales there are and how they are found. A
block that cannot be stored has NaN for its scale, so the elements need none.
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._base import Format, float32_like
from ._checks import reject_nan


@dataclasses.dataclass(frozen=True, repr=False)
class BlockFormat(Format):
    """Elements that share scales.

    Attributes:
        element: the format of the elements.
    """

    element: Format

    has_nan = True  # the scale says so

    @property
    @abc.abstractmethod
    def scale_dtype(self) -> np.dtype: ...

    def values(self) -> np.ndarray:
        return self.element.values()

    def round(self, v: Any, rounding: str = "half_even", key: Any = None) -> jax.Array:
        return self.element.round(v, rounding, key)

    def to_codes(self, grid: jax.Array) -> jax.Array:
        if not self.element.has_nan:
            grid = lax.select(jnp.isnan(grid), lax.full_like(grid, 0), grid)
        return self.element.to_codes(grid)

    def from_codes(self, codes: jax.Array) -> jax.Array:
        return self.element.from_codes(codes)

    @property
    def code_bits(self) -> int:
        return self.element.code_bits

    def check_nan(self, v: jax.Array, factors: tuple[jax.Array, ...]) -> None:
        if not self.element.has_nan:
            said = jnp.isnan(float32_like(factors[0], v.shape))
            reject_nan(lax.select(said, lax.full_like(v, 0), v), self.name)
