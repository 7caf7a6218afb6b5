# SPDX-License-Identifier: Apache-2.0
"""A function on its way to be quantized: what the steps of a method read and change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .._calibration.data import Data
from .._calibration.stream import Batches, Inputs
from .._core.region import Traced
from .._core.transform import Transformed
from .aware import QuantizeAware
from .recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Job:
    """A function, its float parameters, a recipe, and the data to calibrate with.

    Attributes:
      recipe: what becomes of its sites.
      fn, params, inputs, batches, notes, bar, compiled: as in `Data`.
    """

    fn: Callable[..., Any]
    params: Any
    recipe: Recipe
    inputs: Inputs
    batches: Batches | None = None
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    bar: bool | None = None
    compiled: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def data(self) -> Data:
        """Without the recipe; notes and programs are shared."""
        return Data(
            self.fn, self.params, self.inputs, self.batches, self.notes, self.bar, self.compiled
        )

    @property
    def call(self) -> tuple[tuple, dict]:
        """The arguments of a call of the function: (args, kwargs)."""
        return self.data.call

    @property
    def inner(self) -> Transformed:
        return Transformed(self.fn, QuantizeAware(self.recipe))

    def trace(self) -> Traced:
        """The sites and what the recipe does there."""
        args, kwargs = self.call
        return self.inner.trace(*args, **kwargs)

    def parameters(self) -> dict[str, Any]:
        """The parameters by key path."""
        return self.data.parameters()

    def with_parameters(self, new: Mapping[str, Any]) -> Any:
        """The pytree of parameters with other values at these key paths."""
        return self.data.with_parameters(new)

    def collect(self, wanted: Mapping[str, Sequence[str]], why: str) -> dict[str, dict[str, Any]]:
        """Statistics of the inputs of sites, see `Data.collect`."""
        return self.data.collect(wanted, why)
