# SPDX-License-Identifier: Apache-2.0
"""What compression without training returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Compressed(NamedTuple):
    """A compressed function.

    Attributes:
      fn: `fn(params, *inputs)`, pure; it can be jitted, mapped, differentiated in its inputs and
        exported.
      params: everything that it needs, packed: `QTensor`s where weights were, and stored ranges.
      report: what became of every site and parameter; prints as a table.
    """

    fn: Callable[..., Any]
    params: Any
    report: Any
