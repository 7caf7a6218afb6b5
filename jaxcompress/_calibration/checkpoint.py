# SPDX-License-Identifier: Apache-2.0
"""Finished parts of a long calculation in a directory, so that it goes on where it was interrupted.

Each part is one file that is there whole or not at all. A fingerprint of what is calculated says
whether the files are of this calculation.
"""

from __future__ import annotations

import os
import pathlib
import secrets
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from .._errors import ArtifactError


class Checkpoint:
    """Parts by number in a directory; with no directory nothing is kept.

    Args:
      folder: the directory, which is made if need be.
      key: text and arrays that decide what is calculated.

    Raises:
      ArtifactError: the directory cannot be made, or holds parts of another calculation.
    """

    def __init__(self, folder: str | os.PathLike | None, key: Iterable[Any]):
        self.folder = None if folder is None else pathlib.Path(folder)
        self.fingerprint = 0
        if self.folder is None:
            return
        for x in key:
            data = x.encode() if isinstance(x, str) else np.asarray(x).tobytes()
            self.fingerprint = zlib.crc32(data, self.fingerprint)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"checkpoint_dir={str(folder)!r} cannot be made: {error.strerror}."
            ) from None

    def load(self, number: int, like: Sequence[Any]) -> list[Any] | None:
        """The arrays of a part, or None if it is not there.

        Args:
          number: of the part.
          like: pytrees of shapes and dtypes of its arrays.
        """
        path = self._path(number)
        if path is None or not path.is_file():
            return None
        leaves, tree = jax.tree.flatten(list(like))
        try:
            with np.load(path, allow_pickle=False) as file:
                known = int(file["fingerprint"])
                data = [file[f"part{i}"] for i in range(len(leaves))]
            arrays = [
                np.frombuffer(x.tobytes(), leaf.dtype).reshape(leaf.shape)
                for x, leaf in zip(data, leaves, strict=True)
            ]
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ArtifactError(f"{path} is damaged: {error}. Delete it to go on.") from None
        if known != self.fingerprint:
            raise ArtifactError(
                f"{path} is of another calculation: other parameters, recipe, method or settings. "
                "Choose another checkpoint_dir, or delete this one."
            )
        return jax.tree.unflatten(tree, [jax.numpy.asarray(x) for x in arrays])

    def save(self, number: int, parts: Sequence[Any]) -> None:
        """Keeps the arrays of a part."""
        path = self._path(number)
        if path is None:
            return
        leaves = [np.frombuffer(np.asarray(x).tobytes(), np.uint8) for x in jax.tree.leaves(parts)]
        temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        try:
            with open(temporary, "xb") as file:
                named: dict[str, Any] = {f"part{i}": x for i, x in enumerate(leaves)}
                np.savez(file, fingerprint=np.int64(self.fingerprint), **named)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise ArtifactError(f"{path} cannot be written: {error.strerror}.") from None
        finally:
            temporary.unlink(missing_ok=True)

    def _path(self, number: int) -> pathlib.Path | None:
        return None if self.folder is None else self.folder / f"block_{number:04d}.npz"
