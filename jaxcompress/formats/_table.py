# SPDX-License-Identifier: Apache-2.0
"""The table of named formats and the look-up in it."""

import difflib
import types

from .._errors import FormatError
from ._base import Format
from ._integer import integer
from ._minifloat import float8_e4m3fn, float8_e5m2

TABLE = types.MappingProxyType(
    {
        fmt.name: fmt
        for fmt in (
            *(integer(bits) for bits in range(2, 9)),
            *(integer(bits, narrow=False) for bits in range(3, 9)),
            *(integer(bits, signed=False) for bits in range(2, 9)),
            float8_e4m3fn,
            float8_e5m2,
        )
    }
)


def get(name: str | Format) -> Format:
    """Returns the format of that name; a format is returned as it is.

    Raises:
        FormatError: if there is none; lists the nearest names and all of them.

    Example:
        >>> import jaxcompress as jc
        >>> jc.formats.get("int4").max
        7.0
    """
    if isinstance(name, Format):
        return name
    if name in TABLE:
        return TABLE[name]
    nearest = difflib.get_close_matches(str(name), TABLE, n=3)
    hint = f" Did you mean {', '.join(nearest)}?" if nearest else ""
    raise FormatError(f"There is no format {name!r}.{hint} Available: {', '.join(TABLE)}.")
