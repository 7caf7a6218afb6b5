# SPDX-License-Identifier: Apache-2.0
"""JSON that carries its own SHA-256, so that it can be checked before it is parsed.

The text begins with `{"KEY":{"sha256":"` and 64 hexadecimal digits: the digest of the whole text
with zeros in their place. Readers that do not know this see one more string.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from .._errors import ArtifactError

_ZEROS = b"0" * 64
# An empty list takes 64 bytes in Python and 3 in JSON: a hostile text of this size stays well
# below a gigabyte.
LIMIT = 32 * 2**20


def seal(key: str, metadata: Mapping[str, str], rest: Mapping[str, Any], before: int = 0) -> bytes:
    """The sealed text of `{key: metadata, **rest}`.

    Blanks at the end make it and the `before` bytes in front of it a multiple of 64 bytes long.

    Raises:
      ArtifactError: it would be too large to be read again.
    """
    data = {key: {"sha256": "0" * 64, **metadata}, **rest}
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-(len(text) + before) % 64)
    if len(text) > LIMIT:
        raise ArtifactError(
            f"The description of this tree takes {len(text):,} bytes, at most {LIMIT:,} can be "
            "read again: it has too many leaves. Stack layers that are alike, or save parts."
        )
    start = len(_prefix(key))
    return text[:start] + hashlib.sha256(text).hexdigest().encode() + text[start + 64 :]


def check_seal(text: bytes, key: str, what: Any) -> bool:
    """Whether the text is sealed; `what` names it.

    Raises:
      ArtifactError: it is, and has been changed since.
    """
    prefix = _prefix(key)
    start = len(prefix)
    if not text.startswith(prefix):
        return False
    digest = hashlib.sha256(prefix + _ZEROS + text[start + 64 :]).hexdigest().encode()
    if digest != text[start : start + 64]:
        raise ArtifactError(
            f"{what} is damaged: its header does not have the checksum that it says. Get the "
            "file again, or save it again."
        )
    return True


def parse(text: bytes | str, what: Any) -> dict[str, Any]:
    """A JSON object, in which no key comes twice and every number is finite.

    Raises:
      ArtifactError: the text is something else; `what` names it.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key comes twice")
        return found

    def finite(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        data = json.loads(text, object_pairs_hook=once, parse_constant=finite)
    except RecursionError:
        raise ArtifactError(f"{what} is damaged: its JSON is nested too deeply.") from None
    except ValueError as error:
        raise ArtifactError(f"{what} is damaged: {error}.") from None
    if not isinstance(data, dict):
        raise ArtifactError(f"{what} is damaged: it holds no JSON object.")
    return data


def _prefix(key: str) -> bytes:
    return f'{{"{key}":{{"sha256":"'.encode()
