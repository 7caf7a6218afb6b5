# SPDX-License-Identifier: Apache-2.0
"""Which parameters a value derives from: labels on the variables of a jaxpr.

Every variable carries a `Label`. A value computed from parameters and constants only is still a
weight, whatever was done to it (transpose, slice, cast, weight norm, a LoRA merge, a mask); a
value that depends on data is not. Labels name parameters by number, so that a jaxpr that is
called several times is analysed once and the result renamed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple


class Label(NamedTuple):
    """What is known of one variable.

    Attributes:
      data: depends on an argument that holds no parameters.
      params: numbers of the parameters that it derives from; empty for a constant. Of data: the
        parameters that it is an update of (w - rate * gradient), which matters only where that
        is differentiated again.
      chosen: rank of the pieces of a parameter that data chose: 1 for rows of an embedding, 2
        and more for matrices (experts, layers), 0 where nothing was chosen.
      scans: depths of the enclosing scans over which it is one slice of a stack.
      owners: kinds of the transforms that already own this value.
      manual: inside shard_map, for every dimension the mesh axes that split it; None outside.
      reads: how it was read from the one parameter that it derives from: (step, its argument,
        number of enclosing scans over the stack) each, for "transpose", "reshape" and "cast".
        None if it was computed, or if only a part was read.
    """

    data: bool = False
    params: frozenset[int] = frozenset()
    chosen: int = 0
    scans: frozenset[int] = frozenset()
    owners: frozenset[str] = frozenset()
    manual: tuple[frozenset[str], ...] | None = None
    reads: tuple[tuple[str, Any, int], ...] | None = ()

    @property
    def weight(self) -> bool:
        """Whether this is a parameter or was computed from parameters alone."""
        return bool(self.params) and not self.data


CONSTANT = Label()
DATA = Label(data=True)

# Primitives that move or cast values without computing new ones. The first operand is the value.
LAYOUT = frozenset(
    """reshape transpose convert_element_type broadcast_in_dim slice squeeze expand_dims rev copy
    copy_p reduce_precision sharding_constraint pvary reshard stop_gradient
    name pcast copy_to_mesh bitcast_convert_type""".split()
)
_UNCHANGED = frozenset(
    "copy copy_p sharding_constraint pvary reshard stop_gradient name pcast copy_to_mesh".split()
)
# Primitives whose results are their operands, one by one.
ONE_BY_ONE = frozenset(
    "optimization_barrier psum psum2 psum_invariant pmax pmin pvary pcast ppermute".split()
)
INDEXING = frozenset({"dynamic_slice", "gather"})
UPDATES = frozenset({"add", "sub", "add_any", "select_n"})


def join(labels: Iterable[Label]) -> Label:
    """Label of a value that is computed from values with these labels."""
    labels = list(labels)
    if any(label.data for label in labels):
        return DATA
    return Label(
        params=frozenset().union(*(label.params for label in labels)),
        chosen=max((label.chosen for label in labels), default=0),
        scans=frozenset().union(*(label.scans for label in labels)),
        reads=None if any(label.params for label in labels) else (),
    )


def transfer(primitive: str, labels: Sequence[Label], rank: int = 0) -> Label:
    """Label of the results of an ordinary equation (without `manual`).

    `rank` is that of the pieces that an indexing primitive reads.
    """
    if primitive in LAYOUT and labels:
        return labels[0]._replace(manual=None)
    if primitive in INDEXING and any(label.data or label.chosen for label in labels[1:]):
        if not labels[0].weight:
            return DATA
        chosen = labels[0].chosen or max(rank, 1)
        return labels[0]._replace(chosen=chosen, manual=None, reads=None)
    out = join(labels)
    # Arithmetic on rows that data chose is an activation: emb[ids] * sqrt(d).
    return DATA if out.chosen == 1 else out


def read(label: Label, eqn: Any) -> Label:
    """Label of a parameter after one more layout primitive, with the step in `reads`."""
    name, p, shape = eqn.primitive.name, eqn.params, eqn.outvars[0].aval.shape
    if not label.weight or label.reads is None or name in _UNCHANGED:
        return label
    size = eqn.invars[0].aval.size
    dims = list(p.get("broadcast_dimensions", ()))
    if name == "transpose":
        step = ("transpose", tuple(p["permutation"]))
    elif name == "convert_element_type":
        step = ("cast", p["new_dtype"])
    elif label.manual is None and (
        name in ("reshape", "squeeze", "expand_dims")
        or (name == "broadcast_in_dim" and math.prod(shape) == size and dims == sorted(dims))
    ):
        step = ("reshape", tuple(shape))
    else:
        return label._replace(reads=None)
    return label._replace(reads=(*label.reads, (*step, len(label.scans))))


def merge(labels: Iterable[Label]) -> Label:
    """Label of a value that is one of several: a loop's carry, the result of a branch.

    Also of an update, the sum of a parameter and data of the same shape.
    """
    labels = list(labels)
    out = join(labels)
    if not out.data:
        return out
    return DATA._replace(
        params=frozenset().union(*(label.params for label in labels if not label.chosen))
    )


def canonical(labels: Sequence[Label]) -> tuple[tuple[Label, ...], list[int]]:
    """Labels with parameters renumbered in order of appearance, and the old numbers."""
    old: dict[int, int] = {}
    out = []
    for label in labels:
        for number in sorted(label.params):
            old.setdefault(number, len(old))
        out.append(label._replace(params=frozenset(old[n] for n in label.params)))
    return tuple(out), list(old)


def renumber(label: Label, numbers: Sequence[int]) -> Label:
    """Inverse of `canonical` for one label."""
    return label._replace(params=frozenset(numbers[n] for n in label.params))


def key_path(path: Sequence[Any]) -> str:
    """`encoder/layers_0/kernel` for a key path of `jax.tree_util`."""
    names = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))) for k in path)
    return "/".join(str(name) for name in names)


def split_path(path: str, known: Collection[str]) -> list[str]:
    """The parameters that a weight derives from; their names may have a `+` themselves.

    >>> split_path("a+b+c", {"a+b", "c"})
    ['a+b', 'c']
    """
    if path in known:
        return [path]
    for k in (k for k, c in enumerate(path) if c == "+" and path[:k] in known):
        rest = split_path(path[k + 1 :], known)
        if rest:
            return [path[:k], *rest]
    return []
