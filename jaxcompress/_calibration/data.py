# SPDX-License-Identifier: Apache-2.0
"""A function with its parameters and the batches that it is looked at with."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from .._core.region import Traced
from .._core.transform import Listing, Transformed
from .._errors import JaxCompressError
from ..formats._checks import count_nonfinite
from .stream import Batches, Inputs, collect


@dataclasses.dataclass(frozen=True)
class Data:
    """A function, its float parameters and the data to calibrate with.

    Attributes:
      fn: `fn(params, *inputs)`.
      params: its float parameters.
      inputs: one batch, or its shapes.
      batches: the calibration data; None if there is none.
      notes: by name of a site or key path of a parameter, remarks for the report.
      bar: whether a progress bar is drawn; None where stderr is a terminal.
      compiled: programs that collect statistics, see `collect`.
    """

    fn: Callable[..., Any]
    params: Any
    inputs: Inputs
    batches: Batches | None = None
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    bar: bool | None = None
    compiled: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def call(self) -> tuple[tuple, dict]:
        """The arguments of a call of the function: (args, kwargs)."""
        return (self.params, *self.inputs.args), self.inputs.kwargs

    @property
    def _inner(self) -> Transformed:
        return Transformed(self.fn, Listing())

    def trace(self) -> Traced:
        """The sites."""
        args, kwargs = self.call
        return self._inner.trace(*args, **kwargs)

    def parameters(self) -> dict[str, Any]:
        """The parameters by key path."""
        return dict(self._inner.parameters(*self.call))

    def with_parameters(self, new: Mapping[str, Any]) -> Any:
        """The pytree of parameters with other values at these key paths."""
        return self._inner.replace(new, *self.call)[0][0]

    def collect(
        self,
        wanted: Mapping[str, Sequence[str]],
        why: str,
        *,
        params: Any = None,
        layer: int | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Statistics of the inputs of sites, see `collect`.

        Args:
          wanted: by name of a site, names of collectors.
          why: what needs them, for messages and the progress bar.
          params: instead of those of the job.
          layer: see `collect`.

        Raises:
          JaxCompressError: there are no calibration data.
        """
        if self.batches is None:
            raise JaxCompressError(
                f"{why} needs to see data: pass calibration=, an iterable of batches. Without "
                "data there are the methods 'rtn' and 'mse'."
            )
        params = self.params if params is None else params
        label = why if layer is None else f"{why}, layer {layer}"
        with progress(label, self.bar) as show:
            return collect(
                self.fn, params, self.batches, wanted,
                layer=layer, show=show, compiled=self.compiled,
            )  # fmt: skip


def check_finite(parameters: Mapping[str, Any]) -> None:
    """Raises if a parameter has NaNs or infinities.

    Raises:
      JaxCompressError: names it.
    """
    for path, x in parameters.items():
        if bad := sum(map(count_nonfinite, jax.tree.leaves(x))):
            raise JaxCompressError(
                f"parameter `{path}` has {bad} NaNs or infinities: no format can hold them. "
                "Was the training stable?"
            )


@contextlib.contextmanager
def progress(label: str, wanted: bool | None) -> Iterator[Callable[[], None]]:
    """A bar on stderr that counts batches; by default where stderr is a terminal."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    shown = console.is_terminal if wanted is None else wanted
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not shown) as bar:
        row = bar.add_task(label, total=None)
        yield lambda: bar.update(row, advance=1)
