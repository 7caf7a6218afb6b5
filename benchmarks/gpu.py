# SPDX-License-Identifier: Apache-2.0
"""On one GPU: small products over bfloat16, quantization-aware steps, and an artifact that runs.

Products: x [m, d] times w [d, d] in bfloat16, beside the same compressed: int8 weights and
activations, fp8, and 4-bit weights at one row, where reading the weight is the work. Steps: a
decoder of two layers in bfloat16, its loss, gradient and update. Wall time, candidates in turns
A B ... B A, medians. Integer results are compared with NumPy's int64, and an artifact that is
exported for CPU and CUDA at once is run on both.

Usage: python benchmarks/gpu.py [--short] [--out FILE]    --short: tiny, on any platform
"""

import argparse
import functools
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import jax
import jax.numpy as jnp
import numpy as np
from harness import spread
from qat import Stock, softmax_loss, transformer

import jaxcompress as jc

BF16 = jnp.bfloat16


def measure(candidates, rounds, least):
    """(median wall seconds, spread) by name of `{name: (compiled, args)}`."""
    repeats, times = {}, {name: [] for name in candidates}
    for name, (fn, args) in candidates.items():
        jax.block_until_ready(fn(*args))
        start = time.perf_counter()
        jax.block_until_ready([fn(*args) for _ in range(5)])
        repeats[name] = max(1, int(least / ((time.perf_counter() - start) / 5)))
    for i in range(rounds):
        for name in list(candidates)[:: 1 - i % 2 * 2]:
            fn, args = candidates[name]
            start = time.perf_counter()
            for _ in range(repeats[name]):
                out = fn(*args)
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: (median(t), spread(t)) for name, t in times.items()}


def compiled(fn, *args):
    return jax.jit(fn).lower(*args).compile(), args


def products(m, d):
    kx, kw = jax.random.split(jax.random.key(0))
    x, w = jax.random.normal(kx, (m, d), BF16), jax.random.normal(kw, (d, d), BF16) * d**-0.5
    dot = lambda p, x: x @ p["w"]  # noqa: E731
    out = {"bfloat16": compiled(dot, {"w": w}, x)}
    recipes = ["w8a8", "w8a16", "fp8"] if m > 1 else ["w8a8", "w8a16", "w4a16-g32", "w4a16-g128"]
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    for name in recipes:
        small = jc.quantize(dot, {"w": w}, name, method="rtn", example_inputs=x)
        out[name] = compiled(small.fn, small.params, x)
        error = np.linalg.norm(np.asarray(out[name][0](*out[name][1]), np.float64) - exact)
        assert error < 0.2 * np.linalg.norm(exact), (name, error / np.linalg.norm(exact))
    return out


def steps(d, batch, seq):
    keys = iter(jax.random.split(jax.random.key(1), 20))
    shapes = {**dict.fromkeys("qkvo", (d, d)), "up": (d, 4 * d), "down": (4 * d, d)}
    normal = lambda *s: jax.random.normal(next(keys), s, BF16) * s[0] ** -0.5  # noqa: E731
    layers = [{n: normal(*s) for n, s in shapes.items()} for _ in range(2)]
    p = {"embed": normal(256, d), "head": normal(d, 256), "layers": layers}
    ids = jax.random.randint(next(keys), (batch, seq + 1), 0, 256)
    fn = functools.partial(transformer, Stock, heads=max(d // 128, 1), causal=True)

    def step(f, p, ids):
        loss = lambda p: softmax_loss(f(p, ids[:, :-1]).astype(jnp.float32), ids[:, 1:])  # noqa: E731
        value, g = jax.value_and_grad(loss)(p)
        return jax.tree.map(lambda p, g: p - 0.01 * g, p, g), value

    def recipe(name):
        keep = jc.Rule("embed", None, optional=True)
        return jc.Recipe([keep, *jc.recipes.get(name).rules], name)

    quant = jc.quantize_aware
    kinds = {
        "bfloat16": fn,
        "bfloat16 again": lambda p, x: fn(p, x),
        "w8a8, integers": quant(fn, recipe("w8a8"), integer=True),
        "w8a8, as chosen": quant(fn, recipe("w8a8")),
        "w8a8, floats": quant(fn, recipe("w8a8"), integer=False),
        "fp8": quant(fn, recipe("fp8")),
    }
    return {name: compiled(functools.partial(step, f), p, ids) for name, f in kinds.items()}


def exact():
    """Products of integers as NumPy computes them, and an artifact of several platforms."""
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-127, 128, s).astype(np.float32) for s in ((64, 256), (256, 128)))
    x[:, 0] = w[0] = 127  # so that every scale is 1
    dot = lambda p, x: x @ p["w"]  # noqa: E731
    small = jc.quantize(dot, {"w": jnp.asarray(w)}, "w8a8", method="rtn", example_inputs=x)
    got = np.asarray(jax.jit(small.fn)(small.params, x))
    np.testing.assert_array_equal(got, (x.astype(np.int64) @ w.astype(np.int64)).astype(np.float32))
    platforms = tuple(dict.fromkeys(("cpu", "cuda" if jax.default_backend() == "gpu" else "cpu")))
    lines = ["products of integers equal NumPy's"]
    for name in ("w8a8", "fp8", "w4a16-g32", "mxfp4", "nvfp4"):
        small = jc.quantize(dot, {"w": jnp.asarray(w)}, name, method="rtn", example_inputs=x)
        with tempfile.TemporaryDirectory() as folder:
            artifact = jc.export.stablehlo(
                small.fn, small.params, x, path=folder + "/a", platforms=platforms
            )
            here = np.asarray(artifact.run(x))
            with jax.default_device(jax.devices("cpu")[0]):
                there = np.asarray(jax.jit(small.fn)(jax.device_put(small.params), x))
        off = np.abs(here - there).max() / np.abs(there).max()
        lines.append(f"artifact of {name}: {jax.default_backend()} from cpu by {off:.1e}")
        assert off < 1e-2, lines[-1]
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="tiny, one round: does it work")
    parser.add_argument("--out", type=Path, help="write the lines to this file too")
    args = parser.parse_args()
    lines = []

    def say(line):
        print(line, flush=True)
        lines.append(line)
        if args.out:
            args.out.write_text("\n".join(lines) + "\n")

    rounds, least = (1, 1e-4) if args.short else (11, 0.02)
    say(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for line in exact():
        say(line)
    failed = []
    sizes = (
        [(1, 64), (32, 64)] if args.short else [(1, 4096), (1, 8192), (4096, 4096), (8192, 8192)]
    )
    jobs = [(f"x [{m}, {d}] @ w [{d}, {d}]", functools.partial(products, m, d)) for m, d in sizes]
    widths = [(64, 2, 16)] if args.short else [(1024, 16, 512), (4096, 8, 512)]
    jobs += [(f"step, d {d}, {b} x {s}", functools.partial(steps, d, b, s)) for d, b, s in widths]
    for title, job in jobs:
        try:
            times = measure(job(), rounds, least)
        except (AssertionError, RuntimeError, jc.JaxCompressError) as error:
            failed.append(title)
            say(f"\n{title}: {type(error).__name__}: {str(error)[:300]}")
            continue
        base = times["bfloat16"][0]
        say(f"\n{title}: bfloat16 {base * 1e3:.3f} ms")
        for name, (t, s) in times.items():
            say(f"  {name:18}{t / base:8.3f} +- {s:.3f}")
    sys.exit(f"failed: {failed}" if failed else 0)


if __name__ == "__main__":
    main()
