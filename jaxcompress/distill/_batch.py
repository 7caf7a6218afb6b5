# SPDX-License-Identifier: Apache-2.0
"""Where in a batch its parts are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._errors import JaxCompressError

Selector = Callable[[Any], Any] | int | str


def pick(batch: Any, selector: Selector | None) -> Any:
    """A part of a batch: by index, key or function; None without a selector.

    Raises:
      JaxCompressError: the batch has no such part.
    """
    if selector is None:
        return None
    if callable(selector):
        return selector(batch)
    try:
        return batch[selector]
    except (KeyError, IndexError, TypeError):
        parts = list(batch) if isinstance(batch, dict) else type(batch).__name__
        raise JaxCompressError(
            f"the batch has no part {selector!r}; it is: {parts}. hard_labels=, inputs= and "
            "mask= take an index, a key, or a function of the batch."
        ) from None
