# SPDX-License-Identifier: Apache-2.0
"""Quantizing, dequantizing and packing against a copy of the same number of bytes.

Rows are timed in turn with their copy, A B A B, in one process on one core; a rate is the median
time of the copy over that of the row. `python benchmarks/formats.py [size] [repeats]`
"""

import os
import platform
import statistics
import sys
import time

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp

import jaxcompress as jc

SIZE = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
REPEATS = int(sys.argv[2]) if len(sys.argv) > 2 else 15
LEAST = {"int8": 0.5, "int4-g32": 0.25, "mxfp4": 0.25, "int4 pack": 0.5}


def seconds(fn, *args):
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    return time.perf_counter() - start


def against_copy(fn, *args):
    """Returns medians of the copy and of fn, in seconds, and the bytes that fn moves."""
    out = jax.block_until_ready(fn(*args))
    moved = sum(a.nbytes for a in jax.tree.leaves((args, out)))
    source = jnp.zeros(moved // 2, jnp.uint8)  # a copy reads and writes as much
    copy = jax.jit(jnp.copy)
    jax.block_until_ready(copy(source))
    pairs = [(seconds(copy, source), seconds(fn, *args)) for _ in range(REPEATS)]
    return *(statistics.median(column) for column in zip(*pairs, strict=True)), moved


def main():
    x = jax.random.normal(jax.random.key(0), (SIZE, SIZE))
    quantizers = {
        "int8": jc.Quantizer("int8"),
        "int4-g32": jc.Quantizer("int4", "group:32"),
        "float8_e4m3fn": jc.Quantizer("float8_e4m3fn"),
        "mxfp8_e4m3": jc.Quantizer("mxfp8_e4m3"),
        "mxfp4": jc.Quantizer("mxfp4"),
        "nvfp4": jc.Quantizer("nvfp4"),
        "nf4-g64": jc.Quantizer("nf4", "group:64"),
    }
    rows = []
    for name, q in quantizers.items():
        stored = q.quantize(x, 1)
        rows.append((f"{name} quantize", jax.jit(lambda x, q=q: q.quantize(x, 1)), x))
        rows.append((f"{name} dequantize", jax.jit(lambda s: s.dequantize()), stored))
    codes = jc.Quantizer("int4").quantize(x, 1).codes
    packed = jc.formats.pack(codes, 4)
    rows.append(("int4 pack", jax.jit(lambda c: jc.formats.pack(c, 4)), codes))
    unpack = jax.jit(lambda p: jc.formats.unpack(p, 4, SIZE, jnp.int8))
    rows.append(("int4 pack (unpack)", unpack, packed))
    print(f"jax {jax.__version__}, {platform.machine()}, 1 core, {SIZE}x{SIZE}, {REPEATS} repeats")
    print(f"{'row':28}{'copy ms':>10}{'row ms':>10}{'rate':>8}{'needs':>8}{'GB/s':>8}")
    failed = False
    for name, fn, *args in rows:
        copy, own, moved = against_copy(fn, *args)
        least = next((v for k, v in LEAST.items() if name.startswith(k + " ") or name == k), None)
        failed |= least is not None and copy / own < least
        print(
            f"{name:28}{copy * 1e3:10.2f}{own * 1e3:10.2f}{copy / own:8.2f}"
            f"{'' if least is None else least:>8}{moved / own / 1e9:8.2f}",
            flush=True,
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
