# SPDX-License-Identifier: Apache-2.0
"""Sites: the operations that compression acts on, with names that stay the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from . import _compat

# Primitives that are sites, and how many of their operands matter.
OPERATIONS = {
    "dot_general": 2,
    "conv_general_dilated": 2,
    "ragged_dot_general": 2,
    "ragged_dot": 2,
    "gather": 1,
    "dynamic_slice": 1,
}
LOOKUPS = frozenset({"gather", "dynamic_slice"})  # both are `op="gather"`: table[ids], table[i]


def row_axes(eqn: Any) -> tuple[int, ...]:
    """Dimensions of a table that a lookup reads whole: a row of it."""
    numbers = eqn.params.get("dimension_numbers")
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims) if numbers else ()
    sizes = zip(eqn.params["slice_sizes"], eqn.invars[0].aval.shape, strict=True)
    return tuple(d for d, (n, size) in enumerate(sizes) if n == size and d not in gone)


class Operand(NamedTuple):
    """One operand of a site.

    Attributes:
      role: `"weight"` (derives from parameters only) or `"activation"`.
      path: key paths of those parameters, joined by `+`; empty for an activation.
      shape, dtype: as the operation sees it, after casts, transposes and slices.
      constant: depends neither on parameters nor on data.
      manual: inside shard_map, for every dimension the mesh axes that split it.
      owners: kinds of the transforms whose result this operand is.
      reads: how the whole of one parameter became this operand (`Label.reads`); None if this is
        a part of it, or computed.
    """

    role: str
    path: str
    shape: tuple[int, ...]
    dtype: Any
    constant: bool = False
    manual: tuple[frozenset[str], ...] | None = None
    owners: frozenset[str] = frozenset()
    reads: tuple[tuple[str, Any, int], ...] | None = None

    def split_over(self, dims: Sequence[int]) -> tuple[str, ...]:
        """Mesh axes that split any of these dimensions: a shared scale is reduced over them."""
        if self.manual is None:
            return ()
        return tuple(sorted(frozenset().union(*(self.manual[d] for d in dims))))


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One matched operation.

    Attributes:
      name: the weight's key path (`a+b` when it derives from two), `#1` when it is used again;
        without a weight `<name stack>/<primitive>#k`.
      op: name of the primitive; `gather` for every lookup in a table.
      operands: the operands that matter, as `Operand`s.
      out_avals: shapes and dtypes of the results.
      scope: name stack, such as the path of the module.
      loops: lengths of the enclosing scans, outermost first.
      layered: for each of them, whether it runs over stacked layers of this site.
      opaque: a primitive that hides a matmul where it cannot be changed.
      params: parameters of the primitive.
      eqn: the equation.
    """

    name: str
    op: str
    operands: tuple[Operand, ...]
    out_avals: tuple
    scope: str
    loops: tuple[int, ...]
    layered: tuple[bool, ...]
    opaque: bool
    eqn: Any = dataclasses.field(repr=False)

    @property
    def params(self) -> dict:
        """Parameters of the primitive."""
        return self.eqn.params

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the enclosing scans over stacked layers."""
        return tuple(n for n, layers in zip(self.loops, self.layered, strict=True) if layers)

    @property
    def source(self) -> str:
        """`file:line:column (function)` of the user's code."""
        return _compat.source_line(self.eqn)

    @property
    def weights(self) -> tuple[int, ...]:
        """Positions of the operands that are weights."""
        return tuple(i for i, o in enumerate(self.operands) if o.role == "weight")

    @property
    def floating(self) -> bool:
        """Whether all operands are real floating-point numbers."""
        return all(jnp.issubdtype(o.dtype, jnp.floating) for o in self.operands)

    def contracting(self, i: int) -> tuple[int, ...]:
        """Dimensions of operand `i` that the operation sums over, in the order it does.

        For the rows of a table that a gather reads: the dimensions inside a row. For the input
        of a convolution: all but the batch, since windows overlap.
        """
        p = self.params
        if self.op == "dot_general":
            return tuple(p["dimension_numbers"][0][i])
        if self.op.startswith("ragged_dot"):
            dims = p["ragged_dot_dimension_numbers"].dot_dimension_numbers
            return tuple(dims[0][i])
        if self.op == "conv_general_dilated":
            numbers = p["dimension_numbers"]
            return tuple((numbers.lhs_spec, numbers.rhs_spec)[i][1:])
        if self.op == "gather":
            return row_axes(self.eqn)
        raise AssertionError(f"{self.op} contracts nothing")


@dataclasses.dataclass
class Plan:
    """Sites of one call of one jaxpr.

    Attributes:
      sites: by index of the equation.
      calls: by index of the equation, the plans of the jaxprs that it calls.
      extra: what the analysis of an equation leaves for the interpreter.
      everything: all sites below, in program order, each name once.
    """

    sites: dict[int, Site] = dataclasses.field(default_factory=dict)
    calls: dict[int, tuple[Plan, ...]] = dataclasses.field(default_factory=dict)
    extra: dict[int, Any] = dataclasses.field(default_factory=dict)
    everything: list[Site] = dataclasses.field(default_factory=list)
    names: frozenset[str] = frozenset()

    def select(self, chosen: frozenset[str]) -> Plan:
        """The same plan with only the chosen sites, and no calls without one."""
        sites = {i: s for i, s in self.sites.items() if s.name in chosen}
        calls = {}
        for i, plans in self.calls.items():
            kept = tuple(plan.select(chosen) for plan in plans)
            if any(plan.names for plan in kept):
                calls[i] = kept
        everything = [s for s in self.everything if s.name in chosen]
        names = frozenset(s.name for s in everything)
        return Plan(sites, calls, self.extra, everything, names)
