# SPDX-License-Identifier: Apache-2.0
"""Time of tracing an unrolled transformer, and of finding its groups and scale pairs.

    taskset -c 0 python benchmarks/channels.py [layers]

Interleaved runs in one process, process CPU time, median of seven.
"""

import statistics
import sys
import time

import jax
import jax.numpy as jnp

import jaxcompress as jc
from jaxcompress._core.channels import scale_pairs

D, H, F, T = 48, 4, 96, 16


def norm(x, g):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * g


def model(params, x):
    for p in params:
        q, k, v = jnp.split(norm(x, p["g1"]) @ p["qkv"], 3, -1)
        q, k, v = (t.reshape(*t.shape[:2], H, -1) for t in (q, k, v))
        a = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        x = x + jnp.einsum("bhts,bshd->bthd", a, v).reshape(x.shape) @ p["out"]
        x = x + jax.nn.gelu(norm(x, p["g2"]) @ p["up"]) @ p["down"]
    return x


def main(layers: int) -> None:
    shapes = {"g1": (1, 1, D), "qkv": (D, 3 * D), "out": (D, D), "g2": (1, 1, D)}
    shapes |= {"up": (D, F), "down": (F, D)}
    layer = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    args = [layer] * layers, jax.ShapeDtypeStruct((2, T, D), jnp.float32)
    tasks = {
        "trace": jax.make_jaxpr,
        "sites": jc.sites,
        "groups": jc.prune.groups,
        "pairs": scale_pairs,
    }
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(8):
        for name, task in tasks.items():
            begin = time.process_time()
            task(lambda p, x: model(p, x))(*args)  # a new function: nothing is remembered
            seconds[name].append(time.process_time() - begin)
    base = statistics.median(seconds["trace"][1:])
    for name, found in seconds.items():
        t = statistics.median(found[1:])  # the first run fills caches of inner functions
        print(f"{name:8} {t:.3f} s  {t / base:.2f} of tracing")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 48)
