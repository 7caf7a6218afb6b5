# SPDX-License-Identifier: Apache-2.0
"""Wanda: weights times the norms of their inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from .._core.compressed import Compressed
from .._solvers.wanda import wanda as choose
from ._calibrated import Amount, best_units, prune
from ._owl import Profile
from ._structures import Structure, unstructured
from ._targets import Patterns


def wanda(
    fn: Callable[..., Any],
    params: Any,
    calibration: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    sparsity: float | None = None,
    nm: tuple[int, int] | None = None,
    structure: Structure = unstructured,
    profile: Profile | None = None,
    pattern: Patterns = "*",
    exclude: Patterns = (),
    sequential: bool = True,
    checkpoint_dir: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Compressed:
    """Prunes a trained function from a few batches: in each output the smallest |w_ij| ‖x_j‖ go.

    Every parameter of two axes or more that one matmul or convolution reads whole is pruned,
    scanned layers and experts each for itself; the report says what was left alone, and why.
    Nothing is trained and no weight that stays changes.

    Args:
      fn: `fn(params, *inputs)`, any function that JAX can trace.
      params: its trained parameters, a pytree of arrays.
      calibration: batches of inputs, as for `jc.quantize`.
      sparsity: fraction of the inputs of each output that becomes zero, rounded half to even.
      nm: instead, (N, M): N of every M consecutive inputs of each output stay.
      structure: units that go together, of the matrix [out, in] of a layer (a convolution's inputs
        are its channels, each with its window), as `jc.prune.blocks(4, 4)`; they are compared over
        the whole matrix by their mean score.
      profile: how sparsity is spread over blocks of layers, as `jc.prune.owl()`.
      pattern, exclude: which parameters, by key path, as in `jc.prune.magnitude`. What a pattern
        other than "*" names must be one that can be pruned.
      sequential: whether a block of layers sees the inputs that the pruned blocks before it make.
      checkpoint_dir, progress: as in `jc.quantize`.

    Returns:
      `Compressed(fn, params, report)`: the function as it was, parameters with zeros, and how
      sparse they are. `report.masks` are the masks, for `jc.prune.fixed`, `jc.prune.sparse` and
      `jc.prune.masked`.

    Raises:
      RecipeError: sparsity outside [0, 1), N > M, settings that contradict each other, patterns
        that match nothing.
      FormatError, SiteError: M or a structure that does not divide a weight; a weight that no
        calibration token reached, or that cannot be pruned.
      JaxCompressError: no batches, or values that are not finite.

    >>> fn = lambda p, x: x @ p["w"]
    >>> params = {"w": jnp.array([[1.0], [2.0]])}
    >>> small = wanda(fn, params, [jnp.array([[9.0, 1.0]])], nm=(1, 2))
    >>> small.params["w"].tolist(), small.report.masks["w"].tolist()
    ([[1.0], [0.0]], [[True], [False]])

    References: Sun et al. 2023, equation 1 and Algorithm 1.
    """

    def one(w: jax.Array, seen: Any, share: float | None) -> tuple[jax.Array, jax.Array]:
        norm = seen["norm"]
        if structure is unstructured:
            return w, choose(w, norm, sparsity=share, nm=nm)
        assert share is not None
        return w, best_units(jnp.abs(w) * norm[..., None, :], structure, share)

    return prune(
        "wanda", one, ("norm",), Amount(sparsity, nm, structure, profile),
        fn, params, calibration, pattern=pattern, exclude=exclude, sequential=sequential,
        checkpoint_dir=checkpoint_dir, progress=progress, settings={},
    )  # fmt: skip
