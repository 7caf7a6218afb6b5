# SPDX-License-Identifier: Apache-2.0
"""Any call of a Python function as a jaxpr: arrays are traced, everything else is kept aside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from . import _compat
from .qtensor import Stored, abstract, is_stored


class Static:
    """A leaf that is no array (a flag, a string, an activation function), as part of a key."""

    def __init__(self, value: Any):
        self.value = value
        try:
            self._key = (type(value), hash(value))
        except TypeError:  # unhashable: the object itself is the key
            self._key = (type(value), id(value))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Static) or self._key != other._key:
            return False
        return self.value is other.value or bool(self.value == other.value)


def is_float(x: Any) -> bool:
    """Whether a leaf is a float or complex number of Python."""
    return isinstance(x, (float, complex)) and not isinstance(x, np.generic)


def is_array(x: Any, floats: bool = True) -> bool:
    """Whether a leaf is traced: arrays, tracers, Python floats; not ints, bools, strings.

    Args:
      floats: whether Python's floats and complex numbers are traced too.
    """
    if is_float(x):
        return floats
    kinds = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, Stored)
    return isinstance(x, kinds) and getattr(x, "dtype", None) != np.dtype(object)


class Call(NamedTuple):
    """The arguments of a call, split into what is traced and what is kept."""

    tree: Any
    traced: tuple[bool, ...]
    static: tuple[Static, ...]

    def merge(self, arrays: Sequence) -> Any:
        """The original structure with these arrays in place of the traced leaves."""
        values, static = iter(arrays), iter(self.static)
        leaves = [next(values) if t else next(static).value for t in self.traced]
        return jax.tree_util.tree_unflatten(self.tree, leaves)


@jax.tree_util.register_pytree_node_class
class Packed(NamedTuple):
    """A value whose arrays are pytree leaves and whose other leaves are part of the structure."""

    call: Call
    arrays: list

    @classmethod
    def pack(cls, value: Any, floats: bool = True) -> Packed:
        return cls(*split(value, floats))

    def unpack(self) -> Any:
        return self.call.merge(self.arrays)

    def tree_flatten(self):
        return self.arrays, self.call

    @classmethod
    def tree_unflatten(cls, call: Call, arrays: Sequence) -> Packed:
        return cls(call, list(arrays))


def split(value: Any, floats: bool = True, whole: bool = True) -> tuple[Call, list]:
    """Splits a pytree into (what is kept aside, the arrays).

    Args:
      value: the pytree.
      floats: whether Python's floats are arrays.
      whole: whether a QTensor or SparseTensor is one array, not several.
    """
    leaves, tree = jax.tree_util.tree_flatten(value, is_leaf=is_stored if whole else None)
    traced = tuple(is_array(x, floats) for x in leaves)
    static = tuple(Static(x) for x, t in zip(leaves, traced, strict=True) if not t)
    return Call(tree, traced, static), [x for x, t in zip(leaves, traced, strict=True) if t]


class PlainCalls:
    """Which calls have only arrays as leaves and no structure that is special; remembers them.

    Args:
      special: whether `(args, kwargs)` of this structure are something else all the same.
    """

    def __init__(self, special: Callable[[tuple, dict], bool]):
        self.special = special
        self.known: dict[Any, bool] = {}

    def __call__(self, args: tuple, kwargs: dict) -> bool:
        leaves, tree = jax.tree_util.tree_flatten((args, kwargs))
        for x in leaves:
            if not isinstance(x, (jax.Array, np.ndarray)) or x.dtype == np.dtype(object):
                return False
        try:
            known = self.known.get(tree)
        except TypeError:  # a node with something unhashable
            return False
        if known is None:
            known = self.known[tree] = not self.special(args, kwargs)
        return known


class Staged(NamedTuple):
    """A traced call: `rebuild(outputs of the jaxpr)` gives what the function returned."""

    jaxpr: Any
    consts: list
    rebuild: Callable[[Sequence], Any]


def stage(fn: Callable, call: Call, arrays: Sequence, leading: Sequence = ()) -> Staged:
    """Traces `fn(*leading, *args, **kwargs)` to a jaxpr over `leading` and the arrays of `call`.

    A QTensor or SparseTensor is one array.
    """
    made: list[Call] = []

    def flat(leading, *arrays):
        args, kwargs = call.merge(arrays)
        out, results = split(fn(*leading, *args, **kwargs), whole=False)
        made[:] = [out]
        return results

    whole = [abstract(x) if is_stored(x) else x for x in arrays]
    closed = jax.make_jaxpr(flat)(tuple(leading), *whole)
    jaxpr, consts = _compat.open_jaxpr(closed)
    return Staged(jaxpr, consts, made[0].merge)
