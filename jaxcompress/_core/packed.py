# SPDX-License-Identifier: Apache-2.0
"""`with_qtensors`: a function of arrays becomes one that also takes them packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from .transform import ArgNums, Listing, transformed_function


@dataclasses.dataclass(frozen=True)
class Unpack(Listing):
    """Changes nothing: the interpreter itself knows what a QTensor is."""

    kind = "unpack"


def with_qtensors(fn: Callable, *, argnums: ArgNums = 0) -> Callable:
    """Returns `fn` that takes a `QTensor` wherever it takes an array.

    `fn` is traced with the arrays that QTensors stand for. Transposes, reshapes, slices, lookups,
    concatenations and casts move codes and scales; scans, branches, `jax.checkpoint` and
    `shard_map` pass them on; whatever else reads one gets the array, computed right there. The
    result is that of `fn` with every QTensor dequantized, in the same bits under `jax.jit` (large
    products on a CPU: but for the order of sums).

    Derivatives with respect to other arguments are as usual; for those beside QTensors in one
    pytree use `jax.grad(..., allow_int=True)`.

    Args:
      fn: any function that JAX can trace.
      argnums: position (or name) of the argument that holds the parameters, or several: what
        sites are named after. QTensors may be anywhere.

    Returns:
      A function with the signature of `fn`; it returns arrays.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> fn = lambda w, x: x @ w.T
    >>> packed = jc.Quantizer("int4").quantize(jnp.eye(4), axis=1)
    >>> jc.with_qtensors(fn)(packed, jnp.arange(4.0)[None])
    Array([[0., 1., 2., 3.]], dtype=float32)
    """
    return transformed_function(fn, Unpack(), argnums)
