# SPDX-License-Identifier: Apache-2.0
"""Wrote `schema_1/`: artifacts of schema version 1, which every later version must read.

Run once, at the first release of the schema; `python make_schema_1.py FOLDER` shows how.
"""

import pathlib
import sys

import jax.numpy as jnp
import numpy as np

import jaxcompress as jc

X = jnp.cos(jnp.arange(512.0)).reshape(64, 8)
QUANTIZERS = {
    "int4": jc.Quantizer("int4", "channel"),
    "uint3": jc.Quantizer("uint3", "channel"),
    "mxfp4": jc.Quantizer("mxfp4"),
    "nvfp4": jc.Quantizer("nvfp4"),
    "nf4": jc.Quantizer("nf4", "channel"),
    "float8_e4m3fn": jc.Quantizer("float8_e4m3fn", "channel"),
    "tiles": jc.Quantizer("int8", jc.per_block(4, 16)),
}


def main(folder: pathlib.Path) -> None:
    tree = {name: quantizer.quantize(X, axis=0) for name, quantizer in QUANTIZERS.items()}
    values = {name: np.asarray(q.dequantize()) for name, q in tree.items() if name != "nf4"}
    np.savez_compressed(folder / "values.npz", **values)
    tree["nodes"] = [(1, 2.5, "s", None), {"i": jnp.array([1, -8, 7], jnp.int4)}]
    jc.save_params(tree, folder / "file.safetensors")
    jc.save_params(tree, folder / "shards", max_shard_bytes=1000)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
