# SPDX-License-Identifier: Apache-2.0
"""Which arrays of a pytree are pruned: strict patterns on their key paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._core.patterns import matches, nearest
from .._core.provenance import key_path
from .._errors import RecipeError

Patterns = str | Sequence[str]


class Target(NamedTuple):
    """One array that is pruned.

    Attributes:
      index: its place among the leaves.
      path: its key path.
      shape: of one layer, if it is a stack of layers that are pruned one by one.
      layers: their number, or None.
    """

    index: int
    path: str
    shape: tuple[int, ...]
    layers: int | None


@dataclasses.dataclass(frozen=True)
class Targets:
    """What to prune.

    Attributes:
      pattern: globs or `re:` regular expressions on key paths; one is enough.
      exclude: what matches one of these is left alone.
      per_layer: what matches one of these is a stack of layers, `[L, ...]`, pruned one by one.
      min_ndim: arrays with fewer axes (of one layer) are left alone: biases, norms.
    """

    pattern: Patterns = "*"
    exclude: Patterns = ()
    per_layer: Patterns = ()
    min_ndim: int = 2

    def find(self, params: Any) -> list[Target]:
        """The arrays of a pytree to prune.

        Raises:
          RecipeError: a pattern matches nothing, or nothing that can be pruned.
        """
        leaves = paths_of(params)
        paths = [path for path, _ in leaves]
        for name in ("pattern", "exclude", "per_layer"):
            for one in _all(getattr(self, name)):
                if not any(matches(one, path) for path in paths):
                    raise RecipeError(
                        f"{name}={one!r} matches no parameter. Nearest: {nearest(one, paths)}."
                    )
        found = []
        for i, (path, leaf) in enumerate(leaves):
            if not self.why_not(path, leaf):
                layers = leaf.shape[0] if _any(self.per_layer, path) else None
                shape = leaf.shape[1:] if layers is not None else leaf.shape
                found.append(Target(i, path, tuple(shape), layers))
        for one in _all(self.pattern):
            named = [(path, leaf) for path, leaf in leaves if matches(one, path)]
            if not any(matches(one, target.path) for target in found):
                path, leaf = named[0]
                raise RecipeError(
                    f"pattern={one!r} matches nothing that can be pruned: `{path}` is left "
                    f"alone, {self.why_not(path, leaf)}."
                )
        return found

    def why_not(self, path: str, leaf: Any) -> str:
        """Why an array is left alone; empty if it is pruned."""
        if not _any(self.pattern, path):
            return "no pattern matches it"
        if _any(self.exclude, path):
            return "it is excluded"
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            return "it is no array of floating-point numbers"
        ndim = leaf.ndim - _any(self.per_layer, path)
        if ndim < max(self.min_ndim, 1):
            return f"it has {ndim} axes and min_ndim is {self.min_ndim}"
        return "" if leaf.size else "it is empty"


def paths_of(tree: Any) -> list[tuple[str, Any]]:
    """(key path, leaf) of a pytree."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(key_path(path), leaf) for path, leaf in flat]


def _all(patterns: Patterns) -> Sequence[str]:
    return (patterns,) if isinstance(patterns, str) else patterns


def _any(patterns: Patterns, path: str) -> bool:
    return any(matches(one, path) for one in _all(patterns))
