# SPDX-License-Identifier: Apache-2.0
"""One pytree in one safetensors file: what `save_params` writes for a name with that ending."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import xxhash

from .._errors import ArtifactError
from . import shards
from . import tree as trees
from .whole import new_file


def save(tree: Any, path: pathlib.Path) -> None:
    """Writes the file whole or not at all.

    Raises:
      ArtifactError: as `save_params`.
    """
    node, arrays = trees.describe(tree)
    with new_file(path) as file:
        shards.write_file(file, arrays, {"layout": "jaxcompress", "tree": node})


def load(path: pathlib.Path, lazy: bool = False) -> Any:
    """The pytree of a file.

    Raises:
      ArtifactError: it is missing, damaged, or was not written by `save`.
    """
    about, arrays = shards.read(path, lazy)
    if about is None or "tree" not in about:
        raise ArtifactError(f"{path} holds no pytree that was saved as one file.")
    return trees.rebuild(about["tree"], arrays, None, lazy)


def fingerprint(tree: Any) -> str:
    """A hash of structure and values, equal wherever `save` would write the same.

    Raises:
      ArtifactError: the pytree holds something that cannot be saved.
    """
    node, arrays = trees.describe(tree)
    found = xxhash.xxh3_128(json.dumps(node).encode())
    for name, x in arrays.items():
        x = np.ascontiguousarray(np.asarray(x))
        found.update(f"{name} {x.dtype} {x.shape}".encode())
        found.update(x.reshape(-1).view(np.uint8).data)
    return found.hexdigest()
