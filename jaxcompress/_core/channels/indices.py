# SPDX-License-Identifier: Apache-2.0
"""Which integers are indices of an axis: the expert that `argmax` chose is one of the router's.

Where such an integer indexes the very axis that it was found along, indices can be removed: what
`argmax` finds among the rest is never one that is gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jax.extend.core import Literal

from ..analyze import CALLS
from .rules import MOVES, SCATTER, Rule

if TYPE_CHECKING:
    from .graph import Node
    from .terms import Term

_CHOOSE = {"argmax": 0, "argmin": 0, "top_k": 1}  # which result holds indices
# Entries of the result are entries of the first operand.
_PICK = MOVES | {"slice", "dynamic_slice", "gather", "rev", "reduce_max", "reduce_min"}


class Indices:
    """Indices among the variables of a jaxpr: by variable the axis, and what was added to them."""

    def __init__(self):
        self._axis: dict[Any, tuple[Term, int]] = {}

    def start(self, variables: Sequence, known: Sequence) -> None:
        self._axis.update({v: x for v, x in zip(variables, known) if x is not None})

    def of(self, variables: Sequence) -> list[tuple[Term, int] | None]:
        """What is known of variables; an empty list if that is nothing at all."""
        if not self._axis:
            return []
        return [None if isinstance(v, Literal) else self._axis.get(v) for v in variables]

    def follow(self, n: Node, i: int, eqn: Any) -> None:
        """Notes what the results of an equation are indices of."""
        name = eqn.primitive.name
        if name in _CHOOSE:
            axis = (eqn.params.get("axes") or (eqn.params.get("axis", -1),))[0]
            self._axis[eqn.outvars[_CHOOSE[name]]] = n.of(eqn.invars[0])[axis], 0
        elif name in CALLS:
            (sub,) = n.subs[i]
            for v, known in zip(eqn.outvars, sub.indices.of(sub.jaxpr.outvars)):
                if known is not None:
                    self._axis[v] = known
        elif self._axis and any(known := self.of(eqn.invars)):
            if name == "sort":
                self.start(eqn.outvars, known)
            elif name in _PICK:
                self.start(eqn.outvars, known[:1])
            else:
                self.start(eqn.outvars, [self._computed(n, eqn, name, known)])

    def _computed(self, n: Node, eqn: Any, name: str, known: list) -> tuple[Term, int] | None:
        if name == "select_n":  # where(i < 0, i + size, i), and i is not negative
            found = [x for x in known[1:] if x is not None]
            if len(found) < len(known) - 1:
                return None
            first = min(found, key=lambda x: x[1])
            return first if first[1] == 0 and all(x[0] is first[0] for x in found) else None
        place = next(k for k, x in enumerate(known) if x is not None)
        (axis, added), others = known[place], [k for k in range(len(known)) if k != place]
        values = [n.known(eqn.invars[k]) for k in others]
        if None in values or not values:
            return None
        low, high = min(map(int, values)), max(map(int, values))
        if name == "add" and added == 0 and low == axis.size:
            return axis, axis.size
        inside = (name == "max" and high <= 0) or (name == "min" and low >= axis.size - 1)
        if inside or (name == "clamp" and low <= 0 and high >= axis.size - 1):
            return axis, added
        return None

    def known(self, eqn: Any, found: Rule) -> Mapping[Any, Term]:
        """Labels of a gather or scatter along which it reads indices of the very same axis."""
        scatters = eqn.primitive.name in SCATTER
        if not self._axis or not (scatters or eqn.primitive.name == "gather"):
            return {}
        index = self._axis.get(eqn.invars[1]) if not isinstance(eqn.invars[1], Literal) else None
        dn = eqn.params["dimension_numbers"]
        where = dn.scatter_dims_to_operand_dims if scatters else dn.start_index_map
        single = dn.inserted_window_dims if scatters else dn.collapsed_slice_dims
        if index is None or len(where) != 1 or where[0] not in single:
            return {}
        axis, added = index
        if added or axis.size != eqn.invars[0].aval.shape[where[0]]:
            return {}
        return {found.ins[0][where[0]]: axis}
