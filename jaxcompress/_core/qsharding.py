# SPDX-License-Identifier: Apache-2.0
"""How a QTensor is split over devices when the array that it stands for is."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from .blocks import levels_of, view
from .qtensor import QTensor


def partition(q: QTensor, spec: PartitionSpec, sizes: dict[str, int]) -> QTensor | None:
    """How the arrays of a QTensor are split when it is split by `spec`; a QTensor of specs.

    Args:
        q: arrays or `jax.ShapeDtypeStruct`s.
        spec: for the axes of the array.
        sizes: of the mesh axes.
    """
    ndim = q.ndim
    entries: list[Any] = [*spec, *[None] * (ndim - len(spec))]

    def parts(entry: Any) -> int:
        names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        return math.prod(sizes.get(n, 1) for n in names if isinstance(n, str))

    levels, axis = levels_of(q.blocks, ndim), q.axis % ndim
    n, (codes, _) = parts(entries[axis]), q.format.unit
    if n > 1 and q.shape[axis] % (n * codes):
        return None
    labels = view(levels, ndim)
    rank = len(q.scale.shape)
    if rank > len(labels):
        return None
    scale: list[Any] = []
    for x, size in zip(labels[len(labels) - rank :], q.scale.shape, strict=True):
        if isinstance(x, int):
            scale.append(entries[x] if size > 1 else None)
            continue
        axes, group = levels[x[1]]
        split = [entries[a] for a in axes if parts(entries[a]) > 1]
        if x[0] == "inside" or not split:
            scale.append(None)
        elif len(axes) != 1 or q.shape[axes[0]] % (group * parts(split[0])):
            return None
        else:
            scale.append(split[0])
    zero = q.packed_zero_point
    if zero is not None and scale and parts(scale[-1]) > 1:
        if q.scale.shape[-1] // parts(scale[-1]) % codes:
            return None
    g = q.global_scale
    return QTensor(
        PartitionSpec(*entries), PartitionSpec(*scale),  # type: ignore[arg-type]
        None if zero is None else PartitionSpec(*scale),  # type: ignore[arg-type]
        q.format, q.dtype, q.unused, q.blocks, q.axis,
        None if g is None else PartitionSpec(*entries[: len(g.shape)]),  # type: ignore[arg-type]
    )  # fmt: skip


def constrain(q: QTensor, sharding: Any) -> QTensor | None:
    """The QTensor with its arrays on the devices that a sharding of the array says; or None."""
    if not isinstance(sharding, NamedSharding):
        return None
    specs = partition(q, sharding.spec, dict(sharding.mesh.shape))
    if specs is None:
        return None
    put = lambda x, s: lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, s))  # noqa: E731
    return jax.tree.map(put, q, specs)
