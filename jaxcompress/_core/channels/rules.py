# SPDX-License-Identifier: Apache-2.0
"""What every primitive does to axes and to scales: one flat table.

A primitive has labels on the dimensions of its operands and results (equal labels are one axis,
`_core/dimensions.py`), labels whose indices cannot be moved or removed, and a law: how it acts on
arrays that are multiplied by s**e, with one exponent e for each operand. A primitive that stands
in no table here is unknown: it pins all its axes and stops every scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax.numpy as jnp

from ..dimensions import REDUCTIONS, axis_labels

# f(s x) = s**power f(x) for every s > 0.
POWER = {
    **dict.fromkeys(
        """neg abs real imag stop_gradient copy copy_p name reduce_precision pvary pcast
        sharding_constraint reshard layout_constraint""".split(),
        1,
    ),
    "square": 2,
    "sqrt": Fraction(1, 2),
    "rsqrt": Fraction(-1, 2),
    "cbrt": Fraction(1, 3),
    "sign": 0,
    "is_finite": 0,
}
# f(s x, s y) = s f(x, y); and f(s x, s y) = f(x, y).
EQUAL = frozenset("add sub max min add_any select_n clamp rem".split())
COMPARE = frozenset("eq ne lt gt le ge atan2".split())
# Nothing is known of scales.
OTHER = frozenset(
    """pow exp exp2 log log1p expm1 tanh logistic sin cos tan asin acos atan sinh cosh asinh acosh
    atanh erf erfc erf_inv lgamma digamma floor ceil round nextafter not and or xor shift_left
    shift_right_logical shift_right_arithmetic population_count integer_pow mul div
    convert_element_type bitcast_convert_type clz""".split()
)
POINTWISE = frozenset({*POWER, *EQUAL, *COMPARE, *OTHER})
ALONG = {
    "cumsum": "axis",
    "cummax": "axis",
    "cummin": "axis",
    "cumprod": "axis",
    "cumlogsumexp": "axis",
    "rev": "dimensions",
    "sort": "dimension",
}
WINDOWS = frozenset({"reduce_window_max", "reduce_window_min", "reduce_window_sum"})
SCATTER = frozenset(
    """scatter scatter-add scatter_add scatter-min scatter-max scatter_min scatter_max scatter-mul
    scatter_mul scatter-sub scatter_sub""".split()
)
KEYS = frozenset("random_seed random_wrap random_unwrap random_split random_fold_in".split())
COLLECTIVES = frozenset("psum psum2 psum_invariant pmax pmin ppermute".split())
# Results are operands or have their entries: what is known of the values is known of the result.
MOVES = frozenset(
    """broadcast_in_dim reshape squeeze transpose copy copy_p stop_gradient convert_element_type
    name pvary pcast sharding_constraint reshard""".split()
)

Label = Any


@dataclasses.dataclass
class Rule:
    """Description of one equation.

    Attributes:
      ins, outs: labels of the dimensions of operands and results.
      law: how exponents combine: "sum" of the operands, "difference", all "equal", all equal and
        "forgotten", forgotten by an "index", of "each" operand for itself, or a power of the
        first. None: they must be 0.
      pins: labels of axes whose indices cannot be changed, and why.
      carry: operands that the law is about; the others must have exponent 0. None: all.
      mixed: labels that are reduced without weights.
    """

    ins: Sequence[Sequence[Label]]
    outs: Sequence[Sequence[Label]]
    law: str | int | float | Fraction | None = None
    pins: Mapping[Label, str] = dataclasses.field(default_factory=dict)
    carry: Sequence[int] | None = None
    mixed: Sequence[Label] = ()


def rule(eqn: Any, known: Callable[[Any], Any]) -> Rule | None:
    """The rule of an equation; None if the primitive is unknown.

    Args:
      eqn: an equation without jaxprs of its own.
      known: the one value that all entries of a variable have, or None.
    """
    name = eqn.primitive.name
    make = _pointwise if name in POINTWISE else _TABLE.get(name)
    found = make(eqn, known) if make else None
    return _without_ones(eqn, found) if found else None


def _without_ones(eqn: Any, found: Rule) -> Rule:
    """Dimensions of size 1 that are broadcast against larger ones get labels of their own."""
    if not any(1 in v.aval.shape for v in (*eqn.invars, *eqn.outvars)):
        return found
    size: dict[Label, int] = {}
    sides = (*zip(found.ins, eqn.invars), *zip(found.outs, eqn.outvars))
    for labels, v in sides:
        for x, n in zip(labels, v.aval.shape):
            old = size.setdefault(x, n)
            if n not in (old, 1) and (old == 1 or n > old):  # symbolic ones are equal or 1
                size[x] = n

    def own(side: str, lists: Sequence, variables: Sequence) -> list[list[Label]]:
        return [
            [
                x if n == size[x] else (side, j, k)
                for k, (x, n) in enumerate(zip(labels, v.aval.shape))
            ]
            for j, (labels, v) in enumerate(zip(lists, variables))
        ]

    ins, outs = own("in", found.ins, eqn.invars), own("out", found.outs, eqn.outvars)
    return dataclasses.replace(found, ins=ins, outs=outs)


# ------------------------------------------------------------------ pointwise and products


def _pointwise(eqn: Any, known: Callable) -> Rule | None:
    labels = axis_labels(eqn)
    if labels is None:
        return None
    name, p, count = eqn.primitive.name, eqn.params, len(eqn.invars)
    if name in POWER:
        return Rule(*labels, POWER[name])
    if name == "select_n":
        return Rule(*labels, "equal", carry=range(1, count))
    if name in EQUAL or name in COMPARE:
        return Rule(*labels, "equal" if name in EQUAL else "forgotten")
    law: Any = {"mul": "sum", "div": "difference"}.get(name)
    carry = None
    if name == "integer_pow":
        law = p["y"]
    elif name == "pow":
        law, carry = known(eqn.invars[1]), (0,)
        law = Fraction(float(law)) if law is not None else None
    elif name == "convert_element_type" and jnp.issubdtype(p["new_dtype"], jnp.inexact):
        law = 1
    return Rule(*labels, law, carry=carry)


def _sum(eqn: Any, known: Callable) -> Rule:
    return Rule(*axis_labels(eqn), "sum")  # type: ignore[misc]


def _ragged_dot(eqn: Any, known: Callable) -> Rule:
    ins, outs = axis_labels(eqn)  # type: ignore[misc]
    rows = eqn.params["ragged_dot_dimension_numbers"].lhs_ragged_dimensions
    pins = dict.fromkeys([ins[0][d] for d in rows], "rows of ragged_dot")
    return Rule(ins, outs, "sum", pins, carry=(0, 1))


def _move(eqn: Any, known: Callable) -> Rule:
    return Rule(*axis_labels(eqn), 1)  # type: ignore[misc]


def _made(eqn: Any, known: Callable) -> Rule:
    return Rule(*axis_labels(eqn))  # type: ignore[misc]


# ------------------------------------------------------------------ along an axis


def _reduce(eqn: Any, known: Callable) -> Rule:
    ins, outs = axis_labels(eqn)  # type: ignore[misc]
    name, gone = eqn.primitive.name, [x for x in ins[0] if x not in outs[0]]
    law = None if name == "reduce_prod" else "index" if name.startswith("arg") else 1
    return Rule(ins, outs, law, mixed=gone)


def _along(eqn: Any, known: Callable) -> Rule:
    name, full = eqn.primitive.name, range(eqn.outvars[0].aval.ndim)
    axes = eqn.params[ALONG[name]]
    axes = axes if isinstance(axes, tuple) else (axes,)

    def labels(side: str) -> list[Label]:
        return [(side, k) if k in axes else k for k in full]

    law = None if name in ("cumprod", "cumlogsumexp") else "each"
    pins = {(side, k): name for k in axes for side in ("in", "out")}
    return Rule([labels("in")] * len(eqn.invars), [labels("out")] * len(eqn.outvars), law, pins)


def _moved(eqn: Any, moved: Sequence[int]) -> Rule:
    """The first operand loses or gains indices along some dimensions; the others are scalars."""
    name, full = eqn.primitive.name, range(eqn.outvars[0].aval.ndim)

    def labels(side: str) -> list[Label]:
        return [(side, k) if k in moved else k for k in full]

    pins = {(side, k): name for k in moved for side in ("in", "out")}
    scalars = [[]] * (len(eqn.invars) - 1)
    outs = [labels("out")] * len(eqn.outvars)
    return Rule([labels("in"), *scalars], outs, 1, pins, carry=(0,))


def _window(eqn: Any, known: Callable) -> Rule:
    p, rank = eqn.params, eqn.outvars[0].aval.ndim
    ones = (1,) * rank
    settings = zip(
        p["window_dimensions"],
        p["window_strides"],
        p["padding"],
        p.get("base_dilation") or ones,
        p.get("window_dilation") or ones,
    )
    whole = (1, 1, 0, 0, 1, 1)
    moved = [
        k for k, (n, step, pad, *rest) in enumerate(settings) if (n, step, *pad, *rest) != whole
    ]
    return _moved(eqn, moved)


def _top_k(eqn: Any, known: Callable) -> Rule:
    """Of fewer values the largest are still found, as long as there are enough."""
    axis = eqn.params.get("axis", -1) % eqn.outvars[0].aval.ndim
    found = _moved(eqn, [axis])
    if eqn.params["k"] < eqn.invars[0].aval.shape[axis]:
        found.pins = {("out", axis): "top_k"}
    return found


def _dynamic_slice(eqn: Any, known: Callable) -> Rule:
    sizes = zip(eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape)
    return _moved(eqn, [k for k, (n, m) in enumerate(sizes) if n != m])


def _dynamic_update_slice(eqn: Any, known: Callable) -> Rule:
    shape, part = (v.aval.shape for v in eqn.invars[:2])
    moved = [k for k, (n, m) in enumerate(zip(shape, part)) if n != m]
    full = list(range(len(shape)))
    update = [("part", k) if k in moved else k for k in full]
    pins = {x: eqn.primitive.name for k in moved for x in (k, ("part", k))}
    scalars = [[]] * (len(eqn.invars) - 2)
    return Rule([full, update, *scalars], [full], "equal", pins, carry=(0, 1))


# ------------------------------------------------------------------ indexing


def _gather(eqn: Any, known: Callable) -> Rule:
    ins, outs = axis_labels(eqn)  # type: ignore[misc]
    shape, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    pins = {}
    for k, x in enumerate(ins[0]):
        if x[0] == "x":
            pins[x] = "an index"
        elif x[0] == "w" and out[x[1]] != shape[k]:  # a part of the dimension is read
            ins[0][k] = ("x", k)
            pins |= {("x", k): "an index", x: "an index"}
    pins[("index",)] = "an index"
    return Rule(ins, outs, 1, pins, carry=(0,))


def _scatter(eqn: Any, known: Callable) -> Rule:
    dn = eqn.params["dimension_numbers"]
    shape, update = eqn.invars[0].aval.shape, eqn.invars[2].aval.shape
    gone = (*dn.inserted_window_dims, *dn.operand_batching_dims)
    window = dict(zip((d for d in range(len(shape)) if d not in gone), dn.update_window_dims))
    batch = [d for d in range(len(update)) if d not in dn.update_window_dims]
    operand: list[Label] = [("x", d) for d in range(len(shape))]
    for d, w in window.items():
        if update[w] == shape[d]:
            operand[d] = ("w", w)
    for d, i in zip(dn.operand_batching_dims, dn.scatter_indices_batching_dims):
        operand[d] = ("b", batch[i])
    far: list[Label] = [
        ("b", d) if d in batch else ("w", d) if ("w", d) in operand else ("far", d)
        for d in range(len(update))
    ]
    index = [*(("b", d) for d in batch), ("index",)]
    pins = {x: "an index" for x in (*operand, *far, ("index",)) if x[0] in ("x", "far", "index")}
    # Where the index axis of the updates is summed or overwritten, its rows are one batch.
    law = None if "mul" in eqn.primitive.name else "equal"
    return Rule([operand, index, far], [operand], law, pins, carry=(0, 2))


# ------------------------------------------------------------------ everything else


def _keys(eqn: Any, known: Callable) -> Rule:
    ins = [[("in", j, k) for k in range(v.aval.ndim)] for j, v in enumerate(eqn.invars)]
    outs = [[("out", k) for k in range(eqn.outvars[0].aval.ndim)]]
    pins = {x: "a random key" for labels in (*ins, *outs) for x in labels}
    return Rule(ins, outs, None, pins)


def _random_bits(eqn: Any, known: Callable) -> Rule:
    full = list(range(eqn.outvars[0].aval.ndim))
    return Rule([full[: eqn.invars[0].aval.ndim]], [full])


def _one_by_one(eqn: Any, known: Callable) -> Rule:
    labels = [[(j, k) for k in range(v.aval.ndim)] for j, v in enumerate(eqn.invars)]
    return Rule(labels, labels, "each")


_TABLE: dict[str, Callable[[Any, Callable], Rule | None]] = {
    "dot_general": _sum,
    "ragged_dot_general": _ragged_dot,
    "ragged_dot": _ragged_dot,
    "transpose": _move,
    "broadcast_in_dim": _move,
    "squeeze": _move,
    "iota": _made,
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(ALONG, _along),
    **dict.fromkeys(WINDOWS, _window),
    "top_k": _top_k,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    **dict.fromkeys(SCATTER, _scatter),
    **dict.fromkeys(KEYS, _keys),
    "random_bits": _random_bits,
    "optimization_barrier": _one_by_one,
    **dict.fromkeys(COLLECTIVES, _one_by_one),
}
