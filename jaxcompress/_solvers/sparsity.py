# SPDX-License-Identifier: Apache-2.0
"""How many weights become zero: a fraction of them, or all but N of every M inputs."""

from __future__ import annotations

from .._errors import FormatError, RecipeError

Pattern = tuple[int, int]


def check(inputs: int, sparsity: float | None, nm: Pattern | None) -> None:
    """Raises RecipeError unless one of both is given and makes sense.

    Raises:
        FormatError: if M does not divide the number of inputs.
    """
    if (sparsity is None) == (nm is None):
        raise RecipeError(
            f"sparsity={sparsity!r}, nm={nm!r}: say one of both, a fraction of the weights that "
            "become zero, or (N, M) for N of every M inputs that are kept."
        )
    if sparsity is not None and not 0 <= sparsity < 1:
        raise RecipeError(f"sparsity={sparsity!r}: expected a fraction in [0, 1).")
    if nm is None:
        return
    n, m = nm
    if not (isinstance(n, int) and isinstance(m, int) and 0 < n <= m):
        raise RecipeError(f"nm={nm!r}: N of every M inputs are kept, 0 < N <= M, as in (2, 4).")
    if inputs % m:
        raise FormatError(f"nm={nm!r}: groups of {m} do not divide {inputs} inputs.")
