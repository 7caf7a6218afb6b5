# SPDX-License-Identifier: Apache-2.0
"""`stablehlo`: a function and its parameters as a directory that runs without the model's code.

    manifest.json          sealed; what follows, with checksums
    program.bin            the function, serialized by jax.export (StableHLO, versioned)
    sites.bin              the function again, returning the result of every site: for `verify`
    model.safetensors      the parameters, packed, as the inputs of both
    reference.safetensors  example inputs and what the function made of them: for `verify`

References: https://openxla.org/stablehlo/compatibility; https://docs.jax.dev/en/latest/export.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export as jax_export

from .._core.qtensor import nbytes
from .._errors import ArtifactError
from .._files.safetensors import read_header
from .._files.sealed import seal
from .._files.whole import new_folder
from ._artifact import (
    MANIFEST,
    MODEL,
    PROGRAM,
    REFERENCE,
    SCHEMA_VERSION,
    SITES,
    Artifact,
    check_replaceable,
    load,
)
from ._packing import Packing
from ._params import save_params
from ._program import Program, flat
from ._signature import Signature

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_BATCH = "batch"


def stablehlo(
    fn: Callable,
    params: Any,
    *example_inputs: Any,
    path: str | os.PathLike[str],
    platforms: Sequence[str] = PLATFORMS,
    symbolic_batch: bool = False,
    sites: bool = True,
    reference_bytes: int = 64 * 2**20,
) -> Artifact:
    """Exports `fn(params, *inputs)` for several platforms, none of which has to be at hand.

    Args:
      fn: a pure function that JAX can trace, compressed or not.
      params: its parameters, with QTensors or without. Those of `jc.quantize_aware` are packed
        here as its recipe says.
      example_inputs: the other arguments; arrays, or `jax.ShapeDtypeStruct`s. Flags and other
        values that are no arrays become part of the program.
      path: of the directory to write; replaced only if it is an earlier artifact.
      platforms: of "cpu", "cuda", "rocm" and "tpu".
      symbolic_batch: let the program take any size in place of the leading one of the inputs,
        which have to agree in it. Shapes of `jax.export.symbolic_shape` are taken as they are.
      sites: write the program that `verify` compares site by site.
      reference_bytes: with arrays as inputs, what `fn` makes of them is written down too, if it
        takes no more than this.

    Returns:
      The artifact, as `load(path)` gives it.

    Raises:
      ArtifactError: JAX cannot lower or serialize the function for a platform, or the directory
        cannot be written; what was there before is as it was.

    Example:
      >>> import tempfile, jax.numpy as jnp, jaxcompress as jc
      >>> fn = jc.quantize_aware(lambda p, x: x @ p["w"], "w8a8")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     artifact = stablehlo(fn, {"w": jnp.eye(4)}, jnp.ones((1, 4)), path=folder + "/a")
      ...     artifact.run(jnp.ones((1, 4)))
      Array([[1., 1., 1., 1.]], dtype=float32)
    """
    path = pathlib.Path(path)
    wrong = sorted(set(platforms) - set(PLATFORMS)) or (not platforms and ["(none)"])
    if isinstance(platforms, str) or wrong:
        raise ArtifactError(f"platforms={platforms!r}: expected some of {', '.join(PLATFORMS)}.")
    check_replaceable(path)
    given = Program(fn, params, example_inputs)
    packing = Packing(fn)
    program = given
    if packing.recipe is not None:
        program = Program(fn, packing.pack(params, example_inputs), example_inputs)
    inputs = with_symbolic_batch(program.inputs) if symbolic_batch else program.inputs
    inputs = avals(inputs)
    exported, data, out = _export(program.run, program, inputs, platforms)
    names = program.sites() if sites else []
    files = {PROGRAM: data}
    if names:
        files[SITES] = _export(program.run_sites, program, inputs, platforms)[1]
    rows = packing.rows(program.named, params, example_inputs)
    manifest = {
        "jax": jax.__version__,
        "calling_convention": exported.calling_convention_version,
        "platforms": list(platforms),
        "recipe": None if packing.recipe is None else json.loads(packing.recipe.to_json()),
        "inputs": Signature.of(program.inputs_with(inputs)).to_data(),
        "outputs": Signature.of(out).to_data(),
        "sites": names,
        "report": [dataclasses.asdict(row) for row in rows],
        "name": getattr(fn, "__name__", type(fn).__name__),
    }
    try:
        with new_folder(path, "Choose another path.") as folder:
            for name, data in files.items():
                (folder / name).write_bytes(data)
            save_params(program.named, folder / MODEL)
            reference = reference_values(given, program if names else None, reference_bytes)
            if reference is not None:
                save_params(reference, folder / REFERENCE)
            manifest["files"] = {
                p.name: _checksum(p, files.get(p.name)) for p in sorted(folder.iterdir())
            }
            about = {"schema_version": str(SCHEMA_VERSION)}
            (folder / MANIFEST).write_bytes(seal("stablehlo", about, manifest))
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be written: {error.strerror or error}. Nothing was changed there."
        ) from error
    return load(path)


def _export(
    run: Callable, program: Program, inputs: Sequence, platforms: Sequence[str]
) -> tuple[Any, bytes, Any]:
    """(what jax.export makes of a function, that serialized, what the function returns)."""
    arrays_of, kept = flat(run)
    compiled, args = jax.jit(arrays_of), (avals(program.leaves), list(inputs))
    jax.eval_shape(compiled, *args)  # what fails here is the function's own
    try:
        exported = jax_export.export(compiled, platforms=tuple(platforms))(*args)
        data = exported.serialize()
    except (NotImplementedError, KeyError, ValueError) as error:
        raise ArtifactError(
            f"JAX {jax.__version__} cannot export this function for {', '.join(platforms)}: "
            f"{type(error).__name__}: {error}. Leave a platform out with platforms=, or the "
            "operation or dtype that is named."
        ) from error
    return exported, bytes(data), kept[0].merge(avals(exported.out_avals))


def avals(arrays: Sequence) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]


def with_symbolic_batch(inputs: Sequence) -> list[jax.ShapeDtypeStruct]:
    """The same shapes with a symbol in place of the leading size.

    Raises:
      ArtifactError: the inputs have no leading size in common.
    """
    shapes = avals(inputs)
    sizes = {x.shape[0] for x in shapes if x.shape}
    if len(sizes) != 1:
        raise ArtifactError(
            f"symbolic_batch=True: the leading sizes of the inputs are {sorted(map(str, sizes))}, "
            "expected one. Give jax.ShapeDtypeStructs with jax.export.symbolic_shape instead."
        )
    (size,) = jax_export.symbolic_shape(_BATCH)
    return [jax.ShapeDtypeStruct((size, *x.shape[1:]) if x.shape else (), x.dtype) for x in shapes]


def reference_values(given: Program, packed: Program | None, limit: int) -> dict[str, Any] | None:
    """Inputs, outputs of the function itself, results of sites; None without inputs.

    Those of sites are of the function on packed parameters: with the result of a site kept, XLA
    may sum it in another order where the weight is computed from floats.
    """
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in (*given.inputs, *given.leaves)):
        return None
    outputs = jax.jit(flat(given.run)[0])(given.leaves, given.inputs)
    found: dict[str, Any] = {"inputs": given.inputs, "outputs": outputs}
    if nbytes(found) > limit:
        return None
    if packed is not None:
        seen = jax.jit(packed.run_sites)(packed.leaves, packed.inputs)
        found |= {"sites": seen} if nbytes((found, seen)) <= limit else {}
    return found


def _checksum(path: pathlib.Path, data: bytes | None) -> str:
    """SHA-256 of a file; of a safetensors file that of its header, which covers its arrays."""
    return read_header(path).digest if data is None else hashlib.sha256(data).hexdigest()
