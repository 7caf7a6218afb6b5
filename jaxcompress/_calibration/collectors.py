# SPDX-License-Identifier: Apache-2.0
"""What can be collected of the inputs of a site, batch by batch, in memory that does not grow.

    count      number of tokens (n)
    absmax     max |x_j|, per input channel
    minmax     min x_j and max x_j
    mean       sum x_j / n
    magnitude  sum |x_j| / n
    norm       sqrt(sum x_j^2)
    gram       sum x x^T, the Hessian of the layer's squared error up to a factor 2

Each is `(init, update, finish)` over inputs [*lead, tokens, in] in float32.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

_LARGE, _PARTS = 256, 4  # channels from which a Gram matrix is summed in parts, and how many


class Collector(NamedTuple):
    """A statistic of inputs.

    Attributes:
      init: `init(lead, channels) -> state`, arrays that begin with `lead`.
      update: `update(state, x, count, sync) -> state` with x float32 [*lead, tokens, in], rows of
        zeros beyond the `count` tokens [*lead]; `sync` are mesh axes, inside `shard_map`, over
        which the tokens are split.
      finish: `finish(state) -> statistic`.
    """

    init: Callable[[tuple[int, ...], int], Any]
    update: Callable[[Any, jax.Array, jax.Array, Sequence[str]], Any]
    finish: Callable[[Any], Any]


def _summed(shape: Callable[[int], tuple[int, ...]], measure: Callable) -> Collector:
    def init(lead: tuple[int, ...], channels: int) -> jax.Array:
        return jnp.zeros((*lead, *shape(channels)), jnp.float32)

    def update(state: jax.Array, x: jax.Array, count: jax.Array, sync: Sequence[str]) -> jax.Array:
        new = measure(x, count)
        return state + (lax.psum(new, tuple(sync)) if sync else new)

    return Collector(init, update, lambda state: state)


def _gram(x: jax.Array, _: Any) -> jax.Array:
    """sum x xᵀ; below the diagonal perhaps zeros, which saves up to 3/8 of the work."""
    spec = jax.typeof(x).sharding.spec  # of the axes of a mesh that are explicit
    if any(spec):
        return _outer(x, x, PartitionSpec(*spec[:-2], None, None))
    n = x.shape[-1]
    step = -(-n // _PARTS) if n >= _LARGE else n
    rows = []
    for i in range(0, n, step):
        row = _outer(x[..., i : i + step], x[..., i:], None)
        rows.append(jnp.pad(row, [(0, 0)] * (x.ndim - 1) + [(i, 0)]))
    return jnp.concatenate(rows, -2)


def _outer(a: jax.Array, b: jax.Array, sharding: PartitionSpec | None) -> jax.Array:
    return jnp.einsum(
        "...ti,...tj->...ij", a, b, precision=lax.Precision.HIGHEST, out_sharding=sharding
    )


@jax.jit
def _mirrored(gram: jax.Array) -> jax.Array:
    """The whole matrix from what is on and above its diagonal."""
    return jnp.triu(gram) + jnp.swapaxes(jnp.triu(gram, 1), -1, -2)


def _averaged(measure: Callable) -> Collector:
    each, total = _summed(lambda n: (n,), measure), _summed(lambda n: (), lambda _, count: count)

    def update(state: Any, x: jax.Array, n: jax.Array, sync: Sequence[str]) -> Any:
        return each.update(state[0], x, n, sync), total.update(state[1], x, n, sync)

    def finish(state: Any) -> jax.Array:
        return state[0] / jnp.maximum(state[1], 1)[..., None]

    return Collector(lambda *size: (each.init(*size), total.init(*size)), update, finish)


def _highest(measure: Callable) -> Collector:
    def init(lead: tuple[int, ...], channels: int) -> jax.Array:
        return jnp.zeros((*lead, channels), jnp.float32)

    def update(state: jax.Array, x: jax.Array, count: jax.Array, sync: Sequence[str]) -> jax.Array:
        new = jnp.max(measure(x), -2)
        return jnp.maximum(state, lax.pmax(new, tuple(sync)) if sync else new)

    return Collector(init, update, lambda state: state)


def _both_ends() -> Collector:
    low, high = _highest(jnp.negative), _highest(lambda x: x)

    def update(state: Any, x: jax.Array, count: jax.Array, sync: Sequence[str]) -> Any:
        return low.update(state[0], x, count, sync), high.update(state[1], x, count, sync)

    def finish(state: Any) -> tuple[jax.Array, jax.Array]:
        return -state[0], state[1]

    return Collector(lambda *size: (low.init(*size), high.init(*size)), update, finish)


_norm = _summed(lambda n: (n,), lambda x, _: jnp.sum(x * x, -2))

COLLECTORS: Mapping[str, Collector] = types.MappingProxyType(
    {
        "count": _summed(lambda n: (), lambda _, count: count),
        "absmax": _highest(jnp.abs),
        "minmax": _both_ends(),
        "mean": _averaged(lambda x, _: jnp.sum(x, -2)),
        "magnitude": _averaged(lambda x, _: jnp.sum(jnp.abs(x), -2)),
        "norm": _norm._replace(finish=jnp.sqrt),
        "gram": _summed(lambda n: (n, n), _gram)._replace(finish=_mirrored),
    }
)
