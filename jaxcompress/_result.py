# SPDX-License-Identifier: Apache-2.0
"""Result directories: written whole or not at all, read back, never mistaken for other files.

A directory holds `report.json`, `parameters.npz` (everything that the compressed model has to
store) and `float_parameters.npz`. The `.npz` files open with `numpy.load(path)` and need no pickle:
an array is called by its key path, a quantized weight `w` is `w:packed`, `w:scale` and, if it has
zero points, `w:packed_zero_point`. The member `metadata.json` says what each stands for; dtypes
that NumPy does not know (bfloat16, float8) are stored as unsigned integers of the same width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._core.qtensor import QTensor
from ._errors import ArtifactError

SCHEMA_VERSION = 1
REPORT, PARAMETERS, FLOAT_PARAMETERS = "report.json", "parameters.npz", "float_parameters.npz"


@contextlib.contextmanager
def new_result(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory to fill, which takes the place of `out` when the block ends without an error.

    Raises:
      ArtifactError: `out` cannot be written, or holds something that is not an earlier result.
    """
    out = out.resolve()
    _check_replaceable(out)
    folder = out.with_name(f".{out.name}-{secrets.token_hex(4)}")
    parent_is_new = not out.parent.exists()
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ArtifactError(
            f"The result cannot be written to {out}: {error.strerror} ({error.filename}). Choose "
            "a directory that can be written with --out."
        ) from None
    try:
        yield folder
        for path in (*folder.iterdir(), folder):
            _sync(path)
        _put_in_place(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone already if all went well
        if parent_is_new:
            with contextlib.suppress(OSError):  # not empty: the result is there
                out.parent.rmdir()


def write_report(folder: pathlib.Path, report: Mapping[str, Any]) -> None:
    """Writes `report.json`; numbers that are not finite become null, as JSON has none."""
    data = {"tool": "jaxcompress", "schema_version": SCHEMA_VERSION, **_finite(report)}
    text = json.dumps(data, indent=2, allow_nan=False)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")


def read_report(folder: pathlib.Path) -> dict[str, Any]:
    """The report of a result directory.

    Raises:
      ArtifactError: there is none, it is damaged, or of another version.
    """
    path = folder / REPORT
    if not path.is_file():
        raise ArtifactError(
            f"{folder} is not a result of `jaxcompress compress`: it has no {REPORT}."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}.") from None
    if not isinstance(data, dict) or data.get("tool") != "jaxcompress":
        raise ArtifactError(f"{path} was not written by jaxcompress.")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema version {data.get('schema_version')}, this jaxcompress reads "
            f"version {SCHEMA_VERSION}. Compress again, or use the version that wrote it."
        )
    return data


def write_arrays(path: pathlib.Path, tensors: Mapping[str, Any]) -> None:
    """Writes arrays and QTensors by name as `.npz`; equal contents give equal files."""
    metadata = {}
    with zipfile.ZipFile(path, "w") as archive:
        for name, tensor in tensors.items():
            arrays = {}
            for key, leaf in jax.tree_util.tree_flatten_with_path(tensor)[0]:
                member = name + "".join(f":{k.name}" for k in key)
                array, dtype = _storable(leaf)
                arrays[member] = dtype
                with archive.open(zipfile.ZipInfo(f"{member}.npy"), "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
            metadata[name] = {"arrays": arrays, **_meaning(tensor)}
        text = json.dumps({"schema_version": SCHEMA_VERSION, "tensors": metadata}, indent=1)
        archive.writestr(zipfile.ZipInfo("metadata.json"), text)


def _meaning(tensor: Any) -> dict[str, Any]:
    if not isinstance(tensor, QTensor):
        return {}
    blocks = tensor.blocks
    return {
        "format": tensor.format.name,
        "dtype": str(tensor.dtype),
        "shape": tensor.shape,
        "blocks": None if blocks is None else dataclasses.asdict(blocks),
    }


def _storable(leaf: Any) -> tuple[np.ndarray, str]:
    """The array in a dtype that `.npy` files know, and the name of its own."""
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(leaf)), str(leaf.dtype)
    array = np.asarray(leaf)
    if array.dtype.isbuiltin != 1:  # of ml_dtypes
        return array.view(f"u{array.dtype.itemsize}"), str(array.dtype)
    return array, str(array.dtype)


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not np.isfinite(data) else data


def _check_replaceable(out: pathlib.Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ArtifactError(f"{out} is a file and the result a directory. Choose another --out.")
    names = {path.name for path in out.iterdir()}
    foreign = sorted(names - {REPORT, PARAMETERS, FLOAT_PARAMETERS})
    if names and (foreign or REPORT not in names):
        raise ArtifactError(
            f"{out} exists and is not an earlier result: it holds {', '.join(sorted(names)[:3])}. "
            "Nothing was changed. Choose another --out, or remove it yourself."
        )
    if names:
        read_report(out)


def _put_in_place(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Renames `folder` to `out`; an earlier result stays until the new one is there."""
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
    _sync(out.parent)


def _sync(path: pathlib.Path) -> None:
    """Waits until a file, or the names in a directory, have reached the disk."""
    if path.is_dir() and os.name != "posix":  # elsewhere directories cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
