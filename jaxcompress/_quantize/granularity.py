# SPDX-License-Identifier: Apache-2.0
"""`Granularity`: which values of an array share one scale.

Always relative to the contracted axes of the operation that reads the array:

    tensor     all values
    channel    over the contracted axes: one scale per output channel of a weight
    token      the same, said of an activation: one scale per remaining index
    example    over all axes but the leading one
    group:n    n consecutive values along the contracted axes, flattened in the order given
"""

import dataclasses

from .._errors import RecipeError

_KINDS = ("tensor", "channel", "token", "example", "group")


@dataclasses.dataclass(frozen=True)
class Granularity:
    """How scales are shared: a kind and, for groups, how many values are in one.

    Raises:
        RecipeError: if the kind is unknown, or the size does not go with it.
    """

    kind: str
    size: int | None = None

    def __post_init__(self):
        if self.kind not in _KINDS:
            raise RecipeError(
                f"There is no granularity {self.kind!r}. Available: "
                "'tensor', 'channel', 'token', 'example', 'group:N'."
            )
        sized = isinstance(self.size, int) and self.size > 0
        if sized != (self.kind == "group") or (self.size is not None and not sized):
            raise RecipeError(
                f"Granularity {self.kind!r} got size {self.size!r}: "
                "a group has a size of at least 1, as in 'group:32', other kinds have none."
            )

    def __str__(self) -> str:
        return self.kind if self.size is None else f"{self.kind}:{self.size}"


def per_group(size: int) -> Granularity:
    """Returns the granularity of `size` consecutive values along the contracted axes.

    Example:
        >>> import jaxcompress as jc
        >>> str(jc.per_group(32))
        'group:32'
    """
    return Granularity("group", size)


def get(name: str | Granularity) -> Granularity:
    """Returns the granularity of that name, the inverse of `str`; a granularity as it is.

    Raises:
        RecipeError: if there is none.

    Example:
        >>> from jaxcompress._quantize import granularity
        >>> granularity.get("group:32")
        Granularity(kind='group', size=32)
    """
    if isinstance(name, Granularity):
        return name
    kind, colon, size = str(name).partition(":")
    if not colon:
        return Granularity(kind)
    return Granularity(kind, int(size) if size.isdecimal() else size)  # type: ignore[arg-type]
