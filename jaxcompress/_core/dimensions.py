# SPDX-License-Identifier: Apache-2.0
"""Which dimensions of operands and results of a primitive are the same axis.

A primitive is described once, as in einsum: labels on the dimensions of its operands and its
results; equal labels are one axis. Inside shard_map this tells which mesh axes split which
dimension of every value, so that a scale that is shared over a split dimension is made global.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

REDUCTIONS = frozenset(
    """reduce_sum reduce_max reduce_min reduce_and reduce_or reduce_xor reduce_prod argmax
    argmin""".split()
)
# Sizes change, the axes stay; scalars beside the operands are indices and padding values.
SAME_AXES = frozenset(
    """slice dynamic_slice pad rev dynamic_update_slice concatenate split top_k reduce_window
    reduce_window_max reduce_window_min reduce_window_sum select_and_scatter_add
    select_and_gather_add fft""".split()
)
COLLECTIVES_KEEP = frozenset({"ppermute", "pvary", "pcast", "pbroadcast", "all_gather_invariant"})
Split = tuple[frozenset[str], ...]  # for every dimension, the mesh axes that split it
NONE: frozenset[str] = frozenset()


def axis_labels(eqn: Any) -> tuple[list, list] | None:
    """Labels of the dimensions of (operands, results); None for a primitive without a rule."""
    name, p = eqn.primitive.name, eqn.params
    shapes = [v.aval.shape for v in eqn.invars]
    out = eqn.outvars[0].aval.shape
    full = list(range(len(out)))
    if name == "dot_general":
        (lc, rc), (lb, rb) = p["dimension_numbers"]
        sides = [_dot_side("l", shapes[0], lc, lb), _dot_side("r", shapes[1], rc, rb)]
        free = [x for side in sides for x in side if x[0] in "lr"]
        return sides, [[("b", k) for k in range(len(lb))] + free]
    if name in ("ragged_dot_general", "ragged_dot"):
        (lc, rc), (lb, rb) = p["ragged_dot_dimension_numbers"].dot_dimension_numbers
        groups = p["ragged_dot_dimension_numbers"].rhs_group_dimensions
        sides = [_dot_side("l", shapes[0], lc, lb), _dot_side("r", shapes[1], rc, rb)]
        free = [x for side in sides for x in side if x[0] in "lr"]
        free = [x for x in free if x not in [("r", g) for g in groups]]
        batch = [("b", k) for k in range(len(lb))]
        grouped = [("g",)] if len(batch) + len(free) < len(out) else []
        counts: list[tuple] = [("count", k) for k in range(len(shapes[2]) - 1)]
        counts.append(("r", groups[0]) if groups else ("g",))
        return [*sides, counts], [grouped + batch + free]
    if name == "conv_general_dilated":
        dn = p["dimension_numbers"]
        lhs, rhs, res = ([(k, str(i)) for i in range(len(out))] for k in "lro")
        lhs[dn.lhs_spec[0]] = res[dn.out_spec[0]] = ("conv", "n")
        rhs[dn.rhs_spec[0]] = res[dn.out_spec[1]] = ("conv", "o")
        return [lhs, rhs], [res]
    if name == "transpose":
        return [[p["permutation"].index(k) for k in full]], [full]
    if name == "broadcast_in_dim":
        dims = zip(shapes[0], p["broadcast_dimensions"], strict=True)
        return [[d if n == out[d] else ("one", d) for n, d in dims]], [full]
    if name in REDUCTIONS or name == "squeeze":
        gone = {d % len(shapes[0]) for d in p.get("axes", p.get("dimensions"))}
        labels = [("gone", k) if k in gone else k for k in range(len(shapes[0]))]
        kept = [x for x in labels if isinstance(x, int)]
        return [labels] * len(shapes), [kept] * len(eqn.outvars)
    if name in SAME_AXES:
        labels = [full if len(s) == len(full) else [()] * len(s) for s in shapes]
        return labels, [full] * len(eqn.outvars)
    if name == "gather":
        dn = p["dimension_numbers"]
        gone = (*dn.collapsed_slice_dims, *dn.operand_batching_dims)
        window = dict(zip((d for d in range(len(shapes[0])) if d not in gone), dn.offset_dims))
        batch = [d for d in full if d not in dn.offset_dims]
        result = [("w", d) if d in dn.offset_dims else ("b", d) for d in full]
        operand = [("w", window[d]) if d in window else ("x", d) for d in range(len(shapes[0]))]
        for d, i in zip(dn.operand_batching_dims, dn.start_indices_batching_dims):
            operand[d] = ("b", batch[i])
        return [operand, [("b", d) for d in batch] + [("index",)]], [result]
    if name == "iota":
        return [], [full]
    if all(len(s) in (0, len(full)) for s in shapes) and all(
        v.aval.shape == out for v in eqn.outvars
    ):  # pointwise, cumulative, sort: rank kept, size 1 broadcasts
        if all(n in (1, m) for s in shapes if s for n, m in zip(s, out, strict=True)):
            return [full if s else [] for s in shapes], [full] * len(eqn.outvars)
    return None


def _dot_side(side: str, shape: Sequence[int], contract: Sequence[int], batch: Sequence[int]):
    return [
        ("b", list(batch).index(k)) if k in batch
        else ("c", list(contract).index(k)) if k in contract
        else (side, k)
        for k in range(len(shape))
    ]  # fmt: skip


def splits(eqn: Any, operands: Sequence[Split | None], axes: frozenset[str]) -> list[Split]:
    """Mesh axes that split the results of an equation inside shard_map over `axes`.

    Operands given as None are not split. A primitive without a rule is taken to be split along
    every dimension by every axis that splits one of its operands: a scale made from it is then
    shared more widely than needed, never less.
    """
    name, p = eqn.primitive.name, eqn.params
    shapes = [v.aval.shape for v in eqn.invars]
    ins = [s if s is not None else (NONE,) * len(n) for s, n in zip(operands, shapes, strict=True)]
    special = _SPECIAL.get(name)
    if special is not None:
        return [special(p, v.aval.shape, s, i) for v, s, i in zip(eqn.outvars, shapes, ins)]
    labels = axis_labels(eqn)
    if labels is None:
        everything = frozenset().union(*(a for s in ins for a in s)) & axes
        return [(everything,) * len(v.aval.shape) for v in eqn.outvars]
    found: dict = {}
    for dims, split in zip(labels[0], ins, strict=True):
        for label, names in zip(dims, split, strict=True):
            found[label] = found.get(label, NONE) | names
    return [tuple(found.get(label, NONE) for label in dims) for dims in labels[1]]


def _reshape(p: dict, out: Sequence[int], shape: Sequence[int], split: Split) -> Split:
    """A split dimension stays split in the leading factor that it is merged into or cut into."""
    result = [NONE] * len(out)
    i = j = 0
    while i < len(shape) and j < len(out):
        left, right, i0, j0 = shape[i], out[j], i, j
        i, j = i + 1, j + 1
        while left != right:
            if left < right and i < len(shape):
                left, i = left * shape[i], i + 1
            elif right < left and j < len(out):
                right, j = right * out[j], j + 1
            else:
                everything = frozenset().union(*split)
                return (everything,) * len(out)
        names = frozenset().union(*split[i0:i])
        lead = next((k for k in range(j0, j) if out[k] > 1), j0)
        result[lead] = names
    return tuple(result)


def _reduced(p: dict, out, shape, split: Split) -> Split:
    gone = frozenset(a for a in p.get("axes", ()) if isinstance(a, str))
    return tuple(s - gone for s in split)


def _names(p: dict) -> frozenset[str]:
    name = p["axis_name"]
    return frozenset(name if isinstance(name, (tuple, list)) else (name,))


def _all_gather(p: dict, out, shape, split: Split) -> Split:
    d, names = p["all_gather_dimension"], _names(p)
    kept = [s - names for s in split]
    if not p["tiled"]:
        kept.insert(d, NONE)
    return tuple(kept)


def _reduce_scatter(p: dict, out, shape, split: Split) -> Split:
    d, names = p["scatter_dimension"], _names(p)
    kept = [s - names for s in split]
    if not p["tiled"]:
        del kept[d]
        return tuple(kept)
    kept[d] = kept[d] | names
    return tuple(kept)


def _all_to_all(p: dict, out, shape, split: Split) -> Split:
    if len(out) != len(shape) or math.prod(out) != math.prod(shape):
        return (frozenset().union(*split),) * len(out)
    names = _names(p)
    kept = [s - names for s in split]
    kept[p["split_axis"]] = kept[p["split_axis"]] | names
    return tuple(kept)


def _same(p: dict, out, shape, split: Split) -> Split:
    return split


_SPECIAL = {
    "reshape": _reshape,
    "psum": _reduced,
    "psum_invariant": _reduced,
    "psum2": _reduced,
    "pmax": _reduced,
    "pmin": _reduced,
    "all_gather": _all_gather,
    "all_gather_invariant": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "optimization_barrier": _same,
    **dict.fromkeys(COLLECTIVES_KEEP - {"all_gather_invariant"}, _same),
}
