# SPDX-License-Identifier: Apache-2.0
"""One safetensors file, or several and an index, as the Hugging Face Hub lays them out.

The index is `{"metadata": {...}, "weight_map": {array: file}}`, sealed like the headers; its
metadata have the digest of the header of every file, so that files of two saves do not mix.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from .._errors import ArtifactError
from . import safetensors
from .sealed import LIMIT, check_seal, parse, seal
from .whole import member, read_small

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
SCHEMA_VERSION = 1
READABLE = (1,)  # grows: artifacts of earlier versions stay readable


def write_file(file: BinaryIO, arrays: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Writes one file with everything."""
    safetensors.write(file, arrays, {"format": "pt", "jaxcompress": _text(about)})


def write_folder(
    folder: pathlib.Path, arrays: Mapping[str, Any], about: Mapping[str, Any], limit: int
) -> None:
    """Writes one file, or several and an index if the arrays take more bytes than `limit`."""
    parts: list[dict[str, Any]] = [{}]
    filled = total = 0
    for name, a in arrays.items():
        size = a.size * a.dtype.itemsize
        if filled + size > limit and parts[-1]:
            parts.append({})
            filled = 0
        parts[-1][name] = a
        filled, total = filled + size, total + size
    if len(parts) == 1:
        with open(folder / MODEL, "xb") as file:
            write_file(file, arrays, about)
        return
    weight_map, digests = {}, {}
    for i, part in enumerate(parts):
        name = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        with open(folder / name, "xb") as file:
            metadata = {"format": "pt", "jaxcompress": _text({"part": i + 1})}
            digests[name] = safetensors.write(file, part, metadata)
        weight_map |= dict.fromkeys(part, name)
    metadata = {"total_size": total, "jaxcompress": _text({**about, "files": digests})}
    (folder / INDEX).write_bytes(seal("metadata", metadata, {"weight_map": weight_map}))


def read(path: pathlib.Path, lazy: bool) -> tuple[dict[str, Any] | None, dict[str, np.ndarray]]:
    """What was written about a model, None if it was not by us, and its arrays.

    Args:
      path: of a file or a directory.
      lazy: as in `safetensors.read`.

    Raises:
      ArtifactError: as `load_params`.
    """
    if not path.is_dir():
        header = safetensors.read_header(path)
        return _about(header.metadata, header.checksums is not None, path), safetensors.read(
            header, lazy
        )
    if not (path / INDEX).exists():
        if not (path / MODEL).exists():
            raise ArtifactError(f"{path} has neither {MODEL} nor {INDEX}: there are no parameters.")
        return read(member(path, MODEL), lazy)
    what = member(path, INDEX)
    text = read_small(what, LIMIT)
    sealed = check_seal(text, "metadata", what)
    index = parse(text, what)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not isinstance(metadata, dict):
        raise ArtifactError(f"{what} is damaged: it has no weight_map or metadata.")
    about = _about(metadata, sealed, what)
    digests = {} if about is None else about.get("files")
    if not isinstance(digests, dict):
        raise ArtifactError(f"{what} is damaged: it has no checksums of files.")
    arrays: dict[str, np.ndarray] = {}
    for name in sorted(set(map(str, weight_map.values()))):
        header = safetensors.read_header(member(path, name))
        if about is not None and digests.get(name) != header.digest:
            raise ArtifactError(f"{path / name} is not the file that {INDEX} was written with.")
        expected = {array for array, file in weight_map.items() if file == name}
        if header.entries.keys() != expected:
            raise ArtifactError(f"{path / name} does not hold the arrays that {INDEX} says.")
        arrays |= safetensors.read(header, lazy)
    return about, arrays


def _text(about: Mapping[str, Any]) -> str:
    return json.dumps({"schema_version": SCHEMA_VERSION, **about}, separators=(",", ":"))


def _about(metadata: Mapping[str, Any], sealed: bool, what: pathlib.Path) -> dict[str, Any] | None:
    """Our own entry of the metadata, of a version that can be read; None without one."""
    text = metadata.get("jaxcompress")
    if text is None:
        return None
    if not sealed or not isinstance(text, str):
        raise ArtifactError(f"{what} is damaged: its header has lost its checksum.")
    about = parse(text, what)
    version = about.get("schema_version")
    if type(version) is not int or version not in READABLE:
        raise ArtifactError(
            f"{what} has schema version {version!r}, this jaxcompress reads "
            f"{', '.join(map(str, READABLE))}. Use the version that wrote it, or a newer one."
        )
    if "part" in about:
        raise ArtifactError(f"{what} is a part of a model: load the directory.")
    return about
