# SPDX-License-Identifier: Apache-2.0
"""Terms: what a dimension of an array is made of, and which dimensions are one axis.

A dimension is a `Leaf` (an independent axis), a `Prod` (a row-major merge, as reshape makes it) or
a `Cat` (a concatenation). Axes that must agree are unified, and leaves are refined on demand:
`reshape C -> (H, D)` binds C to H x D, `split 2F -> F, F` binds 2F to A ++ B, and a product of the
two halves unifies A with B. What is left are the smallest axes whose indices can be removed,
permuted or scaled together.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple


class Leaf:
    """An independent axis.

    Attributes:
      size: number of its indices.
      pin: why none of them can be removed or moved; None if they can.
      mixed: whether something reduces over it without weights, as a norm does.
      to: the term that it turned out to be.
    """

    __slots__ = ("size", "pin", "mixed", "to")

    def __init__(self, size: int, pin: str | None = None):
        self.size, self.pin, self.mixed = size, pin, False
        self.to: Term | None = None


class Prod:
    """Axes merged in row-major order."""

    __slots__ = ("parts", "size")

    def __init__(self, parts: Sequence[Term]):
        self.parts, self.size = tuple(parts), math.prod(p.size for p in parts)


class Cat:
    """Axes one behind the other."""

    __slots__ = ("parts", "size")

    def __init__(self, parts: Sequence[Term]):
        self.parts, self.size = tuple(parts), sum(p.size for p in parts)


Term = Leaf | Prod | Cat
Dims = tuple[Term, ...]  # the terms of an array's dimensions
ONE = Prod(())


class Block(NamedTuple):
    """A part of a dimension that is a product of leaves: index i of leaf k is at i * stride k."""

    offset: int
    leaves: tuple[Leaf, ...]
    strides: tuple[int, ...]


def fresh(size: int, pin: str | None = None) -> Term:
    """A new axis."""
    return ONE if size == 1 else Leaf(size, pin)


def pinned(shape: Sequence[int], why: str) -> Dims:
    """New axes that cannot be changed."""
    return tuple(fresh(n, why) for n in shape)


def prod(terms: Sequence[Term]) -> Term:
    return terms[0] if len(terms) == 1 else Prod(terms)


def cat(terms: Sequence[Term]) -> Term:
    terms = [t for t in terms if t.size] or list(terms[:1])
    return terms[0] if len(terms) == 1 else Cat(terms)


def find(t: Term) -> Term:
    """What a term turned out to be."""
    root = t
    while isinstance(root, Leaf) and root.to is not None:
        root = root.to
    while isinstance(t, Leaf) and t.to is not None:
        t.to, t = root, t.to
    return root


def atoms(t: Term) -> list[Leaf | Cat]:
    """The row-major factors of a term: unbound leaves and concatenations, none of size 1."""
    t = find(t)
    if t.size == 1:
        return []
    return [a for p in t.parts for a in atoms(p)] if isinstance(t, Prod) else [t]


def segments(t: Term) -> list[Term]:
    """The terms that a term is the concatenation of."""
    a = atoms(t)
    if len(a) == 1 and isinstance(a[0], Cat):
        return [s for p in a[0].parts for s in segments(p)]
    return [t]


def leaves(t: Term) -> list[Leaf]:
    """All leaves of a term."""
    found = []
    for a in atoms(t):
        found += [a] if isinstance(a, Leaf) else [x for p in a.parts for x in leaves(p)]
    return found


def pin(t: Term, why: str) -> None:
    """No index of this term can be removed or moved."""
    for leaf in leaves(t):
        leaf.pin = leaf.pin or why


def bind(leaf: Leaf, t: Term) -> None:
    """The leaf is this term."""
    for x in leaves(t):
        x.pin, x.mixed = x.pin or leaf.pin, x.mixed or leaf.mixed
    leaf.to = t


def factor(t: Term, sizes: Sequence[int]) -> list[Term]:
    """Terms of the given sizes whose row-major product is t."""
    out: list[Term] = []
    todo: list[Term] = [*atoms(t)]
    for n in sizes[:-1]:
        took, m = [], 1
        while m < n:
            if todo and n % (m * todo[0].size) == 0:
                m *= todo[0].size
                took.append(todo.pop(0))
                continue
            halves = None
            if todo and n % m == 0 and todo[0].size % (n // m) == 0:
                halves = _halve(todo[0], n // m)
            if halves is None:
                why = f"reshape to {list(sizes)} across axes"
                pin(t, why)
                return list(pinned(sizes, why))
            took.append(halves[0])
            todo[0], m = halves[1], n
        out.append(prod(took))
    return [*out, prod(todo)]


def _halve(a: Term, outer: int) -> tuple[Term, Term] | None:
    """(outer, inner) factors of an atom; None if they cut a segment of a concatenation."""
    inner = a.size // outer
    if isinstance(a, Leaf):
        halves = fresh(outer), fresh(inner)
        bind(a, Prod(halves))
        return halves
    parts = segments(a)
    if any(s.size % inner for s in parts):
        return None
    cuts = [factor(s, [s.size // inner, inner]) for s in parts]  # (a x n) ++ (b x n) = (a ++ b) x n
    for c in cuts[1:]:
        unify(cuts[0][1], c[1])
    return Cat([c[0] for c in cuts]), cuts[0][1]


def cut(t: Term, sizes: Sequence[int]) -> list[Term]:
    """Terms of the given sizes whose concatenation is t."""
    a = atoms(t)
    if len(sizes) == 1:
        return [t]
    if len(a) == 1 and isinstance(a[0], Leaf):
        parts = [fresh(n) for n in sizes]
        bind(a[0], Cat(parts))
        return parts
    if len(a) == 1:
        todo, out = segments(t), []
        for n in sizes:
            took = []
            while n > 0:
                if todo[0].size > n:
                    todo[:1] = cut(todo[0], [n, todo[0].size - n])
                took.append(todo.pop(0))
                n -= took[-1].size
            out.append(cat(took))
        return out
    inner = prod(a[1:])
    if any(n % inner.size for n in sizes):
        why = f"cut into {list(sizes)} across a merged axis"
        pin(t, why)
        return list(pinned(sizes, why))
    return [Prod((h, inner)) for h in cut(a[0], [n // inner.size for n in sizes])]


def unify(a: Term, b: Term) -> None:
    """The two terms, of one size, are the same axis."""
    if find(a) is find(b):
        return
    left, right = atoms(a), atoms(b)
    if left == right:
        return
    assert a.size == b.size, (a.size, b.size)
    if len(left) == 1 and isinstance(left[0], Leaf):
        return bind(left[0], prod(right))
    if len(right) == 1 and isinstance(right[0], Leaf):
        return bind(right[0], prod(left))
    if len(left) == len(right) == 1:
        ends = sorted(_ends(segments(a), operator.add) | _ends(segments(b), operator.add))
        sizes = [y - x for x, y in zip([0, *ends], ends)]
        parts = cut(a, sizes), cut(b, sizes)
    else:
        ends = sorted(_ends(left[::-1], operator.mul) | _ends(right[::-1], operator.mul))
        if any(y % x for x, y in zip(ends, ends[1:])):
            for t in (a, b):
                pin(t, "two merges of axes that do not fit together")
            return
        sizes = [y // x for x, y in zip([1, *ends], ends)][::-1]
        parts = factor(a, sizes), factor(b, sizes)
    for x, y in zip(*parts):
        unify(x, y)


def _ends(terms: Sequence[Term], op) -> set[int]:
    return set(itertools.accumulate((t.size for t in terms), op))


def blocks(t: Term) -> list[Block]:
    """The blocks of a term, in order; one unless it contains a concatenation."""
    t = find(t)
    if isinstance(t, Leaf):
        return [Block(0, (t,), (1,))]
    if isinstance(t, Cat):
        starts = itertools.accumulate((p.size for p in t.parts), initial=0)
        return [
            Block(start + b.offset, b.leaves, b.strides)
            for start, p in zip(starts, t.parts)
            for b in blocks(p)
        ]
    out = [Block(0, (), ())]
    for p in t.parts:
        n = p.size
        out = [
            Block(
                a.offset * n + b.offset,
                a.leaves + b.leaves,
                tuple(s * n for s in a.strides) + b.strides,
            )
            for a in out
            for b in blocks(p)
        ]
    return out
