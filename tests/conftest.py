# SPDX-License-Identifier: Apache-2.0
"""Eight CPU devices, programs that compile fast, strict rank promotion, and shared fixtures."""

import atexit
import collections
import gc
import gzip
import importlib.metadata
import os
import shutil
import tempfile

# Most of the time goes into compiling: XLA takes half of it with fewer passes, what one process
# compiled the others read, and nobody reads source lines in programs. `XLA_FLAGS= python -m pytest`
# compiles as users do.
if "XLA_FLAGS" not in os.environ:
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    flags += " --xla_cpu_parallel_codegen_split_count=1"
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags += " --xla_cpu_use_fusion_emitters=false"  # a third of the time; gone in 0.12
    os.environ["XLA_FLAGS"] = flags
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

import jax
import numpy as np
import pytest
from covers import left_out

jax.config.update("jax_numpy_rank_promotion", "raise")

# Collecting takes longer the more a process has compiled: 8 % of the time of one file of tests.
gc.freeze()
gc.set_threshold(100_000, 50, 100)


@pytest.fixture
def key() -> jax.Array:
    """A PRNG key, the same in every test."""
    return jax.random.key(0)


@pytest.fixture
def noise_images(tmp_path, monkeypatch) -> None:
    """Noise in the files of Fashion-MNIST: 256 images to train with, 1000 to test."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 256), ("t10k", 1000)):
        images = rng.integers(0, 256, (n, 28, 28), np.uint8).tobytes()
        labels = rng.integers(0, 10, n, np.uint8).tobytes()
        for name, header, data in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            path = tmp_path / f"{part}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(bytes(header) + data, 1))
    monkeypatch.setenv("FMNIST_DIR", str(tmp_path))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """Refuses names that hold an address, which differ between processes; marks what covers leave
    out as `full`."""
    bad = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if bad:
        raise pytest.UsageError(f"give these tests ids without addresses: {bad[:3]}")
    crossed = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("cover"):
            crossed[item.function].append(item)
    for cases in crossed.values():
        for item in left_out(cases):
            item.add_marker(pytest.mark.full)
