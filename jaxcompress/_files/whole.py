# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, and reading that trusts nothing it is told."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import shutil
import stat
from collections.abc import Iterator
from typing import BinaryIO

from .._errors import ArtifactError


@contextlib.contextmanager
def new_file(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file to fill, which takes the place of `path` when the block ends without an error.

    Raises:
      ArtifactError: it cannot be written; `path` is as it was.
    """
    if path.exists() and not path.is_file():
        raise ArtifactError(f"{path} exists and is not a file. Choose another path.")
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be written: {error.strerror or error}. Nothing was changed there."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # gone already if all went well
            temporary.unlink()


@contextlib.contextmanager
def new_folder(out: pathlib.Path, advice: str) -> Iterator[pathlib.Path]:
    """A directory to fill, which takes the place of `out` when the block ends without an error.

    What `out` holds is lost then: the caller has to make sure that it may be.

    Raises:
      ArtifactError: it cannot be made; ends with the advice.
      OSError: the disk is full, or it cannot be put in place; `out` is as it was.
    """
    out = out.resolve()
    folder = out.with_name(f".{out.name}-{secrets.token_hex(4)}")
    parent_is_new = not out.parent.exists()
    try:
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise ArtifactError(
                f"{out} cannot be written: {error.strerror} ({error.filename}). {advice}"
            ) from None
        yield folder
        for path in (*folder.iterdir(), folder):
            sync(path)
        _put_in_place(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone already if all went well
        if parent_is_new:
            with contextlib.suppress(OSError):  # not empty: the result is there
                out.parent.rmdir()


def _put_in_place(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Renames `folder` to `out`; what was there stays until the new one is there."""
    if not out.exists():
        folder.rename(out)
    else:
        earlier = folder.with_name(f"{folder.name}-earlier")
        out.rename(earlier)
        try:
            folder.rename(out)
        except OSError:
            earlier.rename(out)
            raise
        shutil.rmtree(earlier)
    sync(out.parent)


def sync(path: pathlib.Path) -> None:
    """Waits until a file, or the names in a directory, have reached the disk."""
    if path.is_dir() and os.name != "posix":  # elsewhere directories cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A regular file, open for unbuffered reading.

    Raises:
      ArtifactError: there is none, it is a device or a pipe, or the disk fails while reading.
    """
    try:
        # A pipe that nobody writes to must not make us wait.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ArtifactError(f"{path} is not a regular file.")
            yield file
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_small(path: pathlib.Path, limit: int) -> bytes:
    """All bytes of a file that has to be small.

    Raises:
      ArtifactError: it cannot be read, or has more than `limit` bytes.
    """
    with reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ArtifactError(f"{path} has {size:,} bytes, at most {limit:,} are expected.")
        return read_exactly(file, bytearray(size), path)


def read_exactly(file: BinaryIO, buffer: bytearray | memoryview, path: pathlib.Path) -> bytes:
    """Fills the buffer from a file and returns it.

    Raises:
      ArtifactError: the file ends before.
    """
    view, done = memoryview(buffer), 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise ArtifactError(f"{path} is cut short: it ends {len(view) - done:,} bytes early.")
        done += count
    return buffer  # type: ignore[return-value]


def member(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The file of that name directly inside a directory.

    Raises:
      ArtifactError: the name leads elsewhere: it has separators, or is a link out of there.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or set(name) & set("/\\:\0"):
        raise ArtifactError(f"{folder} names a file {name!r}, which is no plain name of a file.")
    path = folder / name
    if os.path.realpath(path) != os.path.join(os.path.realpath(folder), name):
        raise ArtifactError(
            f"{path} is a link to somewhere else, which is not followed. Copy the file into the "
            "directory."
        )
    return path
