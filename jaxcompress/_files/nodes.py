# SPDX-License-Identifier: Apache-2.0
"""Nodes of pytrees in files: their names, and what they become when they are read."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax

from .._core.qtensor import QTensor, Stored
from .._core.sparse import SparseTensor
from .._errors import ArtifactError

_Type = TypeVar("_Type", bound=type)
_OWN: dict[str, type] = {}  # filled by `own` when the library is imported


def own(kind: _Type) -> _Type:
    """Makes a registered dataclass of this library one that is built without `like`."""
    _OWN[f"jaxcompress.{kind.__name__}"] = kind
    return kind


class Node:
    """A pytree node of a type that is not built without `like`."""

    def __init__(self, kind: str, children: dict[Any, Any]):
        self.kind, self.children = kind, children


def public(tree: Any) -> Any:
    """Builds nodes that need no `like`: our own, and plain dicts in place of all others."""
    match tree:
        case Node():
            children = {k: public(v) for k, v in tree.children.items()}
            ours = _OWN.get(tree.kind)
            if ours is not None and children.keys() == {f.name for f in dataclasses.fields(ours)}:
                return ours(**children)
            return children
        case dict():
            return {k: public(v) for k, v in tree.items()}
        case list() | tuple():
            return type(tree)(public(v) for v in tree)
    return tree


def match_like(tree: Any, like: Any, path: tuple[Any, ...]) -> Any:
    """The tree with the nodes of `like`; shapes and dtypes have to agree."""
    if like is None or tree is None:
        if tree is like:
            return None
        raise _unlike(tree, like, path)
    pairs = None if isinstance(like, Stored) else children_of(like)
    if pairs is None:
        if isinstance(tree, Node | dict | list | tuple):
            raise _unlike(tree, like, path)
        for what in ("shape", "dtype"):
            have, want = getattr(tree, what, None), getattr(like, what, None)
            if have != want:
                raise ArtifactError(
                    f"`{where(path)}` has the {what} {have} in the file and {want} in `like`."
                )
        if isinstance(like, SparseTensor) and getattr(tree, "pattern", None) != like.pattern:
            raise _unlike(tree, like, path)
        if isinstance(like, QTensor) and getattr(tree, "format", None) != like.format:
            raise _unlike(tree, like, path)
        return tree
    if isinstance(tree, Node):
        found, same = tree.children, tree.kind == type_name(like)
    elif isinstance(tree, list | tuple):
        found, same = dict(enumerate(tree)), type(tree) is type(like)
    else:
        found, same = tree, type(like) is dict
    if not same or not isinstance(found, dict) or found.keys() != {k for k, _ in pairs}:
        raise _unlike(tree, like, path)
    matched = {k: match_like(found[k], v, (*path, k)) for k, v in pairs}
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


def where(path: tuple[Any, ...]) -> str:
    """A place in a tree, for errors and names of arrays."""
    return "/".join(map(str, path)) or "tree"


def type_name(x: Any) -> str:
    """The name by which a file knows the type of a node."""
    for name, kind in _OWN.items():
        if type(x) is kind:
            return name
    return type(x).__qualname__


def _unlike(tree: Any, like: Any, path: tuple[Any, ...]) -> ArtifactError:
    def what(x: Any) -> str:
        if isinstance(x, SparseTensor):
            return "SparseTensor"
        if isinstance(x, QTensor):
            return f"QTensor of {x.format.name}"
        kind = x.kind if isinstance(x, Node) else type(x).__name__
        keys = x.children if isinstance(x, Node) else x
        if not isinstance(keys, dict):
            keys = dict(children_of(x) or ())
        return f"{kind} ({', '.join(map(str, keys))})" if keys else kind

    return ArtifactError(
        f"`{where(path)}` is a {what(tree)} in the file and a {what(like)} in `like`."
    )
