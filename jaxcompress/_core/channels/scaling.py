# SPDX-License-Identifier: Apache-2.0
"""Which parameters may be multiplied by powers of one scale so that the function stays the same.

Exponents of parameters are free, those of inputs and outputs 0. All solutions are the null space of
the equations that `scaling_rules.py` finds, here over exact fractions.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import Literal

from .. import _compat
from .equations import OWN, Equations, Exponents, Slot, Space, where
from .forms import Form, Solved, add
from .graph import Graph, Node
from .rules import MOVES
from .scaling_rules import apply
from .terms import Dims, Leaf, find, leaves


class Scaling(Equations):
    """Carries the exponents of one space through a graph.

    Attributes:
      reads: by (node, equation), the exponents of the operands of the sites.
      symbols: parameters' slots in the order in which the function reads them.
    """

    def __init__(self, graph: Graph, space: Space):
        super().__init__(graph)
        self.space = space
        self.reads: dict[tuple[Node, int], list[Exponents]] = {}
        self.symbols: dict[Any, int] = {}
        ins: list[Exponents] = []
        for number, v in zip(graph.inputs, graph.node.jaxpr.invars, strict=True):
            dims = graph.node.dims[v]
            if not graph.held[v].issuperset(space):
                ins.append({})
            elif number is None:
                ins.append(self.stopped(dims, space, "an input of the function"))
            else:
                ins.append({s: {(number, *s): 1} for s in self.slots(dims, space)})
        for E in self.run(graph.node, ins, space):
            self.stop([E], "the function's output")
        self.solved = Solved()
        for zero in self.zeros:
            self.solved.vanish(zero.form, self._rank)

    def _rank(self, symbol: Any) -> tuple:
        return (symbol[0] == OWN, self.symbols.get(symbol, -1))

    @functools.cached_property
    def basis(self) -> list[Form]:
        """Independent solutions {(number of a parameter, cell, slot) or own symbol: exponent}."""
        own = [s for zero in self.zeros for s in zero.form if s[0] == OWN]
        return self.solved.basis([*self.symbols, *own])

    @functools.cached_property
    def readers(self) -> dict[Any, dict[tuple[Node, int], None]]:
        """By symbol the sites that read an array whose exponents contain it."""
        found: dict[Any, dict[tuple[Node, int], None]] = collections.defaultdict(dict)
        for place, Es in self.reads.items():
            for s in (s for E in Es for form in (E or {}).values() for s in form):
                found[s][place] = None
        return found

    def run(self, n: Node, ins: Sequence[Exponents], space: Space) -> list[Exponents]:
        """Exponents of the results of a node."""
        env: dict[Any, Exponents] = dict(zip(n.jaxpr.invars, ins))

        def read(v: Any) -> Exponents:
            x = n.known(v)
            if x is not None and (x == 0 or np.isinf(x)):
                return None
            return {} if isinstance(v, Literal) else env.get(v, {})

        for i in self.graph.relevant(n, space):
            eqn = n.jaxpr.eqns[i]
            Es = [read(v) for v in eqn.invars]
            if i in n.plan.sites:
                self.reads[n, i] = Es
            for E in Es:
                for form in (E or {}).values():
                    for s in form:
                        if s[0] != OWN:
                            self.symbols.setdefault(s, len(self.symbols))
            if i in n.subs:
                outs = self.call(n, i, eqn, Es, space)
            elif any(Es):
                outs = apply(self, n, eqn, Es, space)
            else:
                zero = eqn.primitive.name in MOVES and Es[0] is None
                outs = [None if zero else {}] * len(eqn.outvars)
            env.update(zip(eqn.outvars, outs))
        return [read(v) for v in n.jaxpr.outvars]

    def call(self, n: Node, i: int, eqn: Any, Es: list[Exponents], space: Space) -> list[Exponents]:
        """Exponents of the results of an equation that calls jaxprs."""
        name, p, subs = eqn.primitive.name, eqn.params, n.subs[i]
        if name == "cond":
            self.stop(Es[:1], where(eqn))
            results = [self.run(s, Es[1:], space) for s in subs]
            for other in results[1:]:
                for a, b in zip(results[0], other):
                    self.same(a, b, where(eqn))
            return [next((E for E in outs if E is not None), None) for outs in zip(*results)]
        if name == "while":
            a = p["cond_nconsts"]
            b = a + p["body_nconsts"]
            carry = self.start(subs[1], Es[b:], b - a, space)
            self.stop(self.run(subs[0], [*Es[:a], *carry], space), where(eqn))
            for x, y in zip(carry, self.run(subs[1], [*Es[a:b], *carry], space)):
                self.same(x, y, where(eqn))
            return carry
        if name == "scan":
            return self.scan(n, i, eqn, Es, space)
        if name == "shard_map":
            return self.shard_map(n, i, eqn, Es, space)
        return self.run(subs[0], Es, space)

    def start(self, body: Node, Es: Sequence[Exponents], k: int, space: Space) -> list[Exponents]:
        """Carries that start as zeros get their exponents from the loop itself."""
        out = []
        for E, v in zip(Es, body.jaxpr.invars[k:]):
            if E is None:
                E = {s: self.own() for s in self.slots(body.dims[v], space)}
            out.append(E)
        return out

    def scan(self, n: Node, i: int, eqn: Any, Es: list[Exponents], space: Space) -> list[Exponents]:
        """Where the space has the axis of layers, only stacked arrays can carry it."""
        body, why = n.subs[i][0], where(eqn)
        consts, carry, xs = _compat.split_scan(eqn.params, Es)
        layer = find(body.layers[-1])
        at, inner = None, space
        if any(x in space for x in leaves(layer)):
            self.stop([*consts, *carry], "it is shared by the layers of a scan")
            consts, carry = [{} if E else E for E in consts], [{} if E else E for E in carry]
            if not isinstance(layer, Leaf):
                self.stop(xs, why)
                return [self.stopped(n.of(v), space, why) for v in eqn.outvars]
            at = space.index(layer)
            inner = space[:at] + space[at + 1 :]

        def peel(E: Exponents) -> Exponents:
            out: dict[Slot, Form] = {}
            for (cell, slot), form in (E or {}).items():
                if [d == 0 for d, _ in slot] != [k == at for k in range(len(slot))]:
                    self.vanish(form, why, False)
                    continue
                key = cell[1:], tuple((d - 1, k) for d, k in slot if d)
                self.vanish(add(form, out.setdefault(key, form), -1), why, True)
            return out if E is not None else None

        def wrap(E: Exponents) -> Exponents:
            out: dict[Slot, Form] = {}
            for (cell, slot), form in (E or {}).items():
                up = tuple((d + 1, k) for d, k in slot)
                up = up if at is None else up[:at] + ((0, 0),) + up[at:]
                for c in range(len(self.graph.blocks(layer))):
                    out[(c, *cell), up] = form
            return out if E is not None else None

        carry = self.start(body, carry, len(consts), inner)
        outs = self.run(body, [*consts, *carry, *map(peel, xs)], inner) if inner else None
        if outs is None:  # one scale a layer, and no axis inside
            self.stop(xs, why)
            return [self.stopped(n.of(v), space, why) for v in eqn.outvars]
        for x, y in zip(carry, outs):
            self.same(x, y, why)
        if at is not None:
            self.stop(carry, why)
            carry = [self.stopped(n.of(v), space, why) for v in eqn.outvars[: len(carry)]]
        return [*carry, *map(wrap, outs[len(carry) :])]

    def shard_map(
        self, n: Node, i: int, eqn: Any, Es: list[Exponents], space: Space
    ) -> list[Exponents]:
        """Inside, the axes of the mesh are gone from the dimensions; scales do not have them."""
        body, why = n.subs[i][0], where(eqn)
        shards = {x for t in body.mesh.values() for x in leaves(t)}
        if any(x in shards for x in space):
            self.stop(Es, why)
            return [self.stopped(n.of(v), space, why) for v in eqn.outvars]

        def local(dims: Dims) -> dict[Slot, Slot]:
            """Slots of a dimension split over the mesh, and the same inside."""
            opts = [self.graph.blocks(t) for t in dims]
            return {
                (cell, slot): (
                    cell,
                    tuple(
                        (d, k - sum(x in shards for x in opts[d][cell[d]].leaves[:k]))
                        for d, k in slot
                    ),
                )
                for cell, slot in self.slots(dims, space)
            }

        ins = []
        for E, v in zip(Es, eqn.invars):
            moved = local(n.of(v)) if E else {}
            ins.append({moved[s]: f for s, f in E.items()} if E else E)
        outs = []
        for E, v in zip(self.run(body, ins, space), eqn.outvars):
            outs.append({s: E[t] for s, t in local(n.of(v)).items() if t in E} if E else E)
        return outs
