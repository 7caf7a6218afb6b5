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

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.core import Tracer

from .._core.qtensor import QTensor, Stored
from .._core.sparse import SparseTensor
from .._errors import ArtifactError
from . import bits, qtensor, sparse
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
_Type = TypeVar("_Type", bound=type)
_OWN: dict[str, type] = {}  # filled by `own` when the library is imported


def own(kind: _Type) -> _Type:
    """Makes a registered dataclass of this library one that is built without `like`."""
    _OWN[f"jaxcompress.{kind.__name__}"] = kind
    return kind


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
            data = qtensor.to_data(x, _name(path))
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
            return {"node": _type_name(x), "children": nodes}
        return self.leaf(x, path)

    def leaf(self, x: Any, path: tuple[Any, ...], field: str = "") -> dict[str, Any]:
        if isinstance(x, Tracer):
            raise ArtifactError(f"`{_name(path)}` is traced: save outside of jit, grad and vmap.")
        if isinstance(x, jax.Array):
            if not x.is_fully_addressable:
                raise ArtifactError(
                    f"`{_name(path)}` lies on devices of other processes. Gather it first, as with "
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
            f"`{_name(path)}` is a {type(x).__name__}, which cannot be saved: leaves are arrays of "
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
                f"`{_name(path)}` has the dtype {dtype}, which cannot be saved. Convert it first."
            )
        return {
            kind: self.store(data, path, field),
            "dtype": dtype.name,
            "shape": list(x.shape),
        }

    def store(self, x: Any, path: tuple[Any, ...], field: str) -> str:
        base = _name(path) + (f":{field}" if field else "")
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
        return _public(tree) if like is None else _match(tree, like, ())
    except RecursionError:
        raise ArtifactError("The description of the tree is nested too deeply.") from None


class _Node:
    """A pytree node of a type that is not built without `like`."""

    def __init__(self, kind: str, children: dict[Any, Any]):
        self.kind, self.children = kind, children


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
                return _Node(kind, self.pairs(pairs, path))
            case {"qtensor": dict(fields), **rest} if not rest:
                leaves = {n: self.node(fields.pop(n, None), path) for n in qtensor.LEAVES}
                return qtensor.from_data(fields, leaves, _name(path))
            case {"sparse": dict(fields), **rest} if not rest:
                values = self.node(fields.pop("values", None), (*path, "values"))
                index = self.node(fields.pop("index", None), path)
                return sparse.from_data(fields, values, index, _name(path))
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
            raise ArtifactError(f"`{_name(path)}` is no key of {impl!r}: {error}") from None

    def finish(self, kind: str, x: np.ndarray, path: tuple[Any, ...]) -> Any:
        if kind == "scalar":
            if x.shape:
                raise _wrong(path)
            return x[()]
        if kind == "numpy" or self.lazy:
            return x
        if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
            raise ArtifactError(
                f"`{_name(path)}` is a JAX array of {x.dtype}, which JAX has only with the option "
                "jax_enable_x64. Set it, or load with lazy=True for NumPy arrays."
            )
        return jax.device_put(x)


def _public(tree: Any) -> Any:
    """Builds nodes that need no `like`: our own, and plain dicts in place of all others."""
    match tree:
        case _Node():
            children = {k: _public(v) for k, v in tree.children.items()}
            ours = _OWN.get(tree.kind)
            if ours is not None and children.keys() == {f.name for f in dataclasses.fields(ours)}:
                return ours(**children)
            return children
        case dict():
            return {k: _public(v) for k, v in tree.items()}
        case list() | tuple():
            return type(tree)(_public(v) for v in tree)
    return tree


def _match(tree: Any, like: Any, path: tuple[Any, ...]) -> Any:
    """The tree with the nodes of `like`; shapes and dtypes have to agree."""
    if like is None or tree is None:
        if tree is like:
            return None
        raise _unlike(tree, like, path)
    pairs = None if isinstance(like, Stored) else children_of(like)
    if pairs is None:
        if isinstance(tree, _Node | dict | list | tuple):
            raise _unlike(tree, like, path)
        for what in ("shape", "dtype"):
            have, want = getattr(tree, what, None), getattr(like, what, None)
            if have != want:
                raise ArtifactError(
                    f"`{_name(path)}` has the {what} {have} in the file and {want} in `like`."
                )
        if isinstance(like, SparseTensor) and getattr(tree, "pattern", None) != like.pattern:
            raise _unlike(tree, like, path)
        if isinstance(like, QTensor) and getattr(tree, "format", None) != like.format:
            raise _unlike(tree, like, path)
        return tree
    if isinstance(tree, _Node):
        found, same = tree.children, tree.kind == _type_name(like)
    elif isinstance(tree, list | tuple):
        found, same = dict(enumerate(tree)), type(tree) is type(like)
    else:
        found, same = tree, type(like) is dict
    if not same or not isinstance(found, dict) or found.keys() != {k for k, _ in pairs}:
        raise _unlike(tree, like, path)
    matched = {k: _match(found[k], v, (*path, k)) for k, v in pairs}
    if type(like) is dict:
        return matched
    structure = jax.tree.structure(like, is_leaf=lambda x: x is not like)
    return structure.unflatten(matched.values())


def children_of(x: Any) -> list[tuple[Any, Any]] | None:
    """The children of a pytree node by key; None for a leaf."""
    if type(x) is dict:  # JAX would sort the keys, and fail where they cannot be compared
        return list(x.items())
    pairs, structure = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)
    if jax.tree_util.treedef_is_leaf(structure) and len(pairs) == 1 and not pairs[0][0]:
        return None
    keys = [k[0] for k, _ in pairs]
    keys = [getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))) for k in keys]
    if len(set(keys)) < len(keys):
        keys = list(range(len(keys)))
    return [(key, child) for key, (_, child) in zip(keys, pairs)]


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
        f"The key {key!r} below `{_name(path)}` is a {type(key).__name__}, which cannot be saved: "
        "keys are texts, whole numbers, booleans or None."
    )


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path)) or "tree"


def _type_name(x: Any) -> str:
    for name, kind in _OWN.items():
        if type(x) is kind:
            return name
    return type(x).__qualname__


def _wrong(path: tuple[Any, ...]) -> ArtifactError:
    return ArtifactError(f"The description of `{_name(path)}` is damaged.")


def _unlike(tree: Any, like: Any, path: tuple[Any, ...]) -> ArtifactError:
    def what(x: Any) -> str:
        if isinstance(x, SparseTensor):
            return "SparseTensor"
        if isinstance(x, QTensor):
            return f"QTensor of {x.format.name}"
        kind = x.kind if isinstance(x, _Node) else type(x).__name__
        keys = x.children if isinstance(x, _Node) else x
        if not isinstance(keys, dict):
            keys = dict(children_of(x) or ())
        return f"{kind} ({', '.join(map(str, keys))})" if keys else kind

    return ArtifactError(
        f"`{_name(path)}` is a {what(tree)} in the file and a {what(like)} in `like`."
    )
