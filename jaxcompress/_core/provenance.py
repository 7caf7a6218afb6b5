# SPDX-License-Identifier: Apache-2.0
"""Which parameters a value derives from: labels on the variables of a jaxpr.

Every variable carries a `Label`. A value computed from parameters and constants only is still a
weight, whatever was done to it (transpose, slice, cast, weight norm, a LoRA merge, a mask); a
value that depends on data is not. Labels name parameters by number, so that a jaxpr that is
called several times is analysed once and the result renamed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Label(NamedTuple):
    """What is known of one variable.

    Attributes:
      data: depends on an argument that holds no parameters.
      params: numbers of the parameters that it derives from; empty for a constant.
      chosen: a parameter that was indexed by data (a row of an embedding, an expert).
      scans: depths of the enclosing scans over which it is one slice of a stack.
      owners: kinds of the transforms that already own this value.
      manual: inside shard_map, for every dimension the mesh axes that split it; None outside.
    """

    data: bool = False
    params: frozenset[int] = frozenset()
    chosen: bool = False
    scans: frozenset[int] = frozenset()
    owners: frozenset[str] = frozenset()
    manual: tuple[frozenset[str], ...] | None = None

    @property
    def weight(self) -> bool:
        """Whether this is a parameter or was computed from parameters alone."""
        return bool(self.params) and not self.data


CONSTANT = Label()
DATA = Label(data=True)

# Primitives that move or cast values without computing new ones. The first operand is the value.
LAYOUT = frozenset(
    """reshape transpose convert_element_type broadcast_in_dim slice squeeze expand_dims rev copy
    copy_p reduce_precision optimization_barrier sharding_constraint pvary reshard stop_gradient
    name pcast copy_to_mesh bitcast_convert_type""".split()
)
INDEXING = frozenset({"dynamic_slice", "gather"})


def join(labels: Iterable[Label]) -> Label:
    """Label of a value that is computed from values with these labels."""
    labels = list(labels)
    if any(label.data for label in labels):
        return DATA
    return Label(
        params=frozenset().union(*(label.params for label in labels)),
        chosen=any(label.chosen for label in labels),
        scans=frozenset().union(*(label.scans for label in labels)),
    )


def transfer(primitive: str, labels: Sequence[Label]) -> Label:
    """Label of the results of an ordinary equation (without `manual`)."""
    if primitive in LAYOUT and labels:
        return labels[0]._replace(manual=None)
    if primitive in INDEXING:
        value, indices = labels[0], labels[1:]
        if value.data:
            return DATA
        by_data = any(label.data or label.chosen for label in indices)
        return value._replace(chosen=value.chosen or by_data, manual=None)
    out = join(labels)
    # Arithmetic on rows that data chose is an activation: emb[ids] * sqrt(d).
    return DATA if out.chosen else out


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
