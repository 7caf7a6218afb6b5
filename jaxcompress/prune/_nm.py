# SPDX-License-Identifier: Apache-2.0
"""N:M sparsity: of every M consecutive weights N are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._errors import RecipeError, SiteError
from .._solvers.select import n_of_m
from ._link import Pruner, Rule, Weights, pruner
from ._magnitude import due_every, surviving
from ._targets import Patterns, Target, Targets


def nm(
    n: int,
    m: int,
    *,
    axis: int | Mapping[str, int] = -2,
    begin: int = 0,
    end: int = 0,
    pattern: Patterns = "*",
    exclude: Patterns = (),
    per_layer: Patterns = (),
    min_ndim: int = 2,
    every: int = 1,
) -> Pruner:
    """Keeps the n largest of every m consecutive weights along the contracted axis.

    With `begin` and `end` this goes gradually: M:M until `begin`, then one less at a time in equal
    intervals, N:M from `end` on. Equal weights go from the end of their group.

    Args:
      n, m: 0 < n <= m. 2:4 is what GPUs have kernels for.
      axis: along which groups lie. -2 is the axis of inputs of kernels `[in, out]` and
        `[height, width, in, out]`, stacked over layers or not. For other layouts a mapping from
        key paths to axes: `jc.prune.contracted_axes(fn)(params, *inputs)` finds it.
      begin, end: steps of the ramp, begin <= end.
      pattern, exclude, per_layer, min_ndim, every: as in `magnitude`.

    Raises:
      RecipeError: N > M, a ramp that ends before it begins, a pattern that matches nothing.
      SiteError: (in `init`) m does not divide an axis.

    >>> import optax
    >>> tx = optax.chain(optax.sgd(0.0), nm(2, 4))
    >>> params = {"w": jnp.array([[1.0], [-4.0], [3.0], [2.0]])}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].ravel().tolist()
    [0.0, -4.0, 3.0, 0.0]

    References: Mishra et al. 2021, Accelerating Sparse Deep Neural Networks; Zhou et al. 2021.
    """
    if not (isinstance(n, int) and isinstance(m, int) and 0 < n <= m):
        raise RecipeError(
            f"nm({n!r}, {m!r}): N of every M weights are kept, 0 < N <= M. 2:4 is nm(2, 4)."
        )
    if not 0 <= begin <= end:
        raise RecipeError(f"nm(begin={begin}, end={end}): the ramp ends before it begins.")

    def kept(step: Any) -> Any:
        if begin == end == 0:
            return n
        done = jnp.where(step >= end, 1.0, (step - begin) / max(end - begin, 1))
        return m - jnp.floor((m - n) * jnp.clip(done, 0, 1)).astype(jnp.int32)

    def check(targets: Sequence[Target]) -> None:
        for t in targets:
            axis_of(axis, t, m)

    def choose(
        targets: Sequence[Target], level: Any, step: Any, weights: Weights
    ) -> list[jax.Array]:
        pairs = zip(targets, surviving(weights), strict=True)
        return [n_of_m(x, level, m, axis_of(axis, t, m)) for t, x in pairs]

    rule = Rule("nm", kept, choose, float(m), due_every(every), check)
    return pruner(rule, Targets(pattern, exclude, per_layer, min_ndim))


def axis_of(axis: int | Mapping[str, int], target: Target, m: int) -> int:
    """The axis along which the groups of m of a target lie, negative.

    Raises:
      RecipeError: the target has no such axis.
      SiteError: m does not divide it.
    """
    shape = target.shape
    if isinstance(axis, int):
        found = axis
    elif target.path in axis:
        found = axis[target.path]
    else:
        raise RecipeError(
            f"axis= has no entry for `{target.path}`: no matmul or convolution was found that "
            f'reads it. Add one, or leave it out with exclude="{target.path}".'
        )
    if not -len(shape) <= found < len(shape):
        raise RecipeError(f"axis={found} is no axis of `{target.path}` {list(shape)}.")
    found = found - len(shape) if found >= 0 else found
    if shape[found] % m:
        raise SiteError(
            f"groups of {m} do not divide axis {found} of `{target.path}` {list(shape)}, which "
            f'has {shape[found]} entries. Leave it out with exclude="{target.path}", or say '
            "another axis."
        )
    return found
