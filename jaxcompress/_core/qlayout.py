# SPDX-License-Identifier: Apache-2.0
"""Layout primitives on QTensors: codes and scales are moved, nothing is dequantized.

One rule per primitive of JAX, over its operands and parameters. A rule returns what the primitive
returns, or None where the result cannot be stored as codes and scales (a slice through a group, a
cast that would round twice): then the array is computed. What a rule returns dequantizes to
exactly the bits that the primitive makes of the dequantized operands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import qdot, qmove, qpick, qsharding
from .qtensor import QTensor, dequantized, is_qtensor


def _cast(q: QTensor, new_dtype: Any) -> QTensor | None:
    """From float32, in which values are computed, so that they are still rounded once."""
    if q.dtype not in (jnp.float32, new_dtype) or not jnp.issubdtype(new_dtype, jnp.floating):
        return None
    return dataclasses.replace(q, dtype=jnp.dtype(new_dtype))


_RULES: dict[str, Callable] = {
    "transpose": lambda q, permutation: qmove.transpose(q, permutation),
    "reshape": lambda q, new_sizes, **_: qmove.reshape(q, new_sizes),
    "squeeze": lambda q, dimensions: qmove.reshape(
        q, [n for i, n in enumerate(q.shape) if i not in {d % q.ndim for d in dimensions}]
    ),
    "broadcast_in_dim": lambda q, *rest, shape, broadcast_dimensions, **_: qmove.broadcast(
        q, shape, broadcast_dimensions
    ),
    "slice": lambda q, start_indices, limit_indices, strides: qpick.slice(
        q, start_indices, limit_indices, strides
    ),
    "dynamic_slice": qpick.dynamic_slice,
    "gather": qpick.gather,
    "concatenate": qpick.concatenate,
    "convert_element_type": lambda q, new_dtype, **_: _cast(q, new_dtype),
    "rev": qpick.rev,
    "split": qpick.split,
    "sharding_constraint": lambda q, sharding, **_: qsharding.constrain(q, sharding),
    "name": lambda q, **_: q,
}
# Primitives that do the same to every array: to the parts of a QTensor too.
_EACH = frozenset("copy copy_p optimization_barrier pvary pcast".split())


def bind(
    eqn: Any, values: Sequence, run: Callable[[list], list], params: dict | None = None
) -> list:
    """The results of an equation some of whose operands may be QTensors.

    Args:
        eqn: the equation.
        values: its operands.
        run: runs it on arrays.
        params: its parameters, if they are not those of the equation.
    """
    if not any(map(is_qtensor, values)):
        return run(list(values))
    name = eqn.primitive.name
    given: dict[str, Any] = eqn.params if params is None else params
    if name in _EACH:
        flat, tree = jax.tree.flatten(list(values))
        if name == "optimization_barrier":
            return jax.tree.unflatten(tree, lax.optimization_barrier(flat))
        return jax.tree.unflatten(tree, [run([x])[0] for x in flat])
    out = None
    if name in _RULES and is_qtensor(values[0]):
        out = _RULES[name](*values, **given)
    elif name == "dot_general":
        out = qdot.dot_general(*values, **given)
    if out is None:
        return run([dequantized(v) for v in values])
    return out if isinstance(out, list) else [out]
