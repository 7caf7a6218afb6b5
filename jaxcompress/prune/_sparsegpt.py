# SPDX-License-Identifier: Apache-2.0
"""SparseGPT: what is pruned is made up for in the weights that stay."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from .._core.compressed import Compressed
from .._solvers.cholesky import inverse_cholesky
from .._solvers.sparsegpt import sparsegpt as solve
from ._calibrated import Amount, best_units, prune
from ._owl import Profile
from ._structures import Structure, unstructured
from ._targets import Patterns


def sparsegpt(
    fn: Callable[..., Any],
    params: Any,
    calibration: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    sparsity: float | None = None,
    nm: tuple[int, int] | None = None,
    structure: Structure = unstructured,
    profile: Profile | None = None,
    damping: float = 0.01,
    block: int = 128,
    precision: str = "float32",
    pattern: Patterns = "*",
    exclude: Patterns = (),
    sequential: bool = True,
    checkpoint_dir: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Compressed:
    """Prunes a trained function from a few batches and corrects the weights that stay.

        score_i = w_i² / U_ii²     e_i = (w_i - m_i w_i) / U_ii     w_j -= U_ij e_i for j > i
        with U^T U = (sum x x^T + damping mean(diag) I)^-1

    To prune and round jointly, use `jc.quantize(..., method=jc.methods.sparsegpt(nm=(2, 4)))`; to
    round pruned weights and keep their zeros, `method=jc.methods.gptq(keep_zeros=True)`.

    Args:
      fn, params, calibration, profile, pattern, exclude, sequential, checkpoint_dir, progress: as
        in `jc.prune.wanda`.
      sparsity: fraction of the weights of a matrix that becomes zero, spread evenly over blocks of
        inputs; the total is exact, rounded half to even.
      nm: instead, (N, M): N of every M consecutive inputs of each output stay.
      structure: units that go together, of the matrix [out, in] of a layer; they are chosen at the
        start by the mean of w_i² / [H^-1]_ii.
      damping: share of the mean of the Hessian's diagonal that is added to it.
      block: inputs whose weights are compared with each other, with `sparsity`.
      precision: of the factorization, "float32" or "float64" (on the host).

    Returns:
      As `jc.prune.wanda`.

    Raises:
      As `jc.prune.wanda`.

    >>> fn = lambda p, x: x @ p["w"]
    >>> x = jnp.array([[1.0, 1.0], [0.0, 0.1]])  # two inputs that are almost the same
    >>> small = sparsegpt(fn, {"w": jnp.array([[1.0], [2.0]])}, [x], nm=(1, 2), damping=1e-4)
    >>> small.params["w"].round(2).tolist()
    [[0.0], [2.990000009536743]]

    References: Frantar and Alistarh 2023, Algorithm 1.
    """

    def one(w: jax.Array, seen: Any, share: float | None) -> tuple[jax.Array, jax.Array]:
        h = seen["gram"]
        settings: dict[str, Any] = {"damping": damping, "block": block, "precision": precision}
        if structure is unstructured:
            done = solve(w, h, sparsity=share, nm=nm, **settings)
        else:
            assert share is not None
            u = inverse_cholesky(h, damping=damping, precision=precision).u
            diagonal = jnp.sum(u * u, axis=-2)[..., None, :]
            mask = best_units(w * w / diagonal, structure, share)
            done = solve(w, h, mask=mask, **settings)
        return done.w, done.mask

    return prune(
        "sparsegpt", one, ("gram",), Amount(sparsity, nm, structure, profile),
        fn, params, calibration, pattern=pattern, exclude=exclude, sequential=sequential,
        checkpoint_dir=checkpoint_dir, progress=progress,
        settings={"damping": damping, "block": block, "precision": precision},
    )  # fmt: skip
