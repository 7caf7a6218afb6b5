# SPDX-License-Identifier: Apache-2.0
"""Strict patterns on names: globs that cross `/`, or `re:` regular expressions."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import re
from collections.abc import Iterable

from .._errors import RecipeError


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern:
    if pattern.startswith("re:"):
        try:
            return re.compile(pattern[3:])
        except re.error as e:
            raise RecipeError(f"pattern {pattern!r} is no regular expression: {e}") from None
    return re.compile(fnmatch.translate(pattern))


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` matches a site's or parameter's name.

    `*` crosses `/`; a `#k` at the end of the name is ignored unless the pattern has it too, a
    leading `params/` and a trailing `/value` may be left out, and a name `a+b` is also matched by
    what matches `a` or `b`.

    >>> matches("*/kernel", "params/Dense_0/kernel#1"), matches("Dense_0/*", "params/Dense_0/bias")
    (True, True)
    """
    regex = _compiled(pattern)
    plain = re.sub(r"#\d+$", "", name)
    parts = plain.split("+") if "+" in plain else []
    return any(regex.fullmatch(form) for part in (name, plain, *parts) for form in _forms(part))


def _forms(name: str) -> Iterable[str]:
    short = name.removesuffix("/value")
    return {name, short, name.removeprefix("params/"), short.removeprefix("params/")}


def nearest(name: str, known: Iterable[str], count: int = 5) -> str:
    """The known names that resemble `name` most, as text for a message."""
    known = list(dict.fromkeys(known))
    plain = name.removeprefix("re:").strip("*/").lower()
    close = [k for k in known if plain and plain in k.lower()][:count]
    close += difflib.get_close_matches(name, [k for k in known if k not in close], count, 0.3)
    return ", ".join(f"`{k}`" for k in (close or known)[:count]) or "(none)"
