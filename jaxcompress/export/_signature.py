# SPDX-License-Identifier: Apache-2.0
"""The structure of what a program takes and returns, as plain data.

Arrays are numbered in the order of the program; everything else (flags, texts) is part of the
structure and has to be given again as it was.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._core.provenance import key_path
from .._core.staging import is_array
from .._errors import ArtifactError
from .._files import tree as trees


@dataclasses.dataclass(frozen=True)
class Signature:
    """Structure, paths, shapes and dtypes.

    Attributes:
      tree: as `trees.describe` writes it; arrays are their numbers, other leaves texts.
      arrays: (path, shape, dtype) of each array; a dimension is a number or the name of one.
    """

    tree: Any
    arrays: tuple[tuple[str, tuple[int | str, ...], str], ...]

    @classmethod
    def of(cls, tree: Any) -> Signature:
        """Of a pytree of arrays, `jax.ShapeDtypeStruct`s and anything else."""
        found: list[tuple[str, tuple[int | str, ...], str]] = []

        def leaf(path: Any, x: Any) -> int | str:
            if not is_array(x):
                return f"{type(x).__name__} {x!r}"
            shape = tuple(d if isinstance(d, int) else str(d) for d in jnp.shape(x))
            dtype = jax.dtypes.canonicalize_dtype(jnp.result_type(x))
            found.append((key_path(path), shape, str(dtype)))
            return len(found) - 1

        numbered = jax.tree_util.tree_map_with_path(leaf, tree)
        return cls(trees.describe(numbered)[0], tuple(found))

    def to_data(self) -> dict[str, Any]:
        return {"tree": self.tree, "arrays": [[p, list(s), d] for p, s, d in self.arrays]}

    @classmethod
    def from_data(cls, data: Any) -> Signature:
        """Inverse of `to_data`.

        Raises:
          ArtifactError: the data are something else.
        """
        try:
            arrays = tuple((str(p), tuple(s), str(d)) for p, s, d in data["arrays"])
            tree = trees.rebuild(data["tree"], {}, None, False)
            numbers = [x for x in jax.tree.leaves(tree) if isinstance(x, int)]
            known = all(isinstance(d, int | str) for _, s, _ in arrays for d in s)
        except (KeyError, TypeError, ValueError):
            numbers, arrays, known = [-1], (), False
        if not known or sorted(numbers) != list(range(len(arrays))):
            raise ArtifactError("The description of what the program takes or returns is damaged.")
        return cls(data["tree"], arrays)

    def flatten(self, tree: Any) -> list[jax.Array]:
        """The arrays of a pytree, which has to be as this says.

        Raises:
          ArtifactError: structure, a shape or a dtype differs; says which.
        """
        given = Signature.of(tree)
        if json.dumps(given.tree) != json.dumps(self.tree):
            raise ArtifactError(
                f"The program takes {self}, and was given {given}. Beside the arrays, structure "
                "and settings have to be those of the export."
            )
        sizes: dict[str, Any] = {}
        for (path, want, dtype), (_, got, got_dtype) in zip(self.arrays, given.arrays, strict=True):
            if not _fits(want, got, sizes) or dtype != got_dtype:
                raise ArtifactError(
                    f"Input `{path}` is {_spell(got, got_dtype)}, the program takes "
                    f"{_spell(want, dtype)}. Export it for this shape too, or with "
                    "symbolic_batch=True for every size of batch."
                )
        return [jnp.asarray(x) for x in jax.tree.leaves(tree) if is_array(x)]

    def rebuild(self, arrays: Sequence[Any]) -> Any:
        """The pytree of the arrays; nodes other than dict, list and tuple are dicts by key."""
        tree = trees.rebuild(self.tree, {}, None, False)
        return jax.tree.map(lambda i: arrays[i] if isinstance(i, int) else i, tree)

    def __str__(self) -> str:
        return str(self.rebuild([_spell(shape, dtype) for _, shape, dtype in self.arrays]))


def _fits(want: Sequence[int | str], got: Sequence, sizes: dict[str, Any]) -> bool:
    """Whether a shape is as asked; `sizes` are those of the names that were seen before.

    What is computed from names, such as `2*batch`, JAX checks itself.
    """

    def fits(w: int | str, g: Any) -> bool:
        if isinstance(w, int):
            return w == g
        return not w.isidentifier() or sizes.setdefault(w, g) == g

    return len(want) == len(got) and all(map(fits, want, got))


def _spell(shape: Sequence[int | str], dtype: str) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"
