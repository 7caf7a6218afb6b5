# SPDX-License-Identifier: Apache-2.0
"""A function of parameters and inputs as a function of two flat lists of arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._core.observe import sites, tap
from .._core.provenance import key_path
from .._core.qtensor import is_stored
from .._core.staging import Call, is_array, split


class Program:
    """A function, the arrays of its parameters by name, and its inputs.

    Attributes:
      named: by key path, the arrays, QTensors and SparseTensors among the parameters. Other leaves
        (flags, functions) are part of the program.
      inputs: the arrays among the inputs.
    """

    def __init__(self, fn: Callable, params: Any, inputs: tuple):
        self.fn = fn
        leaves, self._structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_stored)
        self._kept = [None if _is_weight(x) else x for _, x in leaves]
        weights = [(path, x) for path, x in leaves if _is_weight(x)]
        names = [key_path(path) for path, _ in weights]
        if len(set(names)) < len(names):
            names = [jax.tree_util.keystr(path) for path, _ in weights]
        self._order = names
        self.named = {n: _canonical(x) for n, (_, x) in zip(names, weights, strict=True)}
        self.leaves, self._named = jax.tree.flatten(self.named)
        self._inputs, arrays = split(inputs)
        self.inputs = [_canonical(x) for x in arrays]

    def run(self, leaves: Sequence, inputs: Sequence) -> Any:
        """The result of the function."""
        return self.fn(*self._arguments(leaves, inputs))

    def sites(self) -> list[str]:
        """Names of the sites whose results `run_sites` returns, in program order."""
        found = sites(self.fn)(*self._arguments(self.leaves, self.inputs))
        return [s.name for s in found if not s.opaque]

    def run_sites(self, leaves: Sequence, inputs: Sequence) -> dict[str, jax.Array]:
        """The result of every site, by name."""
        return tap(self.fn, "*", output=True)(*self._arguments(leaves, inputs))[1]

    def inputs_with(self, arrays: Sequence) -> tuple:
        """The inputs with these arrays."""
        return self._inputs.merge(arrays)

    def _arguments(self, leaves: Sequence, inputs: Sequence) -> tuple:
        named = jax.tree.unflatten(self._named, leaves)
        weights = iter([named[n] for n in self._order])
        filled = [next(weights) if x is None else x for x in self._kept]
        params = jax.tree.unflatten(self._structure, filled)
        return params, *self.inputs_with(inputs)


def flat(run: Callable[..., Any]) -> tuple[Callable[..., list], list[Call]]:
    """A function that returns the arrays of its result, and where the rest of that is kept."""
    kept: list[Call] = []

    def arrays_of(*args):
        call, arrays = split(run(*args))
        kept[:] = [call]
        return arrays

    return arrays_of, kept


def _is_weight(x: Any) -> bool:
    return is_stored(x) or is_array(x)


def _canonical(x: Any) -> Any:
    if is_stored(x) or isinstance(x, jax.ShapeDtypeStruct):
        return x
    return jnp.asarray(x)
