# SPDX-License-Identifier: Apache-2.0
"""Safetensors files: the length of a header in 8 bytes, the header in JSON, the bytes of arrays.

    {"__metadata__": {name: text}, name: {"dtype": ..., "shape": ..., "data_offsets": [a, b]}}

Every reader of the format reads them. Beyond it the header is sealed (`sealed.py`) and its
metadata have, under `"xxh3_128"`, the hash of that name of each array, so that headers are checked
before they are parsed and arrays before they are used. SHA-256 and CRC-32 would take a large part
of the time that writing does. The header is filled up with blanks so that data begin at a multiple
of 64 bytes.

References: https://huggingface.co/docs/safetensors, "Format"; the header may have no holes and no
bytes behind the data, and comes with a limit of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import mmap
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import xxhash

from .._errors import ArtifactError
from .sealed import LIMIT, check_seal, parse, seal
from .whole import read_exactly, reading

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_CHUNK = 2**20


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where an array lies: dtype, shape, first byte and first byte behind it."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
      path: the file.
      entries: its arrays by name; offsets are those in the file.
      metadata: its texts by name.
      checksums: XXH3 of the arrays by name, in hexadecimal; None in a file that is not sealed.
      digest: SHA-256 of the header itself.
    """

    path: pathlib.Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    checksums: dict[str, str] | None
    digest: str


def write(file: BinaryIO, arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """Writes a sealed file and returns the SHA-256 of its header.

    Args:
      file: open for writing, empty.
      arrays: by name, of dtypes in `NAMES`. Wide ones come first, so that all are aligned.
      metadata: texts by name, without "xxh3_128".
    """
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    rest, end = {}, 0
    for name in order:
        a = arrays[name]
        begin, end = end, end + math.prod(a.shape) * a.dtype.itemsize
        rest[name] = {
            "dtype": NAMES[np.dtype(a.dtype)],
            "shape": list(a.shape),
            "data_offsets": [begin, end],
        }

    def header(checksums: list[str]) -> bytes:
        texts = dict(metadata) | {"xxh3_128": json.dumps(dict(zip(order, checksums)))}
        return seal(_METADATA, texts, rest, before=8)

    length = len(header(["0" * 32] * len(order)))
    file.seek(8 + length)
    checksums = []
    for name in order:
        data = _bytes(arrays[name])
        checksum = xxhash.xxh3_128()
        for start in range(0, len(data), _CHUNK):  # read once: the second reader finds it cached
            checksum.update(data[start : start + _CHUNK])
            file.write(data[start : start + _CHUNK])
        checksums.append(checksum.hexdigest())
    text = header(checksums)
    file.seek(0)
    file.write(struct.pack("<Q", length) + text)
    return hashlib.sha256(text).hexdigest()


def read_header(path: pathlib.Path) -> Header:
    """Reads and checks what a file says of itself; no array is read.

    Raises:
      ArtifactError: the file is missing, damaged, or no safetensors file.
    """
    with reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise ArtifactError(f"{path} is no safetensors file: it has only {size} bytes.")
        (length,) = struct.unpack("<Q", read_exactly(file, bytearray(8), path))
        if length > min(LIMIT, size - 8):
            raise ArtifactError(
                f"{path} is damaged or no safetensors file: its header has {length:,} bytes, the "
                f"file {size:,}, and at most {LIMIT:,} are expected of a header."
            )
        text = bytes(read_exactly(file, bytearray(length), path))
    sealed = check_seal(text, _METADATA, path)
    data = parse(text, path)
    metadata = data.pop(_METADATA, {})
    texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not texts:
        raise ArtifactError(f"{path} is damaged: its metadata are not texts.")
    start = 8 + length
    entries = {name: _entry(name, entry, start, path) for name, entry in data.items()}
    end = start
    for name, entry in sorted(entries.items(), key=lambda e: (e[1].begin, e[1].end)):
        if entry.begin != end:
            raise ArtifactError(f"{path} is damaged: the bytes of {name!r} overlap or leave a gap.")
        end = entry.end
    if end != size:
        raise ArtifactError(
            f"{path} is damaged: it has {size:,} bytes, its header describes {end:,}."
        )
    checksums = None
    if sealed:
        checksums = parse(metadata.get("xxh3_128", ""), path)
        if checksums.keys() != entries.keys():
            raise ArtifactError(f"{path} is damaged: not every array has a checksum.")
    return Header(path, entries, metadata, checksums, hashlib.sha256(text).hexdigest())


def read(header: Header, lazy: bool = False) -> dict[str, np.ndarray]:
    """The arrays of a file.

    Args:
      header: of the file.
      lazy: map the file into memory: bytes are read from the disk when they are used, and not
        checked. The arrays are read-only, and the file must not be changed while they live.

    Raises:
      ArtifactError: an array does not have its checksum, or the file is not that of the header.
    """
    path = header.path
    with reading(path) as file:
        end = max((entry.end for entry in header.entries.values()), default=0)
        if os.fstat(file.fileno()).st_size < end:
            raise ArtifactError(f"{path} has been cut short since its header was read.")
        if lazy and end:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            whole = np.frombuffer(mapped, np.uint8)
            return {n: _view(whole[e.begin : e.end], e) for n, e in header.entries.items()}
        arrays = {}
        for name, entry in sorted(header.entries.items(), key=lambda e: e[1].begin):
            data = np.empty(entry.end - entry.begin, np.uint8)
            file.seek(entry.begin)
            read_exactly(file, data.data, path)
            if header.checksums is not None and _checksum(data.data) != header.checksums[name]:
                raise ArtifactError(
                    f"{path} is damaged: `{name}` does not have its checksum. Get the file again, "
                    "or save it again."
                )
            arrays[name] = _view(data, entry)
    return arrays


def _entry(name: str, entry: Any, start: int, path: pathlib.Path) -> Entry:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        known = DTYPES.get(dtype)
        if len(entry) != 3 or type(shape) is not list or not whole:
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise ArtifactError(f"{path} is damaged: the entry of {name!r} is wrong.") from None
    if known is None:
        raise ArtifactError(
            f"{path} holds `{name}` of dtype {dtype!r}, which is not read here. Known: "
            f"{', '.join(DTYPES)}."
        )
    # NumPy has no more axes than 64, and no sizes beyond 63 bits, be there zeros beside or not.
    if len(shape) > 32 or math.prod(max(n, 1) for n in shape) >= 2**60:
        raise ArtifactError(f"{path} is damaged: `{name}` has the shape {shape}.")
    if math.prod(shape) * known.itemsize != end - begin:
        raise ArtifactError(
            f"{path} is damaged: `{name}` has {end - begin:,} bytes, which is not what "
            f"{dtype} {shape} takes."
        )
    return Entry(known, tuple(shape), start + begin, start + end)


def _view(data: np.ndarray, entry: Entry) -> np.ndarray:
    return data.view(entry.dtype).reshape(entry.shape)


def _bytes(a: Any) -> memoryview:
    """The bytes of an array, without a copy where there need be none."""
    return np.ascontiguousarray(np.asarray(a)).reshape(-1).view(np.uint8).data


def _checksum(data: memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(data)
