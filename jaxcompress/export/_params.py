# SPDX-License-Identifier: Apache-2.0
"""`save_params` and `load_params`: pytrees with QTensors in safetensors files.

A file, or a directory with `model.safetensors`, or with `model-00001-of-00003.safetensors`, ... and
`model.safetensors.index.json` as the Hugging Face Hub lays them out. The metadata of a file have,
under `"jaxcompress"`, the version of the schema and the tree as `_files/tree.py` writes it; where
there is an index, it has them, and the digest of the header of every part.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from .._errors import ArtifactError
from .._files import shards, single
from .._files import tree as trees
from .._files.whole import new_folder
from . import _compressed_tensors

LAYOUTS = ("jaxcompress", "compressed-tensors")


def save_params(
    tree: Any,
    path: str | os.PathLike[str],
    *,
    layout: str = "jaxcompress",
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a pytree with QTensors to a file or directory, whole or not at all.

    Args:
      tree: a pytree of arrays (JAX or NumPy, any dtype), QTensors, typed PRNG keys, numbers and
        texts. Arrays that lie on several devices are gathered.
      path: a file if its name ends with `.safetensors`, else a directory. A file is replaced, a
        directory only if it holds nothing but an earlier artifact.
      layout: "jaxcompress", which gives back exactly this tree, or "compressed-tensors", which
        vLLM and transformers read (a directory; see docs/artifacts.md for names and formats).
      max_shard_bytes: bytes of arrays in a file of a directory, beyond which there are several.

    Raises:
      ArtifactError: something in the tree cannot be stored, or the disk cannot be written; what
        was there before is as it was.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jaxcompress as jc
      >>> w = jc.Quantizer("int4", "group:32").quantize(jnp.ones((64, 16)), axis=0)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jc.save_params({"w": w, "b": jnp.zeros(16)}, os.path.join(folder, "m.safetensors"))
      ...     jc.load_params(os.path.join(folder, "m.safetensors"))["w"].format
      formats.int4
    """
    path = pathlib.Path(path)
    if layout not in LAYOUTS:
        raise ArtifactError(f"There is no layout {layout!r}. Available: {', '.join(LAYOUTS)}.")
    if max_shard_bytes < 1:
        raise ArtifactError(f"max_shard_bytes={max_shard_bytes!r}: a shard has at least one byte.")
    if path.suffix == ".safetensors":
        if layout == "compressed-tensors":
            raise ArtifactError(
                f"The layout compressed-tensors is a directory, with config.json in it; {path} is "
                "the name of a file."
            )
        single.save(tree, path)
        return
    config = None
    if layout == "compressed-tensors":
        arrays, config, about = _compressed_tensors.encode(tree)
    else:
        node, arrays = trees.describe(tree)
        about = {"tree": node}
    about = {"layout": layout, **about}
    _check_replaceable(path)
    try:
        with new_folder(path, "Choose another path.") as folder:
            shards.write_folder(folder, arrays, about, max_shard_bytes)
            if config is not None:
                text = json.dumps(config, indent=2) + "\n"
                (folder / _compressed_tensors.CONFIG).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be written: {error.strerror or error}. Nothing was changed there."
        ) from error


def load_params(path: str | os.PathLike[str], *, like: Any = None, lazy: bool = False) -> Any:
    """Reads what `save_params` wrote, or a model that compressed-tensors wrote.

    Nothing in the files is executed or unpickled. Checksums come first: that of a header before it
    is parsed, those of arrays (unless lazy) before they are used. Files of compressed-tensors have
    none.

    Args:
      path: of the file or directory.
      like: a pytree (of arrays, `jax.ShapeDtypeStruct`s, QTensors) whose structure the result gets.
        It is needed for nodes other than dict, list, tuple, None and `jc.QuantParams`, such as
        named tuples and dataclasses: without it they become dicts by their keys. Shapes and dtypes
        have to agree; where `like` has an array, the file may have a QTensor.
      lazy: arrays are NumPy views of the mapped file, read from the disk when they are used; their
        checksums are not checked. The files must not be changed meanwhile.

    Raises:
      ArtifactError: a file is missing, damaged, of another version, not ours, or does not fit
        `like`; says which and what.

    Example:
      >>> import os, tempfile, optax, jax.numpy as jnp, jaxcompress as jc
      >>> state = optax.sgd(0.1, momentum=0.9).init({"w": jnp.ones(2)})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jc.save_params(state, os.path.join(folder, "state"))
      ...     jc.load_params(os.path.join(folder, "state"), like=state)[0]
      TraceState(trace={'w': Array([0., 0.], dtype=float32)})
    """
    path = pathlib.Path(path)
    about, arrays = shards.read(path, lazy)
    if about is None or about.get("layout") == "compressed-tensors":
        if not path.is_dir():
            raise ArtifactError(
                f"{path} was not written by jc.save_params as one file. A model of "
                "compressed-tensors is loaded by its directory; for any other safetensors file use "
                "the safetensors package."
            )
        if like is not None:
            raise ArtifactError(f"{path} is a model of compressed-tensors, which has no `like`.")
        return _compressed_tensors.decode(path, arrays, about, lazy)
    return trees.rebuild(about.get("tree"), arrays, like, lazy)


def _check_replaceable(path: pathlib.Path) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise ArtifactError(
            f"{path} exists and is no directory. Choose another path, or a name that ends with "
            ".safetensors for a single file."
        )
    names = {p.name for p in path.iterdir()}
    own = {
        n
        for n in names
        if shards.NAME.fullmatch(n) or n in (shards.INDEX, _compressed_tensors.CONFIG)
    }
    if names and (own != names or not names & {shards.INDEX, shards.MODEL}):
        foreign = sorted(names - own) or sorted(names)
        raise ArtifactError(
            f"{path} exists and holds other things than an artifact: {', '.join(foreign[:3])}. "
            "Nothing was changed. Choose another path, or remove it yourself."
        )
