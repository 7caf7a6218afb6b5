# SPDX-License-Identifier: Apache-2.0
"""From a parameter to the operand of a site that reads it whole, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

Steps = list[tuple[str, Any]]


def read(x: Any, reads: Sequence[tuple[str, Any, int]]) -> tuple[Any, Steps]:
    """(the operand of the site, [*stack, *shape], and the steps that undo this).

    Args:
      x: a parameter.
      reads: (step, its argument, how many axes of scans lie in front), as in `Operand.reads`.
    """
    undo: Steps = []
    for step, arg, lead in reads:
        if step == "cast":
            undo.append(("cast", x.dtype))
            x = x.astype(arg)
        elif step == "reshape":
            undo.append(("reshape", x.shape))
            x = x.reshape(*x.shape[:lead], *arg)
        else:
            order = (*range(lead), *(lead + a for a in arg))
            undo.append(("transpose", tuple(order.index(a) for a in range(x.ndim))))
            x = x.transpose(order)
    return x, undo[::-1]


def shape_read(x: Any, reads: Sequence[tuple[str, Any, int]]) -> tuple[Any, Steps]:
    """`read`, with the shape and dtype of the operand alone."""
    undo: Steps = []

    def seen(x: Any) -> Any:
        v, steps = read(x, reads)
        undo.extend(steps)
        return v

    return jax.eval_shape(seen, x), undo


def array_undone(v: jax.Array, steps: Sequence[tuple[str, Any]]) -> jax.Array:
    """The array of an operand in the layout of the parameter."""
    for step, arg in steps:
        if step == "cast":
            v = v.astype(arg)
        else:
            v = v.transpose(arg) if step == "transpose" else v.reshape(arg)
    return v
