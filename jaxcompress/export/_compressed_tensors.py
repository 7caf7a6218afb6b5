# SPDX-License-Identifier: Apache-2.0
"""Models in the layout of compressed-tensors: names, `config.json`, and which module is what.

The key path of a leaf becomes a name with dots. `x.kernel`, a matrix [in, out], is `x.weight`
[out, in] in the file, and every matrix called `weight` in a file is `kernel` when it is read.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.qtensor import QTensor
from .._core.sparse import SparseTensor
from .._errors import ArtifactError
from .._files.nodes import children_of
from .._files.safetensors import NAMES
from .._files.sealed import LIMIT, parse
from .._files.whole import member, read_small
from . import _ct_layout
from ._ct_layout import TENSORS, Scheme

CONFIG = "config.json"
VERSION = "0.18.0"  # the first with today's order of bits
_DEEPEST = 64  # parts of a name


def encode(tree: Any) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """The tensors by name, `config.json`, and what we note about them.

    Raises:
      ArtifactError: a leaf has no place in this layout, or two would have the same name.
    """
    arrays: dict[str, Any] = {}
    groups: dict[Scheme, list[str]] = {}
    dtypes: dict[str, str] = {}

    def put(name: str, x: Any) -> None:
        if name in arrays:
            raise ArtifactError(f"Two leaves of the tree would be called `{name}` in the file.")
        arrays[name] = x

    def walk(x: Any, path: tuple[str, ...]) -> None:
        where = ".".join(path)
        if isinstance(x, SparseTensor):
            raise ArtifactError(
                f"`{where}` is a SparseTensor, which this layout is not written with here: give "
                'its .dequantize(), or take layout="jaxcompress".'
            )
        children = None if isinstance(x, QTensor) else children_of(x)
        if children is not None:
            for key, child in children:
                if not str(key) or "." in str(key):
                    raise ArtifactError(
                        f"The key {key!r} below `{where}` cannot be part of a name with dots."
                    )
                walk(child, (*path, str(key)))
        elif not path:
            raise ArtifactError("compressed-tensors stores leaves by name: give a dict of them.")
        elif isinstance(x, QTensor):
            module = ".".join(path[:-1] if path[-1] == "kernel" else path)
            scheme, tensors = _ct_layout.encode(x, where)
            for field, tensor in tensors.items():
                put(f"{module}.{field}", tensor)
            groups.setdefault(scheme, []).append(module)
            dtypes[module] = str(x.dtype)
        elif isinstance(x, jax.Array | np.ndarray) and x.dtype in NAMES:
            if x.ndim == 2 and path[-1] == "weight":
                raise ArtifactError(
                    f"`{where}` is a matrix called weight: call it kernel, [in, out]; the file has "
                    "it transposed under the name weight."
                )
            if x.ndim == 2 and path[-1] == "kernel":
                put(".".join((*path[:-1], "weight")), np.asarray(x).T)
            else:
                put(where, np.asarray(x))
        elif x is not None:
            raise ArtifactError(
                f"`{where}` cannot be stored as compressed-tensors: {type(x).__name__} "
                f"{getattr(x, 'dtype', '')}. Use layout='jaxcompress'."
            )

    walk(tree, ())
    kinds = sorted({scheme.format for scheme in groups})
    config = {
        "quant_method": "compressed-tensors",
        "format": "dense" if not kinds else kinds[0] if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "version": VERSION,
        "global_compression_ratio": None,
        "ignore": [],
        "kv_cache_scheme": None,
        "config_groups": {
            f"group_{i}": {
                "targets": modules,
                "format": scheme.format,
                "input_activations": None,
                "output_activations": None,
                "weights": scheme.weights() | {"dynamic": False},
            }
            for i, (scheme, modules) in enumerate(groups.items())
        },
        "sparsity_config": {},
        "transform_config": {},
    }
    about = {"config": _digest(config), "dtypes": dtypes}
    return arrays, {"quantization_config": config}, about


def decode(
    folder: pathlib.Path,
    arrays: Mapping[str, np.ndarray],
    about: Mapping[str, Any] | None,
    lazy: bool,
) -> dict[str, Any]:
    """The tree of nested dicts of the tensors of a model.

    Raises:
      ArtifactError: `config.json` is missing, damaged or asks for what is not read here; tensors
        and configuration do not fit together.
    """
    path = member(folder, CONFIG)
    config = parse(read_small(path, LIMIT), path)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        raise ArtifactError(f"{path} has no quantization_config: {folder} is no model of ours.")
    if about is not None and _digest(quantization) != about.get("config"):
        raise ArtifactError(f"The quantization_config in {path} is not the one that was saved.")
    try:
        schemes = _schemes(quantization, path)
        dtypes = {} if about is None else about["dtypes"]
        other = config.get("dtype", config.get("torch_dtype")) if about is None else None
        other = other if other in ("float32", "float16", "bfloat16") else None
        return _modules(arrays, schemes, dtypes, other, _is_dense(quantization), lazy)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path} is damaged: {type(error).__name__}: {error}.") from None


def _schemes(config: Mapping[str, Any], path: pathlib.Path) -> list[tuple[Scheme, set[str]]]:
    """The schemes and the names of the modules that they are for."""
    if config.get("quant_method") != "compressed-tensors":
        raise ArtifactError(f"{path} is of {config.get('quant_method')!r}, which is not read here.")
    for key in ("sparsity_config", "transform_config"):
        if config.get(key):
            raise ArtifactError(f"{path} has a {key}, which is not read here.")
    status = config.get("quantization_status", "compressed")
    if status != "compressed":
        raise ArtifactError(f"{path} says that weights are {status!r}: they have to be compressed.")
    found = []
    for group in config["config_groups"].values():
        args = group["weights"]
        if args is None:
            continue
        size, blocks = args.get("group_size"), args.get("block_structure")
        strategy = args.get("strategy")
        if strategy is None:  # as compressed-tensors infers it
            strategy = "tensor" if size is None else "group" if size > 0 else "channel"
        scheme = Scheme(
            group.get("format") or config["format"],
            args.get("num_bits", 8),
            args.get("type", "int"),
            args.get("symmetric", True),
            strategy,
            None if size == -1 else size,
            None if blocks is None else tuple(blocks),
        )
        numbers = [scheme.num_bits, *(scheme.block_structure or (1, 1)), scheme.group_size or 1]
        if not all(type(n) is int and 0 < n < 2**40 for n in numbers) or len(numbers) != 4:
            raise ValueError(f"a scheme of {numbers}")
        found.append((scheme, {str(t) for t in group["targets"]}))
    return found


def _modules(
    arrays: Mapping[str, np.ndarray],
    schemes: list[tuple[Scheme, set[str]]],
    dtypes: Mapping[str, str],
    other: str | None,
    dense: bool,
    lazy: bool,
) -> dict[str, Any]:
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name in arrays:
        module, _, field = name.rpartition(".")
        if field in TENSORS and module:
            parts.setdefault(module, {})[field] = arrays[name]
    tree: dict[str, Any] = {}
    used = set()
    for module, tensors in parts.items():
        if "weight_scale" in tensors:
            dtype = dtypes.get(module, other)
            _put(tree, f"{module}.kernel", _quantized(module, tensors, schemes, dtype, dense))
            used |= {f"{module}.{field}" for field in tensors}
    for name, x in arrays.items():
        if name in used:
            continue
        module, _, field = name.rpartition(".")
        if field == "weight" and x.ndim == 2:
            name, x = f"{module}.kernel" if module else "kernel", x.T
        if not lazy:
            if jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype:
                x = jnp.asarray(x)
        _put(tree, name, x)
    return tree


def _quantized(
    module: str,
    tensors: Mapping[str, np.ndarray],
    schemes: list[tuple[Scheme, set[str]]],
    dtype: str | None,
    dense: bool,
) -> QTensor:
    """The weight of a module by the scheme that names it, else by the one that fits.

    Targets that are classes or regular expressions are not looked at: there are no classes here,
    and a hostile expression could run for ever.
    """
    named = [scheme for scheme, targets in schemes if module in targets]
    found, problem = [], ArtifactError(f"No group of the configuration is for `{module}`.")
    for scheme in dict.fromkeys(named or [scheme for scheme, _ in schemes]):
        try:
            found.append(_ct_layout.decode(scheme, tensors, module, dtype, dense))
        except ArtifactError as error:
            problem = error
    if len(found) > 1:
        raise ArtifactError(
            f"Several groups of the configuration fit `{module}` and none names it: name it among "
            "the targets of its group."
        )
    if not found:
        raise problem
    return found[0]


def _put(tree: dict[str, Any], name: str, x: Any) -> None:
    *path, last = name.split(".")
    wrong = len(path) > _DEEPEST
    for part in path[:_DEEPEST]:
        tree = tree.setdefault(part, {})
        if wrong := wrong or not isinstance(tree, dict):
            break
    if wrong or last in tree:
        raise ArtifactError(f"`{name[:200]}` and another tensor cannot be in one tree of dicts.")
    tree[last] = x


def _is_dense(config: Mapping[str, Any]) -> bool:
    """Whether codes of 3, 5, 6 and 7 bits cross words: from version 0.18."""
    numbers = str(config.get("version")).split(".")[:2]
    if not all(n.isdecimal() and len(n) < 9 for n in numbers) or len(numbers) < 2:
        return True
    return tuple(map(int, numbers)) >= (0, 18)


def _digest(config: Mapping[str, Any]) -> str:
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
