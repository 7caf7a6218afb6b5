# SPDX-License-Identifier: Apache-2.0
"""How the benchmarks measure: one pinned core, CPU time, candidates in turns A B ... B A, medians.

Ratios of one run carry over to other machines of the kind, seconds do not. Every candidate is
compiled before, and runs long enough to be measured: repeated until a turn takes `LEAST` seconds.
"""

import importlib.util
import os
import pathlib
import platform
import re
import statistics
import sys
import time

import jax
import jax.numpy as jnp

LEAST = 0.02  # seconds of a turn


# Memory that was freed is kept. Else a third of a step are page faults of buffers that glibc gave
# back to the system after the step before, and how many there are is a matter of luck.
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def pin():
    """Keeps this process on one core, and its memory; call first: the process starts anew."""
    if KEEP.keys() - os.environ.keys():
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **KEEP})
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def machine():
    """One line: CPU, JAX, Python."""
    name = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            rows = dict(line.split(":", 1) for line in f if ":" in line)
        rows = {k.strip(): v.strip() for k, v in rows.items()}
        known = {"avx512f", "avx512_vnni", "avx_vnni", "amx_int8"}
        flags = known & set(rows.get("flags", "").split())
        name = f"{rows.get('model name', name)} ({', '.join(sorted(flags))})"
    return f"{name}, one core; jax {jax.__version__}, Python {platform.python_version()}"


def measure(candidates, rounds):
    """(median CPU seconds, spread) by name of `{name: (compiled, args)}`."""
    repeats, times = {}, {name: [] for name in candidates}
    for name, (fn, args) in candidates.items():
        jax.block_until_ready(fn(*args))
        start = time.process_time()
        jax.block_until_ready(fn(*args))
        repeats[name] = max(1, int(LEAST / max(time.process_time() - start, 1e-7)))
    for i in range(rounds):
        for name in list(candidates)[:: 1 - i % 2 * 2]:
            fn, args = candidates[name]
            start = time.process_time()
            for _ in range(repeats[name]):
                out = fn(*args)
            jax.block_until_ready(out)
            times[name].append((time.process_time() - start) / repeats[name])
    return {name: (statistics.median(t), spread(t)) for name, t in times.items()}


def build(step, args):
    """(compiled, costs) of a function.

    Costs are seconds of trace and lowering, seconds of compiling, temporary bytes, and all bytes
    that a call allocates: temporary ones and results. XLA keeps what is temporary in the place of a
    result while that is free, so that temporary bytes alone say little where results are large.
    """
    start = time.process_time()
    lowered = jax.jit(step).lower(*args)
    middle = time.process_time()
    compiled = lowered.compile()
    seconds = middle - start, time.process_time() - middle
    memory = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes
    return compiled, (*seconds, temporary, temporary + memory.output_size_in_bytes)


def load_example(name):
    """A module of `examples/`, by name."""
    path = pathlib.Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def spread(times):
    """Half of the distance between the quartiles, over the median."""
    if len(times) < 4:
        return float("nan")
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle


def integer_products(compiled):
    """How many dots and convolutions of a compiled program multiply s8 with s8."""
    text = compiled.as_text()
    types = dict(re.findall(r"%?([\w.-]+) = (\w+)\[", text))
    found = re.findall(r"= s32\[[^=]* (?:dot|convolution)\(([^)]*)\)", text)
    operands = [re.findall(r"%([\w.-]+)", names) for names in found]
    return sum(all(types.get(n) == "s8" for n in names) for names in operands)


def assert_alive(tree, what):
    """Fails if a gradient is zero: a backward pass that was removed is fast."""
    for path, g in jax.tree_util.tree_leaves_with_path(tree):
        assert float(jnp.abs(g).max()) > 0, f"{what}: no gradient for {jax.tree_util.keystr(path)}"
