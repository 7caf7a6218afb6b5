# SPDX-License-Identifier: Apache-2.0
"""`Artifact`: what `stablehlo` wrote, read back and run."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.export as jax_export

from .._errors import ArtifactError
from .._files.safetensors import read_header
from .._files.sealed import LIMIT, check_seal, parse
from .._files.whole import member, read_small
from .._quantize.accounting import Row
from .._quantize.recipe import Recipe
from .._quantize.report import Report
from ._params import load_params
from ._signature import Signature

MANIFEST, PROGRAM, SITES = "manifest.json", "program.bin", "sites.bin"
MODEL, REFERENCE = "model.safetensors", "reference.safetensors"
FILES = (MANIFEST, PROGRAM, SITES, MODEL, REFERENCE)
SCHEMA_VERSION = 1
READABLE = ("1",)  # grows: artifacts of earlier versions stay readable
_LARGEST_PROGRAM = 2**30
_ROW: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "tuple[int, ...]": (tuple,),
    "str | None": (str, type(None)),
    "float | None": (float, type(None)),
}


class Artifact:
    """A compressed function on disk.

    Attributes:
      path: the directory.
      manifest: what it says of itself: platforms, version of JAX, recipe, inputs, outputs.
      inputs, outputs: what the program takes and returns.
      platforms: for which it was exported.
      sites: names of the sites that `run_sites` returns, in program order.
      report: every parameter with its format, its bytes, and why if it is left alone.
    """

    def __init__(self, path: pathlib.Path, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest
        self._programs: dict[str, Callable[..., list[jax.Array]]] = {}
        try:
            self.inputs = Signature.from_data(manifest["inputs"])
            self.outputs = Signature.from_data(manifest["outputs"])
            self.platforms = _texts(manifest["platforms"])
            self.sites = _texts(manifest["sites"])
            self.files = dict(zip(manifest["files"], _texts(manifest["files"].values())))
            rows = tuple(map(_row, manifest["report"]))
            recipe = manifest["recipe"]
            name = "none" if recipe is None else Recipe.from_json(json.dumps(recipe)).name
            (title,) = _texts([manifest["name"]])
            self.report = Report(title, name, rows)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path / MANIFEST} is damaged: {error!r}.") from None

    @property
    def nbytes(self) -> int:
        """Bytes of all files that `run` needs."""
        return sum((self.path / name).stat().st_size for name in (MANIFEST, PROGRAM, MODEL))

    def run(self, *inputs: Any) -> Any:
        """Runs the program on this machine.

        Args:
          inputs: as the example inputs of the export were: structure, shapes, dtypes.

        Returns:
          What the function returned, with dict, list and tuple as they were; other nodes are
          dicts by their keys.

        Raises:
          ArtifactError: other inputs, a damaged file, or a platform that it was not exported for.
        """
        return self.outputs.rebuild(self.run_arrays(*inputs))

    def run_arrays(self, *inputs: Any) -> list[jax.Array]:
        """The arrays of what `run` returns."""
        return self._call(PROGRAM)(self.leaves, self.inputs.flatten(inputs))

    def run_sites(self, *inputs: Any) -> dict[str, jax.Array]:
        """The result of every site, by name, in program order."""
        if not self.sites:
            return {}
        arrays = self.inputs.flatten(inputs)
        found = dict(zip(sorted(self.sites), self._call(SITES)(self.leaves, arrays), strict=True))
        return {name: found[name] for name in self.sites}

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """The parameters by key path, packed."""
        return load_params(self._checked(MODEL))

    @functools.cached_property
    def leaves(self) -> list[jax.Array]:
        """The arrays of the parameters, in the order in which the program takes them."""
        return jax.tree.leaves(self.params)

    @functools.cached_property
    def reference(self) -> dict[str, Any] | None:
        """Inputs of the export, and what the function made of them; None if there are none."""
        return load_params(self._checked(REFERENCE)) if REFERENCE in self.files else None

    def _call(self, name: str) -> Callable[..., list[jax.Array]]:
        """The program in a file, compiled at its first call."""
        if name not in self._programs:
            self._programs[name] = self._load(name)
        return self._programs[name]

    def _load(self, name: str) -> Callable[..., list[jax.Array]]:
        if jax.default_backend() not in _aliases(self.platforms):
            raise ArtifactError(
                f"{self.path} was exported for {', '.join(self.platforms)}, and this process runs "
                f"on {jax.default_backend()}. Export it with this platform among platforms=."
            )
        data = self._program(name)
        try:
            exported = jax_export.deserialize(bytearray(data))
        except Exception as error:
            raise ArtifactError(
                f"{self.path / name} cannot be read by JAX {jax.__version__}; it was written with "
                f"{self.manifest.get('jax')}: {type(error).__name__}: {error}."
            ) from error
        self._check_fits(name, exported)
        return jax.jit(exported.call)

    def _check_fits(self, name: str, exported: Any) -> None:
        """Raises ArtifactError: the program takes or returns something else than is said of it."""
        spelled = [([str(d) for d in x.shape], str(x.dtype)) for x in exported.in_avals]
        stored = [([str(d) for d in x.shape], str(x.dtype)) for x in self.leaves]
        taken = [([str(d) for d in shape], dtype) for _, shape, dtype in self.inputs.arrays]
        count = len(self.outputs.arrays if name == PROGRAM else self.sites)
        if spelled != [*stored, *taken] or len(exported.out_avals) != count:
            raise ArtifactError(
                f"{self.path / name} is not the program that {MANIFEST} and {MODEL} describe."
            )

    def _checked(self, name: str) -> pathlib.Path:
        """The path of a file of arrays that is as the manifest says; raises ArtifactError."""
        path = member(self.path, name)
        self._same(path, name, read_header(path).digest)
        return path

    def _program(self, name: str) -> bytes:
        """The bytes of a program that is as the manifest says; raises ArtifactError."""
        path = member(self.path, name)
        data = read_small(path, _LARGEST_PROGRAM)
        self._same(path, name, hashlib.sha256(data).hexdigest())
        return data

    def _same(self, path: pathlib.Path, name: str, digest: str) -> None:
        if digest != self.files.get(name):
            raise ArtifactError(
                f"{path} is damaged: it does not have the checksum that {MANIFEST} says. Get the "
                "artifact again, or export it again."
            )

    def __repr__(self) -> str:
        return (
            f"Artifact({str(self.path)!r}, {self.nbytes:,} bytes, {', '.join(self.platforms)}, "
            f"{self.inputs} -> {self.outputs})"
        )


def _texts(items: Any) -> tuple[str, ...]:
    """The items, which have to be different texts."""
    items = tuple(items)
    if len({item for item in items if isinstance(item, str)}) < len(items):
        raise TypeError(f"expected different texts, found {items!r}")
    return items


def _row(data: Any) -> Row:
    """A row of the report, whose fields have the types that they should have."""
    row = Row(**{**data, "shape": tuple(data["shape"])})
    for field in dataclasses.fields(Row):
        value, kinds = getattr(row, field.name), _ROW[str(field.type)]
        if type(value) not in kinds:
            raise TypeError(f"{field.name} of a row is {value!r}")
    if not all(type(n) is int for n in row.shape):
        raise TypeError(f"the shape of a row is {row.shape!r}")
    return row


def load(path: str | os.PathLike[str]) -> Any:
    """Reads what `stablehlo` or `onnx` wrote: an `Artifact`, or of a file `.onnx` an `OnnxModel`.

    The model's code is not needed, and nothing is executed yet.

    Raises:
      ArtifactError: it is missing, damaged, of another version, or something else.

    Example:
      >>> load("somewhere")  # doctest: +IGNORE_EXCEPTION_DETAIL
      Traceback (most recent call last):
      ArtifactError: somewhere is no artifact: it has no manifest.json.
    """
    path = pathlib.Path(path)
    if path.suffix == ".onnx":
        need("onnx", "onnx")
        from ._onnx.model import read  # an extra

        return read(path)
    if not (path / MANIFEST).is_file():
        raise ArtifactError(f"{path} is no artifact: it has no {MANIFEST}.")
    what = member(path, MANIFEST)
    text = read_small(what, LIMIT)
    if not check_seal(text, "stablehlo", what):
        raise ArtifactError(f"{what} is damaged, or not of an artifact of jaxcompress.")
    data = parse(text, what)
    version = data["stablehlo"].get("schema_version")
    if version not in READABLE:
        raise ArtifactError(
            f"{what} has schema version {version}, this jaxcompress reads {', '.join(READABLE)}. "
            "Use the version that wrote it, or a newer one."
        )
    artifact = Artifact(path, data)
    for name in artifact.files:
        if name not in FILES or name == MANIFEST:
            raise ArtifactError(f"{what} is damaged: it names the file {json.dumps(name)}.")
        (artifact._program if name in (PROGRAM, SITES) else artifact._checked)(name)
    return artifact


def need(package: str, extra: str) -> None:
    """Raises ArtifactError: an optional package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ArtifactError(
            f"{package} is needed, which is not installed: pip install 'jaxcompress[{extra}]'."
        )


def check_replaceable(path: pathlib.Path) -> None:
    """Raises: there is something at `path` that is no earlier artifact."""
    if not path.exists():
        return
    names = {p.name for p in path.iterdir()} if path.is_dir() else {path.name}
    if names and (MANIFEST not in names or names - set(FILES)):
        raise ArtifactError(
            f"{path} exists and is no earlier artifact: it holds {', '.join(sorted(names)[:3])}. "
            "Nothing was changed. Choose another path, or remove it yourself."
        )


def _aliases(platforms: tuple[str, ...]) -> set[str]:
    return {*platforms, *(("gpu",) if {"cuda", "rocm"} & set(platforms) else ())}
