# SPDX-License-Identifier: Apache-2.0
"""How the cost of int8-aware training grows: with layers, width, batch and devices.

The decoder of `qat.py`, of d = 128, 4 layers, 32 tokens, batch 8, one of these changed at a time.
For each size the ratios over float32 of the train step, of trace and lowering and of temporary
memory; and the slope of log seconds against log size, ours and float's: 1 is linear. Devices are
those that XLA makes of one CPU, the batch split over them by `shard_map`, in a process of its own.

Usage: python benchmarks/scale.py [--short] [--rounds 7] [--out FILE]
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import jax
import numpy as np
from harness import build, machine, measure, pin
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from qat import RECIPE, Stock, step_of, transformer_case

import jaxcompress as jc

BASE = {"d": 128, "layers": 4, "batch": 8, "seq": 32}
SIZES = {"layers": (2, 4, 8, 16), "d": (64, 128, 256, 512), "batch": (2, 8, 32, 128)}
DEVICES = (1, 2, 4, 8)
KINDS = ("float32", "jaxcompress")


def functions(fn):
    def stock(p, x):
        return fn(Stock, p, x)

    return {"float32": stock, "jaxcompress": jc.quantize_aware(stock, RECIPE)}


def once(sizes, rounds, devices=1):
    """{candidate: (seconds of a step, of trace and lowering, temporary bytes)}."""
    fn, p, x, y = transformer_case(False, heads=4, causal=True, **sizes)
    compiled, cost = {}, {}
    for name, f in functions(fn).items():
        step = step_of(f)
        if devices > 1:
            mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
            step = split(step, mesh)
            x, y = (jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (x, y))
        jax.jit(step_of(lambda p, x, f=f: f(p, x))).lower(p, x, y)  # what a warm process has
        c, (traced, _, temporary, _) = build(step, (p, x, y))
        cost[name] = traced, temporary
        compiled[name] = c, (p, x, y)
    return {name: (t, *cost[name]) for name, (t, _) in measure(compiled, rounds).items()}


def split(step, mesh):
    """Each device has a part of the batch; gradients and loss are averaged."""

    def local(p, x, y):
        p, loss, g = step(p, x, y)
        return jax.lax.pmean((p, loss, g), "data")

    return jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P(), check_vma=False
    )


def over_devices(count, rounds, short):
    """`once` in a process with so many devices."""
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={count}"
    command = [sys.executable, __file__, "--devices", str(count), "--rounds", str(rounds)]
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(
        command + ["--short"] * short, env=env, check=True, capture_output=True, text=True
    )
    return {name: tuple(row) for name, row in json.loads(out.stdout.splitlines()[-1]).items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--short", action="store_true", help="two small sizes each, one round")
    parser.add_argument("--out", type=Path, help="append a table in Markdown to this file")
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    rounds = 1 if args.short else args.rounds
    base = BASE if not args.short else {"d": 64, "layers": 2, "batch": 8, "seq": 16}
    pin()
    if args.devices:
        print(json.dumps(once(base, rounds, args.devices)))
        return
    print(machine())
    rows = ["", "## How cost grows", "", f"{machine()}.", ""]
    rows += ["| size | step | trace + lower | temp |", "|---|---|---|---|"]
    print(f"{'':14}{'step':>8}{'trace':>8}{'temp':>8}   over float32")
    for axis, values in {**SIZES, "devices": DEVICES}.items():
        found = {}
        for n in values[:2] if args.short else values:
            if axis == "devices":
                found[n] = over_devices(n, rounds, args.short)
            else:
                found[n] = once({**base, axis: n}, rounds)
            ours, plain = (found[n][k] for k in ("jaxcompress", "float32"))
            ratios = [a / b for a, b in zip(ours, plain)]
            print(f"{axis:8}{n:>6}" + "".join(f"{r:>8.2f}" for r in ratios), flush=True)
            rows.append(f"| {axis} {n} | " + " | ".join(f"{r:.2f}" for r in ratios) + " |")
        slopes = {k: [slope(found, k, i) for i in (0, 1)] for k in KINDS}
        text = ", ".join(f"{k} step {a:.2f}, trace {b:.2f}" for k, (a, b) in slopes.items())
        print(f"{axis:8} slopes: {text}", flush=True)
        rows.append(f"| {axis}, slopes | {text} | | |")
    if args.out:
        with args.out.open("a") as f:
            print("\n".join(rows), file=f)


def slope(found, kind, i):
    sizes, seconds = zip(*((n, row[kind][i]) for n, row in found.items()))
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


if __name__ == "__main__":
    main()
