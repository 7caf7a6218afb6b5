# SPDX-License-Identifier: Apache-2.0
"""A pytree as JSON and arrays by name, and back, without running anything that a file says.

    null                                    None
    {"dict": [[key, node], ...]}            keys are strings, numbers, booleans or None
    {"list": [node, ...]}, {"tuple": ...}
    {"node": type, "children": [[key, node], ...]}    any other pytree node
    {"qtensor": {"format", "dtype", "axis", "unused", "blocks", "packed", ...}}
    {"sparse": {"shape", "pattern", "axis", "values": node, "index": node}}
    {"jax": name}, {"numpy": name}, {"scalar": name}  arrays, and numbers of NumPy
    {"key": name, "impl": name}                       typed PRNG keys
    {"value": 3}, {"float": "0x1.8p+0"}, {"complex": [re, im]}    numbers and texts of Python

An array whose dtype safetensors does not know has "dtype" and "shape" beside its name and is stored
as bytes; below eight bits a value they are packed as `formats.pack` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.core import Tracer

from .._core.qtensor import QTensor
from .._core.sparse import SparseTensor
from .._errors import ArtifactError
from . import bits, qtensor, sparse
from .nodes import Node, children_of, match_like, public, type_name, where
from .safetensors import NAMES

# Stored packed, so many bits a value.
_PACKED = {
    "int2": 2,
    "uint2": 2,
    "int4": 4,
    "uint4": 4,
    "float4_e2m1fn": 4,
    "float6_e2m3fn": 6,
    "float6_e3m2fn": 6,
}
_BYTES = {  # stored as bytes
    np.dtype(t).name: np.dtype(t)
    for t in (
        np.complex128,
        ml_dtypes.float8_e3m4,
        ml_dtypes.float8_e4m3,
        ml_dtypes.float8_e4m3b11fnuz,
        ml_dtypes.float8_e4m3fnuz,
        ml_dtypes.float8_e5m2fnuz,
    )
}


def describe(tree: Any) -> tuple[Any, dict[str, Any]]:
    """The JSON of a pytree, and its arrays by name.

    Raises:
      ArtifactError: it holds something that cannot be stored; says where.
    """
    arrays: dict[str, Any] = {}
    try:
        return _Describe(arrays).node(tree, ()), arrays
    except RecursionError:
        raise ArtifactError("The tree is nested too deeply to be saved.") from None


class _Describe:
    """Walks down a pytree and collects its arrays."""

    def __init__(self, arrays: dict[str, Any]):
        self.arrays = arrays

    def node(self, x: Any, path: tuple[Any, ...]) -> Any:
        if x is None:
            return None
        if isinstance(x, QTensor):
            data = qtensor.to_data(x, where(path))
            leaves = {n: getattr(x, n) for n in qtensor.LEAVES}
            leaves = {n: None if a is None else self.leaf(a, path, n) for n, a in leaves.items()}
            return {"qtensor": data | leaves}
        if isinstance(x, SparseTensor):
            values = self.node(x.values, (*path, "values"))
            leaves = {"values": values, "index": self.leaf(x.index, path, "index")}
            return {"sparse": sparse.to_data(x) | leaves}
        if type(x) is dict:
            return {"dict": [[_key(k, path), self.node(v, (*path, k))] for k, v in x.items()]}
        if type(x) in (list, tuple):
            kind = type(x).__name__
            return {kind: [self.node(v, (*path, i)) for i, v in enumerate(x)]}
        if (pairs := children_of(x)) is not None:
            nodes = [[_key(k, path), self.node(v, (*path, k))] for k, v in pairs]
            return {"node": type_name(x), "children": nodes}
        return self.leaf(x, path)

    def leaf(self, x: Any, path: tuple[Any, ...], field: str = "") -> dict[str, Any]:
        if isinstance(x, Tracer):
            raise ArtifactError(f"`{where(path)}` is traced: save outside of jit, grad and vmap.")
        if isinstance(x, jax.Array):
            if not x.is_fully_addressable:
                raise ArtifactError(
                    f"`{where(path)}` lies on devices of other processes. Gather it first, as with "
                    "jax.experimental.multihost_utils.process_allgather."
                )
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                impl = str(jax.random.key_impl(x))
                return {"key": self.store(jax.random.key_data(x), path, field), "impl": impl}
            return self.array("jax", x, path, field)
        if isinstance(x, np.ndarray) and type(x) is np.ndarray:
            return self.array("numpy", x, path, field)
        if isinstance(x, np.generic) and type(x) is x.dtype.type:
            return self.array("scalar", np.asarray(x), path, field)
        if type(x) in (bool, int, str):
            return {"value": x}
        if type(x) is float:
            return {"float": x.hex()}
        if type(x) is complex:
            return {"complex": [x.real.hex(), x.imag.hex()]}
        raise ArtifactError(
            f"`{where(path)}` is a {type(x).__name__}, which cannot be saved: leaves are arrays of "
            "JAX or NumPy, QTensors, numbers and texts."
        )

    def array(self, kind: str, x: Any, path: tuple[Any, ...], field: str) -> dict[str, Any]:
        dtype = np.dtype(x.dtype)
        if dtype in NAMES and dtype.isnative:
            return {kind: self.store(x, path, field)}
        if dtype.name in _PACKED:
            codes = np.ascontiguousarray(np.atleast_1d(np.asarray(x))).view(np.uint8)
            data = bits.pack(codes, _PACKED[dtype.name])
        elif dtype.name in _BYTES and dtype.isnative:
            data = np.ascontiguousarray(x).reshape(*x.shape, 1).view(np.uint8)
        else:
            raise ArtifactError(
                f"`{where(path)}` has the dtype {dtype}, which cannot be saved. Convert it first."
            )
        return {
            kind: self.store(data, path, field),
            "dtype": dtype.name,
            "shape": list(x.shape),
        }

    def store(self, x: Any, path: tuple[Any, ...], field: str) -> str:
        base = where(path) + (f":{field}" if field else "")
        name, count = base, 1
        while name in self.arrays or name == "__metadata__":  # keys may contain "/" and ":"
            count += 1
            name = f"{base}#{count}"
        self.arrays[name] = x
        return name


def rebuild(node: Any, arrays: Mapping[str, np.ndarray], like: Any, lazy: bool) -> Any:
    """The pytree of its JSON and arrays.

    Args:
      node: JSON made by `describe`, or anything else.
      arrays: by name.
      like: None, or a pytree whose structure is to be restored.
      lazy: arrays stay as they are and are not copied to a device.

    Raises:
      ArtifactError: the JSON is wrong, or is not that of a tree like `like`.
    """
    left = dict(arrays)

    def take(name: Any) -> np.ndarray:
        if not isinstance(name, str) or name not in left:
            raise ArtifactError(f"The description names the array {name!r}, which is not there.")
        return left.pop(name)

    try:
        tree = _Rebuild(take, lazy).node(node, ())
        if left:
            raise ArtifactError(f"No description of the array {min(left)!r}.")
        return public(tree) if like is None else match_like(tree, like, ())
    except RecursionError:
        raise ArtifactError("The description of the tree is nested too deeply.") from None


class _Rebuild:
    """Walks down the JSON; whatever is not as `describe` makes it is an error."""

    def __init__(self, take: Callable[[Any], np.ndarray], lazy: bool):
        self.take, self.lazy = take, lazy

    def node(self, data: Any, path: tuple[Any, ...]) -> Any:
        match data:
            case None:
                return None
            case {"dict": list(pairs), **rest} if not rest:
                return self.pairs(pairs, path)
            case {"list": list(nodes), **rest} if not rest:
                return [self.node(n, (*path, i)) for i, n in enumerate(nodes)]
            case {"tuple": list(nodes), **rest} if not rest:
                return tuple(self.node(n, (*path, i)) for i, n in enumerate(nodes))
            case {"node": str(kind), "children": list(pairs), **rest} if not rest:
                return Node(kind, self.pairs(pairs, path))
            case {"qtensor": dict(fields), **rest} if not rest:
                leaves = {n: self.node(fields.pop(n, None), path) for n in qtensor.LEAVES}
                return qtensor.from_data(fields, leaves, where(path))
            case {"sparse": dict(fields), **rest} if not rest:
                values = self.node(fields.pop("values", None), (*path, "values"))
                index = self.node(fields.pop("index", None), path)
                return sparse.from_data(fields, values, index, where(path))
            case {"value": bool() | int() | str() as value, **rest} if not rest:
                return value
            case {"float": str(text), **rest} if not rest:
                return _float(text, path)
            case {"complex": [str(real), str(imag)], **rest} if not rest:
                return complex(_float(real, path), _float(imag, path))
            case {"key": str(name), "impl": str(impl), **rest} if not rest:
                return self.key(self.take(name), impl, path)
        if isinstance(data, dict):
            for kind in ("jax", "numpy", "scalar"):
                if kind in data and data.keys() in ({kind}, {kind, "dtype", "shape"}):
                    x = self.take(data[kind])
                    if len(data) > 1:
                        x = _from_bytes(x, data["dtype"], data["shape"], path)
                    return self.finish(kind, x, path)
        raise _wrong(path)

    def pairs(self, pairs: list[Any], path: tuple[Any, ...]) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for pair in pairs:
            if not isinstance(pair, list) or len(pair) != 2 or isinstance(pair[0], list | dict):
                raise _wrong(path)
            key, data = pair
            if key in found:
                raise _wrong(path)
            found[key] = self.node(data, (*path, key))
        return found

    def key(self, x: np.ndarray, impl: str, path: tuple[Any, ...]) -> Any:
        try:
            return jax.random.wrap_key_data(jnp.asarray(x), impl=impl)
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"`{where(path)}` is no key of {impl!r}: {error}") from None

    def finish(self, kind: str, x: np.ndarray, path: tuple[Any, ...]) -> Any:
        if kind == "scalar":
            if x.shape:
                raise _wrong(path)
            return x[()]
        if kind == "numpy" or self.lazy:
            return x
        if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
            raise ArtifactError(
                f"`{where(path)}` is a JAX array of {x.dtype}, which JAX has only with the option "
                "jax_enable_x64. Set it, or load with lazy=True for NumPy arrays."
            )
        return jax.device_put(x)


def _from_bytes(x: np.ndarray, name: Any, shape: Any, path: tuple[Any, ...]) -> np.ndarray:
    if type(shape) is not list or not all(type(n) is int and 0 <= n < 2**60 for n in shape):
        raise _wrong(path)
    if len(shape) > 32 or x.dtype != np.uint8 or not isinstance(name, str):
        raise _wrong(path)
    if name in _BYTES:
        if x.shape != (*shape, _BYTES[name].itemsize):
            raise _wrong(path)
        return np.ascontiguousarray(x).view(_BYTES[name]).reshape(shape)
    if name not in _PACKED:
        raise _wrong(path)
    width = _PACKED[name]
    *rows, last = shape or [1]
    if x.shape != (*rows, -(-last * width // 8)):
        raise _wrong(path)
    codes = np.ascontiguousarray(bits.unpack(x, width, last))
    if name.startswith("int"):
        codes = bits.signed(codes, width)
    return codes.view(getattr(ml_dtypes, name)).reshape(shape)


def _float(text: str, path: tuple[Any, ...]) -> float:
    try:
        return float.fromhex(text)
    except (ValueError, OverflowError):
        raise _wrong(path) from None


def _key(key: Any, path: tuple[Any, ...]) -> Any:
    if key is None or type(key) in (bool, int, str):
        return key
    raise ArtifactError(
        f"The key {key!r} below `{where(path)}` is a {type(key).__name__}, which cannot be saved: "
        "keys are texts, whole numbers, booleans or None."
    )


def _wrong(path: tuple[Any, ...]) -> ArtifactError:
    return ArtifactError(f"The description of `{where(path)}` is damaged.")
