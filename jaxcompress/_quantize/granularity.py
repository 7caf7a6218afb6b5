# SPDX-License-Identifier: Apache-2.0
"""`Granularity`: which values of an array share one scale.

Always relative to the contracted axes of the operation that reads the array:

    tensor     all values
    channel    over the contracted axes: one scale per output channel of a weight
    token      the same, said of an activation: one scale per remaining index
    example    over all axes but the leading one
    group:n    n consecutive values along the contracted axes, flattened in the order given
    block:rxc  r values along the remaining axes, flattened, by c along the contracted ones
"""

import dataclasses

from .._errors import RecipeError

_KINDS = ("tensor", "channel", "token", "example", "group", "block")


@dataclasses.dataclass(frozen=True)
class Granularity:
    """How scales are shared: a kind and, for groups and blocks, how many values are in one.

    Attributes:
        kind: "tensor", "channel", "token", "example", "group" or "block".
        size: values in a group or block along the contracted axes, else None.
        rows: values in a block along the other axes, else None.

    Raises:
        RecipeError: if the kind is unknown, or a size does not go with it.
    """

    kind: str
    size: int | None = None
    rows: int | None = None

    def __post_init__(self):
        if self.kind not in _KINDS:
            raise RecipeError(
                f"There is no granularity {self.kind!r}. Available: "
                "'tensor', 'channel', 'token', 'example', 'group:N', 'block:RxC'."
            )
        for name, given, needed in (
            ("size", self.size, self.kind in ("group", "block")),
            ("rows", self.rows, self.kind == "block"),
        ):
            valid = isinstance(given, int) and given > 0
            if valid != needed or (given is not None and not valid):
                raise RecipeError(
                    f"Granularity {self.kind!r} got {name} {given!r}: a group has a size of at "
                    "least 1, as in 'group:32', a block has two, as in 'block:128x128', other "
                    "kinds have none."
                )

    def __str__(self) -> str:
        if self.rows is not None:
            return f"block:{self.rows}x{self.size}"
        return self.kind if self.size is None else f"{self.kind}:{self.size}"


def per_group(size: int) -> Granularity:
    """Returns the granularity of `size` consecutive values along the contracted axes.

    Example:
        >>> import jaxcompress as jc
        >>> str(jc.per_group(32))
        'group:32'
    """
    return Granularity("group", size)


def per_block(rows: int, columns: int) -> Granularity:
    """Returns the granularity of blocks of `rows` kept by `columns` contracted values.

    Example:
        >>> import jaxcompress as jc
        >>> str(jc.per_block(128, 128))
        'block:128x128'
    """
    return Granularity("block", columns, rows)


def get(name: str | Granularity) -> Granularity:
    """Returns the granularity of that name, the inverse of `str`; a granularity as it is.

    Raises:
        RecipeError: if there is none.

    Example:
        >>> from jaxcompress._quantize import granularity
        >>> granularity.get("group:32")
        Granularity(kind='group', size=32, rows=None)
    """
    if isinstance(name, Granularity):
        return name
    kind, colon, size = str(name).partition(":")
    if not colon:
        return Granularity(kind)
    number = lambda text: int(text) if text.isdecimal() else text  # noqa: E731
    if kind == "block":
        rows, _, columns = size.partition("x")
        return Granularity(kind, number(columns), number(rows))
    return Granularity(kind, number(size))
