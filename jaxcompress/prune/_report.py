# SPDX-License-Identifier: Apache-2.0
"""How sparse a model is, weight by weight, and how much of its arithmetic is left."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from .._core.observe import sites
from .._core.qtensor import dequantized, is_stored
from .._core.sites import Site
from .._core.tabular import Tabular
from ._targets import paths_of


class Row(NamedTuple):
    """One site.

    Attributes:
      site: its name.
      shape: of its weight, as stored; of the result, without a weight.
      sparsity: the part of the weight that is zero; None without a weight, or if it is computed
        from several parameters.
      multiplications: of one call of the function, all executions of the site together.
      left: how many of them have a weight that is not zero.
    """

    site: str
    shape: tuple[int, ...]
    sparsity: float | None
    multiplications: int
    left: int


@dataclasses.dataclass(frozen=True)
class Sparsities(Tabular):
    """What `report` returns. Prints as a table, also in notebooks.

    Attributes:
      name: of the function, and of what pruned it.
      rows: a row for each site.
      masks: pytree like the parameters, where something was pruned just now: True where weights
        stay.
      notes: (key path, remark) of parameters.
    """

    name: str
    rows: tuple[Row, ...]
    masks: Any = dataclasses.field(default=None, repr=False, compare=False)
    notes: tuple[tuple[str, str], ...] = ()

    @property
    def multiplications(self) -> int:
        """Of all sites."""
        return sum(row.multiplications for row in self.rows)

    @property
    def left(self) -> int:
        """Those whose weight is not zero."""
        return sum(row.left for row in self.rows)

    def to_json(self) -> str:
        """JSON text with the name, the totals and all rows."""
        data: dict[str, Any] = {"name": self.name, "rows": [row._asdict() for row in self.rows]}
        data["notes"] = dict(self.notes)
        data |= {"multiplications": self.multiplications, "left": self.left}
        return json.dumps(data, indent=2)

    @property
    def title(self) -> str:
        share = self.left / max(self.multiplications, 1)
        return (
            f"{self.name}: {self.left:,} of {self.multiplications:,} multiplications left "
            f"({share:.1%})"
        )

    @property
    def columns(self) -> list[tuple[str, bool]]:
        """(heading, whether it holds numbers)."""
        return [("site", False), ("shape", False)] + [
            (name, True) for name in ("sparsity", "multiplications", "left")
        ]

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text."""
        return [
            [
                row.site,
                str(list(row.shape)),
                "" if row.sparsity is None else f"{row.sparsity:.2%}",
                f"{row.multiplications:,}",
                f"{row.left:,}",
            ]
            for row in self.rows
        ] + [[path, note, "", "", ""] for path, note in self.notes]


def report(fn: Callable) -> Callable[..., Sparsities]:
    """Returns a function of the arguments of `fn` that says how sparse its weights are.

    Counted are multiplications of matmuls and convolutions, those with the padding of a convolution
    among them. A weight that is read in parts counts with the sparsity of the whole. That nothing
    is multiplied with zeros is up to kernels: no time is predicted.

    Args:
      fn: a forward pass or loss whose first argument are the parameters, arrays, QTensors or
        SparseTensors. It is traced, not run.

    >>> import jax.numpy as jnp
    >>> fn = lambda p, x: x @ p["w"]
    >>> found = report(fn)({"w": jnp.array([[0.0, 2.0], [0.0, 0.0]])}, jnp.ones((5, 2)))
    >>> found.rows[0].sparsity, found.multiplications, found.left
    (0.75, 20, 5)
    """

    def run(params: Any, *inputs: Any, **kwargs: Any) -> Sparsities:
        leaves = jax.tree.map(_zeros, params, is_leaf=is_stored)
        zeros = {path or "arg0": value for path, value in paths_of(leaves)}
        rows = [
            _row(site, zeros)
            for site in sites(fn)(params, *inputs, **kwargs)
            if not site.opaque and site.op != "gather"
        ]
        return Sparsities(getattr(fn, "__name__", type(fn).__name__), tuple(rows))

    return run


@dataclasses.dataclass(frozen=True)
class _Zeros:
    """How many values of an array are zero; a leaf."""

    shape: tuple[int, ...]
    count: int


def _zeros(x: Any) -> Any:
    x = np.asarray(dequantized(x))
    return _Zeros(x.shape, int(np.sum(x == 0)))


def _row(site: Site, zeros: dict[str, _Zeros]) -> Row:
    size = math.prod(site.out_avals[0].shape) * math.prod(site.loops)
    last = len(site.operands) - 1  # kernels of convolutions are on the right
    operand = site.operands[last]
    size *= math.prod(operand.shape[d] for d in site.contracting(last))
    known = [zeros.get(site.operands[i].path) for i in site.weights]
    if len(known) != 1 or known[0] is None:
        return Row(site.name, tuple(site.out_avals[0].shape), None, size, size)
    weight = known[0]
    total = max(math.prod(weight.shape), 1)
    left = size - size * weight.count // total
    return Row(site.name, weight.shape, weight.count / total, size, left)
