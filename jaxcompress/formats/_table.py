# SPDX-License-Identifier: Apache-2.0
"""The table of named formats, the table of makers, and the look-up in them."""

import difflib
import types
from typing import Any

from .._errors import FormatError
from . import _minifloat, _mx
from ._base import Format
from ._bfloat16 import bfloat16
from ._codebook import codebook, nf4
from ._e8m0 import float8_e8m0fnu
from ._fixed import fixed_point
from ._integer import integer
from ._nvfp4 import nvfp4, nvfp4_four_over_six
from ._ternary import binary, ternary, ternary_base3

TABLE = types.MappingProxyType(
    {
        fmt.name: fmt
        for fmt in (
            *(integer(bits) for bits in range(1, 9)),
            *(integer(bits, narrow=False) for bits in range(3, 9)),
            *(integer(bits, signed=False) for bits in range(1, 9)),
            ternary,
            ternary_base3,
            binary,
            *_minifloat.NAMED.values(),
            bfloat16,
            float8_e8m0fnu,
            nf4,
            *(
                _mx.mx(element, scale_rule=rule)
                for rule in ("floor", "round", "ceil")
                for element in ("e4m3", "e5m2", "e2m3", "e3m2", "e2m1", "int8")
            ),
            nvfp4,
            nvfp4_four_over_six,
        )
    }
)
MAKERS = types.MappingProxyType(
    {
        "fixed_point": fixed_point,
        "minifloat": _minifloat.minifloat,
        "mx": _mx.mx,
        "codebook": codebook,
    }
)


def get(name: str | Format | dict[str, Any]) -> Format:
    """Returns the format of that name; a format is returned as it is.

    Args:
        name: a name of `TABLE`, a format, or what `to_data` returns.

    Raises:
        FormatError: if there is none; lists the nearest names and all of them.

    Example:
        >>> import jaxcompress as jc
        >>> jc.formats.get("int4").max
        7.0
    """
    if isinstance(name, Format):
        return name
    if isinstance(name, dict):
        settings = dict(name)
        maker = settings.pop("maker", None)
        if maker not in MAKERS:
            raise FormatError(f"There is no maker {maker!r}. Available: {', '.join(MAKERS)}.")
        return MAKERS[maker](**settings)
    if name in TABLE:
        return TABLE[name]
    nearest = difflib.get_close_matches(str(name), TABLE, n=3)
    hint = f" Did you mean {', '.join(nearest)}?" if nearest else ""
    raise FormatError(f"There is no format {name!r}.{hint} Available: {', '.join(TABLE)}.")


def to_data(fmt: Format) -> str | dict[str, Any]:
    """Returns a format as plain data, for JSON; `get` is the inverse.

    Raises:
        FormatError: if the format is neither in the table nor made by a maker.

    Example:
        >>> import jaxcompress as jc
        >>> jc.formats.to_data(jc.formats.mxfp4)
        'mxfp4'
    """
    if TABLE.get(fmt.name) == fmt:
        return fmt.name
    data = fmt.settings()
    if data is None:
        raise FormatError(f"{fmt.name} is not in the table of formats, so it has no plain data.")
    return data
