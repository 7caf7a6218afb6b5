# SPDX-License-Identifier: Apache-2.0
"""Trace and lowering time of a quantization-aware function over the plain one.

Models: a transformer of 48 unrolled layers, the same one scanned over stacked layers, an MLP and
a conv net; the gradient of a loss is traced and lowered (nothing is compiled or run). Plain and
quantized are measured in turns (A B A B) in one process, and the ratio of the medians is printed.
`--compile` adds XLA's time to compile. Both are new functions in every round, in a warm process.

Usage: python benchmarks/trace.py [--rounds 5] [--recipe w8a8] [--compile]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

sys.path.insert(0, str(Path(__file__).parent.parent))
import jaxcompress as jc

D, HEADS, LAYERS = 64, 4, 48


def block(p, x):
    def norm(x, g):
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * g

    h = norm(x, p["norm1"])
    q, k, v = ((h @ p[n]).reshape(*x.shape[:-1], HEADS, -1) for n in ("q", "k", "v"))
    a = jax.nn.softmax(jnp.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5)
    x = x + jnp.einsum("bhij,bjhd->bihd", a, v).reshape(x.shape) @ p["o"]
    h = norm(x, p["norm2"])
    return x + jax.nn.gelu(h @ p["up"]) @ p["down"]


def layer(key):
    shapes = {"q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D), "up": (D, 4 * D)}
    shapes |= {"down": (4 * D, D)}
    keys = jax.random.split(key, len(shapes))
    weights = {n: jax.random.normal(k, s) * 0.05 for k, (n, s) in zip(keys, shapes.items())}
    return weights | {"norm1": jnp.ones((1, 1, D)), "norm2": jnp.ones((1, 1, D))}


def unrolled(p, x):
    for layer in p:
        x = block(layer, x)
    return x


def scanned(p, x):
    return lax.scan(lambda x, w: (block(w, x), None), x, p)[0]


def mlp(p, x):
    for w in p:
        x = jax.nn.relu(x @ w)
    return x


def conv_net(p, x):
    for w in p:
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.nn.relu(lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims))
    return x.mean((1, 2))


def cases():
    key = jax.random.key(0)
    layers = [layer(k) for k in jax.random.split(key, LAYERS)]
    stacked = jax.tree.map(lambda *w: jnp.stack(w), *layers)
    tokens = jax.random.normal(key, (2, 16, D))
    yield f"transformer, {LAYERS} unrolled layers", unrolled, layers, tokens
    yield f"transformer, {LAYERS} scanned layers", scanned, stacked, tokens
    yield "transformer, 4 unrolled layers", unrolled, layers[:4], tokens
    sizes = ((784, 256), (256, 256), (256, 128), (128, 10))
    yield "MLP, 4 layers", mlp, [jnp.ones(n) for n in sizes], jnp.ones((8, 784))
    channels = ((3, 16), (16, 16), (16, 32), (32, 32))
    kernels = [jnp.ones((3, 3, *n)) for n in channels]
    yield "conv net, 4 layers", conv_net, kernels, jnp.ones((2, 16, 16, 3))


def loss_of(fn):
    """A loss that is traced anew: no cache of JAX knows this function."""
    return lambda p, x: jnp.sum(fn(p, x) ** 2)


def measure(fn, params, x, recipe, rounds, compile):
    """Medians of seconds to (trace and lower, compile) by kind, after one round of warming up."""
    times = {"plain": [], "aware": []}
    for _ in range(rounds + 1):
        for kind, seen in times.items():
            loss = loss_of(jc.quantize_aware(fn, recipe) if kind == "aware" else fn)
            start = time.process_time()
            lowered = jax.jit(jax.grad(loss)).lower(params, x)
            middle = time.process_time()
            if compile:
                lowered.compile()
            seen.append((middle - start, time.process_time() - middle))
    return {kind: [statistics.median(t) for t in zip(*seen[1:])] for kind, seen in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, recipe {args.recipe}, median of {args.rounds} rounds")
    for name, fn, params, x in cases():
        t = measure(fn, params, x, args.recipe, args.rounds, args.compile)
        (plain, plain_xla), (aware, aware_xla) = t["plain"], t["aware"]
        line = f"{name:34s} trace + lower {plain:.3f} s -> {aware:.3f} s, ratio {aware / plain:.2f}"
        if args.compile:
            line += f"; compile ratio {aware_xla / plain_xla:.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
