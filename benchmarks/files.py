# SPDX-License-Identifier: Apache-2.0
"""Saving and loading a 4096x4096 layer in int4, groups of 128, against the least there is to do.

    size    bytes of the artifact, and per weight
    save    jc.save_params over writing the same bytes to a new file, with fsync and a rename
    lazy    jc.load_params(lazy=True) over a memcpy of the same bytes into a fresh array;
            "and read" copies every array out of the mapped file as well
    eager   jc.load_params, with checksums, arrays of JAX, over reading the file into memory

Each pair is measured in turns (A B A B); the ratio is that of the medians. Between measurements the
caches of the processor are filled with other data, as they are in a program that does other things;
`--warm` leaves that out.

Usage: python benchmarks/files.py [--rounds 31] [--size 4096] [--warm]
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import jaxcompress as jc


def compare(a, b, rounds, other):
    """Medians in ms of two functions in turns, and their ratio."""
    times = [], []
    for i in range(rounds + 1):
        for run, log in zip((a, b), times):
            if other is not None:
                other += 1
            begin = time.perf_counter()
            result = run()
            end = time.perf_counter()
            del result
            if i:
                log.append(1e3 * (end - begin))
    first, second = map(statistics.median, times)
    return f"{first:8.3f} ms against {second:8.3f} ms, ratio {first / second:.3f}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--warm", action="store_true")
    arguments = parser.parse_args()
    n, rounds = arguments.size, arguments.rounds
    w = jnp.asarray(np.random.default_rng(0).normal(size=(n, n)).astype(np.float32))
    q = jax.block_until_ready(jc.Quantizer("int4", "group:128").quantize(w, axis=0))
    del w
    other = None if arguments.warm else np.zeros(2**27, np.uint8)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path, raw = Path(folder, "layer.safetensors"), Path(folder, "raw")
        tree = {"kernel": q}

        def save():
            jc.save_params(tree, path)

        save()
        data = np.fromfile(path, np.uint8)
        print(f"jax {jax.__version__}, Python {sys.version.split()[0]}, {os.cpu_count()} cores")
        print(f"size   {data.size:,} bytes, {data.size / n**2:.4f} bytes a weight")

        def write():
            temporary = raw.with_name("temporary")
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, raw)
            descriptor = os.open(folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

        def lazy():
            return jc.load_params(path, lazy=True)

        def lazy_and_read():
            return [np.array(a) for a in jax.tree.leaves(jc.load_params(path, lazy=True))]

        def read():
            with open(path, "rb", buffering=0) as file:
                buffer = np.empty(data.size, np.uint8)
                file.readinto(buffer)
            return buffer

        print("save          ", compare(save, write, rounds, other))
        print("lazy          ", compare(lazy, data.copy, rounds, other))
        print("lazy and read ", compare(lazy_and_read, data.copy, rounds, other))
        print("eager         ", compare(lambda: jc.load_params(path), read, rounds, other))


if __name__ == "__main__":
    main()
