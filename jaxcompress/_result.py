# SPDX-License-Identifier: Apache-2.0
"""Result directories: written whole or not at all, read back, never mistaken for other files.

A directory holds `report.json`, the same as a page, `report.html`, `model.safetensors` (everything
that the compressed model has to store) and `float_model.safetensors`, both for `jc.load_params`;
and `stablehlo`, the program, if it was asked for.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ._errors import ArtifactError
from ._files.sealed import LIMIT, parse
from ._files.whole import new_folder, read_small

SCHEMA_VERSION = 1
REPORT, PARAMETERS, FLOAT_PARAMETERS = (
    "report.json",
    "model.safetensors",
    "float_model.safetensors",
)
PAGE = "report.html"
STABLEHLO, ONNX, QONNX = EXPORTS = ("stablehlo", "onnx", "qonnx")
_EARLIER = ("parameters.npz", "float_parameters.npz")  # names that results once had


@contextlib.contextmanager
def new_result(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory to fill, which takes the place of `out` when the block ends without an error.

    Raises:
      ArtifactError: `out` cannot be written, or holds something that is not an earlier result.
    """
    _check_replaceable(out)
    with new_folder(out, "Choose a directory that can be written with --out.") as folder:
        yield folder


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
    data = parse(read_small(path, LIMIT), path)
    if data.get("tool") != "jaxcompress":
        raise ArtifactError(f"{path} was not written by jaxcompress.")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema version {data.get('schema_version')!r}, this jaxcompress reads "
            f"version {SCHEMA_VERSION}. Compress again, or use the version that wrote it."
        )
    return data


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
    foreign = sorted(names - {REPORT, PAGE, PARAMETERS, FLOAT_PARAMETERS, *EXPORTS, *_EARLIER})
    if names and (foreign or REPORT not in names):
        raise ArtifactError(
            f"{out} exists and is not an earlier result: it holds {', '.join(sorted(names)[:3])}. "
            "Nothing was changed. Choose another --out, or remove it yourself."
        )
    if names:
        read_report(out)
