# SPDX-License-Identifier: Apache-2.0
"""`report`: every weight and every matmul with its format, bytes, noise, and why if left alone."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from .._core import _compat
from .._core.arguments import ArgNums, name_of
from .._core.bars import bars
from .._core.qtensor import QTensor
from .._core.tabular import Tabular
from .._core.transform import Transformed
from .._errors import FormatError
from ..formats._checks import count_nonfinite
from . import recipes
from .accounting import Row, rows_of
from .aware import QuantizeAware
from .noise import Noise, decibels
from .recipe import Recipe

_COLUMNS: tuple[str, ...] = (
    "site", "op", "shape", "weight", "activation", "gradient", "bytes before", "after",
    "weight SNR dB", "SNR dB", "seconds", "left alone because",
)  # fmt: skip
_NUMBERS = ("bytes before", "after", "weight SNR dB", "SNR dB", "seconds")
# Columns that are there if there is something to say, and their fields.
_IF_ANY = {"gradient": "gradient", "weight SNR dB": "weight_snr_db", "seconds": "seconds"}


@dataclasses.dataclass(frozen=True)
class Report(Tabular):
    """What a recipe does to a function. Prints as a table, also in notebooks."""

    name: str
    recipe: str
    rows: tuple[Row, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters as they are."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all parameters as the recipe stores them."""
        return sum(row.bytes_after for row in self.rows)

    @property
    def title(self) -> str:
        """The function, the recipe and the totals in a line."""
        total = f"{self.bytes_before:,} -> {self.bytes_after:,} bytes"
        return f"{self.name}, recipe {self.recipe}: {total}"

    def to_json(self) -> str:
        """JSON text with the name, the recipe, the totals and all rows.

        A signal-to-noise ratio that is not finite is the text `"inf"` or `"nan"`, since JSON has
        no such number.
        """
        data = dataclasses.asdict(self)
        for row in data["rows"]:
            for field in ("snr_db", "weight_snr_db"):
                if row[field] is not None and not math.isfinite(row[field]):
                    row[field] = str(row[field])
        data |= {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        return json.dumps(data, indent=2, allow_nan=False)

    @property
    def columns(self) -> list[tuple[str, bool]]:
        """(heading, whether it holds numbers); some only if there is something to say."""
        empty = {
            heading
            for heading, field in _IF_ANY.items()
            if all(getattr(row, field) is None for row in self.rows)
        }
        return [(c, c in _NUMBERS) for c in _COLUMNS if c not in empty]

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text."""
        rows = (dict(zip(_COLUMNS, _texts(row), strict=True)) for row in self.rows)
        return [[row[heading] for heading, _ in self.columns] for row in rows]

    @property
    def figures(self) -> list[str]:
        """Error by layer and bytes by layer."""
        sizes = [(row.site, (row.bytes_before, row.bytes_after)) for row in self.rows]
        drawn = [bars("Bytes by layer", ("before", "after"), [s for s in sizes if any(s[1])])]
        noisy = [row for row in self.rows if row.snr_db is not None]
        fields = ["snr_db", "weight_snr_db"]
        fields = [f for f in fields if any(getattr(row, f) is not None for row in noisy)]
        if noisy:
            found = [(row.site, [getattr(row, f) for f in fields]) for row in noisy]
            numbers = [(site, [math.nan if x is None else x for x in xs]) for site, xs in found]
            names = ["result", "weight"][: len(fields)]
            title = "Signal over error by layer, dB (higher is better)"
            drawn.insert(0, bars(title, names, numbers, ".1f"))
        return drawn


def _texts(row: Row) -> tuple[str, ...]:
    """One text for each of the columns."""
    return (
        row.site,
        row.op,
        "x".join(map(str, row.shape)),
        row.weight or "",
        row.activation or "",
        row.gradient or "",
        f"{row.bytes_before:,}",
        f"{row.bytes_after:,}",
        "" if row.weight_snr_db is None else f"{row.weight_snr_db:.1f}",
        "" if row.snr_db is None else f"{row.snr_db:.1f}",
        "" if row.seconds is None else f"{row.seconds:.2f}",
        row.reason,
    )


def report(
    fn: Callable, recipe: str | Recipe | None = None, argnums: ArgNums = 0
) -> Callable[..., Report]:
    """Says what a recipe does to a function: every weight and every matmul, nothing left out.

    Args:
      fn: any function that JAX can trace.
      recipe: name of a recipe or a `Recipe`; None lists everything as it is.
      argnums: position (or name) of the argument that holds the parameters, or several.

    Returns:
      A function of the arguments of `fn` that returns a `Report`. With arrays as arguments the
      function is run once and the signal-to-noise ratio at the result of every site is measured;
      with `jax.ShapeDtypeStruct`s nothing is computed.

    Raises:
      RecipeError, SiteError: as `quantize_aware`.
      FormatError: a parameter has NaNs or infinities.

    >>> import jax.numpy as jnp
    >>> fn = lambda p, x: x @ p["w"] + p["b"]
    >>> params = {"w": jnp.ones((4, 8)), "b": jnp.ones((1, 8))}
    >>> for row in report(fn, "w8a16")(params, jnp.ones((2, 4))).rows:
    ...     print(row.site, row.weight, row.bytes_before, row.bytes_after)
    w int8 per channel 128 64
    b float32 32 32
    """
    chosen = Recipe([], "none") if recipe is None else recipes.get(recipe)
    listing = Transformed(fn, QuantizeAware(chosen), argnums)
    measure = Transformed(fn, Noise(chosen), argnums)

    def run(*args, **kwargs) -> Report:
        _reject_nan(listing.parameters(args, kwargs))
        traced = listing.trace(*args, **kwargs)
        snr: dict[str, float] = {}
        leaves = jax.tree.leaves((args, kwargs))
        if traced.plan.names and not any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
            _, state = measure.init(*args, **kwargs)
            _, state = measure.call({}, state, args, kwargs)
            snr = decibels(state)
        return Report(name_of(fn), chosen.name, tuple(rows_of(traced, chosen, snr)))

    return run


def _reject_nan(parameters: Iterable[tuple[str, Any]]) -> None:
    for path, value in parameters:
        if isinstance(value, (_compat.Tracer, jax.ShapeDtypeStruct, QTensor)):
            continue
        if bad := count_nonfinite(value):
            raise FormatError(
                f"parameter `{path}` has {bad} NaNs or infinities among its "
                f"{jnp.size(value)} values: no format can hold them. Was the training stable?"
            )
