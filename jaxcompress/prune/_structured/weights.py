# SPDX-License-Identifier: Apache-2.0
"""The weight of a site as rows, and a parameter with other rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

from ..._core.reading import read

if TYPE_CHECKING:
    from .consumers import Consumer
    from .problem import Problem


def site_weight(problem: Problem, consumer: Consumer) -> jax.Array | None:
    """[*stack, *lead, out, in]; None if the weight is not the whole of one parameter."""
    rows = reader(problem, consumer)
    return None if rows is None else rows(problem.arrays[parameter(problem, consumer)])


def parameter(problem: Problem, consumer: Consumer) -> int:
    """The number of the parameter that is the weight of a site."""
    return problem.graph.paths.index(consumer.site.operands[consumer.rows.weight].path)


def reader(problem: Problem, consumer: Consumer) -> Any:
    """A linear function from the parameter to the rows of a site; None if there is none."""
    operand, rows = consumer.site.operands[consumer.rows.weight], consumer.rows
    steps = operand.reads
    if steps is None or operand.path not in problem.graph.paths:
        return None

    def rows_of_parameter(x: Any) -> jax.Array:
        v, _ = read(x, steps)
        return rows.over_stack(rows.of, v)(v)

    return rows_of_parameter


def written(problem: Problem, consumer: Consumer, rows: jax.Array) -> jax.Array:
    """The parameter whose rows are these: reading only moves values, so its transpose undoes it."""
    old = problem.arrays[parameter(problem, consumer)]
    to_rows = reader(problem, consumer)
    (new,) = jax.linear_transpose(to_rows, jax.ShapeDtypeStruct(old.shape, old.dtype))(
        rows.astype(consumer.site.operands[consumer.rows.weight].dtype)
    )
    return new
