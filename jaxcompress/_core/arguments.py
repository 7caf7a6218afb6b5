# SPDX-License-Identifier: Apache-2.0
"""Which arguments of a call hold the parameters, and what their arrays are called."""

from __future__ import annotations

import collections
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from .._errors import JaxCompressError
from .provenance import DATA, Label, key_path
from .qtensor import is_stored
from .staging import is_array

ArgNums = int | str | Sequence[int | str]


def positions(argnums: ArgNums) -> tuple[int | str, ...]:
    """`argnums` as a tuple of positions and names.

    Raises:
      JaxCompressError: it is something else.
    """
    given = (argnums,) if isinstance(argnums, (int, str)) else argnums
    kinds = [type(n) for n in given] if isinstance(given, Sequence) else []
    if not kinds or not all(kind in (int, str) for kind in kinds):
        raise JaxCompressError(
            f"argnums={argnums!r}: expected the position or the name of the argument that holds "
            "the parameters, or several of them."
        )
    return tuple(given)


def _positional_names(fn: Callable) -> list[str]:
    """Names of the arguments that may be given by position, as far as the signature says."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in kinds]


def chosen(
    fn: Callable, argnums: Sequence[int | str], args: tuple, kwargs: dict
) -> tuple[int | str, ...]:
    """Which arguments of a call hold the parameters: positions, or names of keywords.

    Raises:
      JaxCompressError: `argnums` names none of them.
    """
    names = _positional_names(fn)
    out: list[int | str] = []
    for n in argnums:
        if isinstance(n, str) and n not in kwargs and n in names[: len(args)]:
            n = names.index(n)
        elif isinstance(n, int) and len(args) <= n < len(names) and names[n] in kwargs:
            n = names[n]
        if n not in kwargs if isinstance(n, str) else not -len(args) <= n < len(args):
            raise JaxCompressError(
                f"argnums={n!r} names no argument: {name_of(fn)} was called with "
                f"{len(args)} positional arguments and the keywords {sorted(kwargs)}. "
                "argnums says which arguments hold the parameters."
            )
        out.append(n % len(args) if isinstance(n, int) else n)
    return tuple(out)


def label_arguments(
    args: tuple, kwargs: dict, params: Sequence[int | str], floats: bool = True
) -> tuple[list[Label], list[tuple[str, Any]]]:
    """Labels of the arrays of a call, and (key path, array) of the parameters by number.

    Key paths differ: two that read the same (`{"a/b": x}` and `{"a": {"b": y}}`) are spelled out
    as `['a/b']` and `['a']['b']`, and those of several arguments start with `arg0/`.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_stored)
    flat = [(path, x) for path, x in flat if is_array(x, floats)]
    heads = [getattr(path[1], "idx", getattr(path[1], "key", None)) for path, _ in flat]
    ours = [i for i, head in enumerate(heads) if head in params]
    names = {i: key_path(flat[i][0][2:]) for i in ours}
    for i in _ambiguous(names, lambda i: heads[i]):
        names[i] = jax.tree_util.keystr(flat[i][0][2:])
    shared = set(_ambiguous(names, lambda i: ""))
    for i in ours:
        if i in shared or not names[i]:
            names[i] = f"arg{heads[i]}/{names[i]}".rstrip("/")
    numbers = {i: n for n, i in enumerate(ours)}
    labels = [
        Label(params=frozenset([numbers[i]])) if i in numbers else DATA for i in range(len(flat))
    ]
    return labels, [(names[i], flat[i][1]) for i in ours]


def _ambiguous(names: Mapping[int, str], group: Callable[[int], Any]) -> list[int]:
    """Those whose name is another's too within their group, or ends like `#1`, as a reuse does."""
    count = collections.Counter((group(i), name) for i, name in names.items())
    return [i for i, n in names.items() if count[group(i), n] > 1 or re.search(r"#\d+$", n)]


def name_of(fn: Callable) -> str:
    """A name to call a function by in messages."""
    return getattr(fn, "__name__", type(fn).__name__)
