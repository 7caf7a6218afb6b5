# SPDX-License-Identifier: Apache-2.0
"""The weight of a site as rows, and a parameter with other rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from .consumers import Consumer
    from .problem import Problem


def site_weight(problem: Problem, consumer: Consumer) -> jax.Array | None:
    """[*stack, *lead, out, in]; None if the weight is not the whole of one parameter."""
    read = reader(problem, consumer)
    return None if read is None else read(problem.arrays[parameter(problem, consumer)])


def parameter(problem: Problem, consumer: Consumer) -> int:
    """The number of the parameter that is the weight of a site."""
    return problem.graph.paths.index(consumer.site.operands[consumer.rows.weight].path)


def reader(problem: Problem, consumer: Consumer) -> Any:
    """A linear function from the parameter to the rows of a site; None if there is none."""
    operand, rows = consumer.site.operands[consumer.rows.weight], consumer.rows
    steps = operand.reads
    if steps is None or operand.path not in problem.graph.paths:
        return None

    def read(x: Any) -> jax.Array:
        for step, arg, lead in steps:
            if step == "cast":
                x = x.astype(arg)
            elif step == "reshape":
                x = x.reshape(*x.shape[:lead], *arg)
            else:
                x = x.transpose((*range(lead), *(lead + a for a in arg)))
        of = rows.of
        for _ in consumer.site.stack:
            of = jax.vmap(of)
        return of(x)

    return read


def written(problem: Problem, consumer: Consumer, rows: jax.Array) -> jax.Array:
    """The parameter whose rows are these: reading only moves values, so its transpose undoes it."""
    old = problem.arrays[parameter(problem, consumer)]
    read = reader(problem, consumer)
    (new,) = jax.linear_transpose(read, jax.ShapeDtypeStruct(old.shape, old.dtype))(
        rows.astype(consumer.site.operands[consumer.rows.weight].dtype)
    )
    return new
