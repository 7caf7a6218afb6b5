# SPDX-License-Identifier: Apache-2.0
"""Which parameters may be multiplied by powers of one scale so that the function stays the same.

For a scale s over a space of leaves (an axis; heads x width; layers x axis) every array carries an
exponent for each slot, a place where the space occurs in it: array' = array * s**e. Primitives are
linear in exponents: a product adds them, a sum needs equal ones, ReLU passes them, tanh forces 0, a
contracted slot must cancel. Parameters are free, inputs and outputs are 0. All solutions are the
null space of these equations, here over exact fractions.
"""

from __future__ import annotations

import collections
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Literal

from .. import _compat
from .flow import conv_view
from .forms import Form, Solved, add
from .graph import Graph, Node
from .rules import MOVES, rule
from .terms import ONE, Dims, Leaf, find, leaves

Slot = tuple[tuple[int, ...], tuple[tuple[int, int], ...]]
"""A block in each dimension, and for each leaf of the space (dimension, place in that block)."""
Exponents = dict[Slot, Form] | None  # a missing slot: 0; None: zeros or infinities, any exponent
Space = tuple[Leaf, ...]
OWN = "own"  # first entry of symbols that stand for no parameter: stops and carries


class Zero(NamedTuple):
    """A form that must be 0, and why; `hard` if not merely because two arrays are added."""

    form: Form
    why: str
    hard: bool


class Scaling:
    """Carries the exponents of one space through a graph.

    Attributes:
      zeros: what must vanish.
      reads: by (node, equation), the exponents of the operands of the sites.
      symbols: parameters' slots in the order in which the function reads them.
    """

    def __init__(self, graph: Graph, space: Space):
        self.graph, self.space = graph, space
        self.zeros: list[Zero] = []
        self.reads: dict[tuple[Node, int], list[Exponents]] = {}
        self.symbols: dict[Any, int] = {}
        self._count = itertools.count()
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

    # -------------------------------------------------------------- slots

    def slots(self, dims: Dims, space: Space) -> Iterator[Slot]:
        """All places of a space in an array."""
        opts = [self.graph.blocks(t) for t in dims]
        if not all(any(x in b.leaves for o in opts for b in o) for x in space):
            return
        for cell in itertools.product(*(range(len(o)) for o in opts)):
            at = [(x, (d, k)) for d, c in enumerate(cell) for k, x in enumerate(opts[d][c].leaves)]
            places = [[place for x, place in at if x is leaf] for leaf in space]
            for slot in itertools.product(*places):
                yield cell, slot

    def stopped(self, dims: Dims, space: Space, why: str) -> Exponents:
        """Exponents that are 0 for a reason that is kept."""
        symbol = (OWN, next(self._count))
        E: Exponents = {slot: {symbol: 1} for slot in self.slots(dims, space)}
        if E:
            self.zeros.append(Zero({symbol: 1}, why, True))
        return E

    def stop(self, operands: Sequence[Exponents], why: str) -> None:
        """All of these exponents must be 0."""
        self.zeros += [Zero(f, why, True) for E in operands for f in (E or {}).values() if f]

    def same(self, a: Exponents, b: Exponents, why: str) -> None:
        """Two arrays must have the same exponents."""
        if a is not None and b is not None:
            for k in {*a, *b}:
                self.vanish(add(a.get(k, {}), b.get(k, {}), -1), why, a.get(k) and b.get(k))

    def vanish(self, form: Form, why: str, both: Any) -> None:
        if form:
            self.zeros.append(Zero(form, why, not both))

    # -------------------------------------------------------------- one jaxpr

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
                outs = self.apply(n, eqn, Es, space)
            else:
                zero = eqn.primitive.name in MOVES and Es[0] is None
                outs = [None if zero else {}] * len(eqn.outvars)
            env.update(zip(eqn.outvars, outs))
        return [read(v) for v in n.jaxpr.outvars]

    def apply(self, n: Node, eqn: Any, Es: list[Exponents], space: Space) -> list[Exponents]:
        """Exponents of the results of an equation that calls nothing."""
        outs = self.rule(n, eqn, Es, space)
        if outs is not None:
            return outs
        why = _where(eqn)
        self.stop(Es, why)
        return [self.stopped(n.of(v), space, why) for v in eqn.outvars]

    def rule(self, n: Node, eqn: Any, Es: list[Exponents], space: Space) -> list[Exponents] | None:
        """As `apply`; None if all operands must have exponent 0."""
        name = eqn.primitive.name
        ins, outs = [n.of(v) for v in eqn.invars], [n.of(v) for v in eqn.outvars]
        if name == "reshape":
            ok, E = self.regroup(Es[0], ins[0], outs[0], space)
            return [E] if ok else None
        if name in ("concatenate", "pad", "slice", "split"):
            return self.parts(eqn, Es, ins, outs, space)
        if name in ("stack", "unstack"):  # concatenate and split pieces with an axis of size 1
            axis = eqn.params["axis"] % max(len(d) for d in (*ins, *outs))
            if name == "stack":
                Es, ins = [_wider(E, axis) for E in Es], [_with_one(d, axis) for d in ins]
                return self.parts(eqn, Es, ins, outs, space)
            found = self.parts(eqn, Es, ins, [_with_one(d, axis) for d in outs], space)
            return found and [_narrower(E, axis) for E in found]
        if name == "conv_general_dilated" and eqn.params["batch_group_count"] == 1:
            return self.conv(eqn, Es, ins, outs, space)
        found = rule(eqn, n.known)
        if found is None or found.law is None:
            return None
        law, why = found.law, _where(eqn)
        carry = found.carry if found.carry is not None else range(len(Es))
        self.stop([E for j, E in enumerate(Es) if j not in carry], why)
        operands = [(Es[j], ins[j], found.ins[j]) for j in carry]
        if law == "each":
            return [
                self.joint(space, [o], d, ls, why) for o, d, ls in zip(operands, outs, found.outs)
            ]
        if law == "difference":
            operands[1] = (_times(Es[1], -1), *operands[1][1:])
        equal = law in ("equal", "forgotten")
        E = self.joint(space, operands, outs[0], found.outs[0], why, equal)
        if law in ("forgotten", "index"):
            return [{} for _ in outs]
        if not isinstance(law, str):
            E = _times(E, law)
        return [E, *({} for _ in outs[1:])]

    def joint(
        self,
        space: Space,
        operands: Sequence[tuple[Exponents, Dims, Sequence]],
        out: Dims,
        labels: Sequence,
        why: str,
        equal: bool = False,
    ) -> Exponents:
        """Sums exponents over operands, or equates them; what the result lacks must cancel."""
        if equal:
            operands = [o for o in operands if o[0] is not None]
        if not operands or any(o[0] is None for o in operands):
            return None
        if not any(o[0] for o in operands):
            return {}
        term = {
            x: t
            for dims, names in [*(o[1:] for o in operands), (out, labels)]
            for t, x in zip(dims, names)
        }
        order, result = list(term), {}
        for cell, slot in self.slots(tuple(term.values()), space):
            block, at = dict(zip(order, cell)), [(order[d], k) for d, k in slot]

            def key(names: Sequence, block=block, at=at) -> Slot | None:
                if any(x not in names for x, _ in at):
                    return None
                return tuple(block[x] for x in names), tuple((names.index(x), k) for x, k in at)

            keys = [key(list(names)) for _, _, names in operands]
            forms = [E.get(k, {}) if k else {} for (E, *_), k in zip(operands, keys)]  # type: ignore[union-attr]
            total: Form = forms[0] if equal else functools.reduce(add, forms, {})
            for f in forms[1:] if equal else ():
                self.vanish(add(forms[0], f, -1), why, forms[0] and f)
            if (k := key(list(labels))) is None:
                self.vanish(total, why, sum(map(bool, forms)) > 1)
            else:
                first = result.setdefault(k, total)
                self.vanish(add(total, first, -1), why, True)
        return result

    def regroup(self, E: Exponents, old: Dims, new: Dims, space: Space) -> tuple[bool, Exponents]:
        """Exponents under a reshape: the sequence of leaves stays, only cut differently."""
        if not E:
            return True, E
        a, b = self.flat(old, space), self.flat(new, space)
        if set(a) != set(b):
            return False, None
        return True, {b[k]: E[s] for k, s in a.items() if s in E}

    def flat(self, dims: Dims, space: Space) -> dict[Any, Slot]:
        """Slots by number of the cell, its leaves, and places in their row-major sequence."""
        opts = [self.graph.blocks(t) for t in dims]
        cells = itertools.product(*(range(len(o)) for o in opts))
        number = {cell: k for k, cell in enumerate(cells)}
        found = {}
        for cell, slot in self.slots(dims, space):
            words = [opts[d][c].leaves for d, c in enumerate(cell)]
            starts = list(itertools.accumulate(map(len, words), initial=0))
            key = (number[cell], sum(words, ()), tuple(starts[d] + k for d, k in slot))
            found[key] = cell, slot
        return found

    def conv(
        self, eqn: Any, Es: list[Exponents], ins: list[Dims], outs: list[Dims], space: Space
    ) -> list[Exponents] | None:
        """A convolution is an einsum over groups and channels."""
        dn, why = eqn.params["dimension_numbers"], _where(eqn)
        left, right, *labels = conv_view(eqn, ins)

        def order(E: Exponents, dims: Dims, old: Sequence[int], new: Sequence[int]) -> Exponents:
            moved = tuple(dims[old.index(k)] for k in new)
            return self.joint(space, [(E, dims, old)], moved, new, why)

        viewed = []
        for E, dims, spec, view in zip(Es, ins, (dn.lhs_spec, dn.rhs_spec), (left, right)):
            E = order(E, dims, list(range(len(dims))), list(spec))
            ok, E = self.regroup(E, tuple(dims[k] for k in spec), tuple(view), space)
            if not ok:
                return None
            viewed.append(E)
        out = tuple(outs[0][d] for d in dn.out_spec)
        grouped = (left[0], left[1], right[1], *out[2:])
        operands = [(viewed[0], tuple(left), labels[0]), (viewed[1], tuple(right), labels[1])]
        E = self.joint(space, operands, grouped, labels[2], why)
        ok, E = self.regroup(E, grouped, out, space)
        return [order(E, out, list(dn.out_spec), list(range(len(out))))] if ok else None

    def parts(
        self, eqn: Any, Es: list[Exponents], ins: list[Dims], outs: list[Dims], space: Space
    ) -> list[Exponents] | None:
        """Concatenate, pad, slice, split: blocks of the parts are blocks of the whole."""
        name, p = eqn.primitive.name, eqn.params
        joins = name in ("concatenate", "pad", "stack")
        pieces, whole = (ins, outs[0]) if joins else (outs, ins[0])
        if name == "slice" and any(s != 1 for s in p["strides"] or ()):
            return None
        axis = p.get("dimension", p.get("axis", 0)) % len(whole)
        if name == "slice":
            starts = [list(p["start_indices"])]
        elif name == "pad":
            pieces = pieces[:1]
            starts = [[low for low, *_ in p["padding_config"]]]
            if Es[1]:
                return None
        else:
            run = itertools.accumulate((q[axis].size for q in pieces), initial=0)
            starts = [[r if k == axis else 0 for k in range(len(whole))] for r in run]
        index = [{b.offset: c for c, b in enumerate(self.graph.blocks(t))} for t in whole]
        up = [
            [
                [found.get(b.offset + start) for b in self.graph.blocks(t)]
                for t, start, found in zip(piece, begin, index)
            ]
            for piece, begin in zip(pieces, starts)
        ]
        if any(c is None for u in up for d in u for c in d):
            return None

        def at(u: list, cell: tuple[int, ...]) -> Any:
            return tuple(u[d][c] for d, c in enumerate(cell))

        if not joins:
            E = Es[0] or {}
            return [
                {s: E[at(u, s[0]), s[1]] for s in self.slots(o, space) if (at(u, s[0]), s[1]) in E}
                for o, u in zip(outs, up)
            ]
        return [
            {
                (at(u, cell), slot): form
                for E, u in zip(Es, up)
                for (cell, slot), form in (E or {}).items()
            }
        ]

    # -------------------------------------------------------------- calls and control flow

    def call(self, n: Node, i: int, eqn: Any, Es: list[Exponents], space: Space) -> list[Exponents]:
        """Exponents of the results of an equation that calls jaxprs."""
        name, p, subs = eqn.primitive.name, eqn.params, n.subs[i]
        if name == "cond":
            self.stop(Es[:1], _where(eqn))
            results = [self.run(s, Es[1:], space) for s in subs]
            for other in results[1:]:
                for a, b in zip(results[0], other):
                    self.same(a, b, _where(eqn))
            return [next((E for E in outs if E is not None), None) for outs in zip(*results)]
        if name == "while":
            a = p["cond_nconsts"]
            b = a + p["body_nconsts"]
            carry = self.start(subs[1], Es[b:], b - a, space)
            self.stop(self.run(subs[0], [*Es[:a], *carry], space), _where(eqn))
            for x, y in zip(carry, self.run(subs[1], [*Es[a:b], *carry], space)):
                self.same(x, y, _where(eqn))
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
                E = {s: {(OWN, next(self._count)): 1} for s in self.slots(body.dims[v], space)}
            out.append(E)
        return out

    def scan(self, n: Node, i: int, eqn: Any, Es: list[Exponents], space: Space) -> list[Exponents]:
        """Where the space has the axis of layers, only stacked arrays can carry it."""
        body, why = n.subs[i][0], _where(eqn)
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
        body, why = n.subs[i][0], _where(eqn)
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


def _times(E: Exponents, m: Any) -> Exponents:
    return E and {k: {s: x * m for s, x in f.items() if m} for k, f in E.items()}


def _with_one(dims: Dims, axis: int) -> Dims:
    return (*dims[:axis], ONE, *dims[axis:])


def _wider(E: Exponents, axis: int) -> Exponents:
    """Exponents of an array that got an axis of size 1."""
    return E and {
        ((*cell[:axis], 0, *cell[axis:]), tuple((d + (d >= axis), k) for d, k in slot)): f
        for (cell, slot), f in E.items()
    }


def _narrower(E: Exponents, axis: int) -> Exponents:
    """Exponents of an array that lost an axis of size 1."""
    return E and {
        ((*cell[:axis], *cell[axis + 1 :]), tuple((d - (d > axis), k) for d, k in slot)): f
        for (cell, slot), f in E.items()
    }


def _where(eqn: Any) -> str:
    line = re.sub(r" \(.*", "", _compat.source_line(eqn)).rsplit("/", 1)[-1]
    return f"`{eqn.primitive.name}`" + (f" ({line})" if line else "")
