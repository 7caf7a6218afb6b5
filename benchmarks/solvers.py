# SPDX-License-Identifier: Apache-2.0
"""Layer solvers and Hessians against the published torch loops; one program per shape of a layer.

One layer of 4096 x 1024 weights, int4 with a scale an output unless said otherwise. Rows are timed
in turn with their torch loop, A B A B, in one process on one core; a ratio is the median over the
pairs of process CPU time. `python benchmarks/solvers.py [out] [in] [repeats]`; needs torch, writes
`benchmarks/logs/solvers.txt`.
"""

import os
import pathlib
import platform
import statistics
import sys
import time

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_loops

from jaxcompress import formats
from jaxcompress._calibration.collectors import COLLECTORS
from jaxcompress._solvers.awq import awq
from jaxcompress._solvers.cholesky import inverse_cholesky
from jaxcompress._solvers.gptq import gptq
from jaxcompress._solvers.rounder import find_scales
from jaxcompress._solvers.sparsegpt import sparsegpt
from jaxcompress._solvers.wanda import wanda

OUT = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
IN = int(sys.argv[2]) if len(sys.argv) > 2 else 1024
REPEATS = int(sys.argv[3]) if len(sys.argv) > 3 else 9
GROUP, TOKENS = 128, 2048
MOST = {
    "hessian": 0.55,
    "gptq": 0.4,
    "sparsegpt 2:4": 0.45,
    "wanda 2:4": 0.06,
    "wanda 50 %": 0.15,
    "awq": 0.2,
}
FIRST_CALL = {"gptq": 2.0}  # seconds: trace, compile and run
LOG = pathlib.Path(__file__).parent / "logs" / "solvers.txt"
torch.set_num_threads(1)


def seconds(fn):
    start = time.process_time()
    jax.block_until_ready(fn())
    return time.process_time() - start


def main():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(OUT, IN)).astype(np.float32)
    mix = np.eye(IN) + 0.3 * rng.normal(size=(IN, IN)) / np.sqrt(IN)
    x = (rng.normal(size=(TOKENS, IN)) @ mix * rng.uniform(0.2, 2, IN)).astype(np.float32)
    h = x.T @ x
    norm, magnitude = np.sqrt(np.diag(h)), np.abs(x).mean(0)
    W, H, N, A = (jnp.asarray(a) for a in (w, h, norm, magnitude))
    tw, th, tn, tx = (torch.tensor(a) for a in (w, h, norm, x))
    int4 = formats.int4
    torch_hessian, sequences = torch_loops.Hessian(IN), tx.reshape(TOKENS // 128, 128, IN)
    add = jax.jit(COLLECTORS["gram"].update, static_argnums=3, donate_argnums=0)
    X, sums = jnp.asarray(x), [COLLECTORS["gram"].init((), IN)]

    def hessian():
        sums[0] = add(sums[0], X, jnp.float32(TOKENS), ())
        return sums[0]

    rows = [
        ("hessian", hessian, lambda: torch_hessian.add(sequences)),
        ("gptq", lambda: gptq(W, H, int4).w_q, lambda: torch_loops.gptq(tw, th)[0]),
        (
            "gptq g128",
            lambda: gptq(W, H, int4, group_size=GROUP).w_q,
            lambda: torch_loops.gptq(tw, th, GROUP)[0],
        ),
        ("cholesky", lambda: inverse_cholesky(H).u, lambda: torch_loops.factor(th)),
        (
            "sparsegpt 2:4",
            lambda: sparsegpt(W, H, nm=(2, 4)).w,
            lambda: torch_loops.sparsegpt(tw, th),
        ),
        ("wanda 2:4", lambda: wanda(W, N, nm=(2, 4)), lambda: torch_loops.wanda(tw, tn, (2, 4))),
        ("wanda 50 %", lambda: wanda(W, N, sparsity=0.5), lambda: torch_loops.wanda(tw, tn)),
        (
            "awq",
            lambda: awq(W, H, A, int4, group_size=GROUP).ratio,
            lambda: torch_loops.awq(tw, tx, GROUP),
        ),
    ]
    find_scales(W, int4)
    lines = []

    def say(line):
        print(line, flush=True)
        lines.append(line)

    say(
        f"jax {jax.__version__}, torch {torch.__version__}, {platform.machine()}, 1 core, "
        f"{OUT}x{IN}, {TOKENS} tokens, {REPEATS} repeats"
    )
    say(f"{'row':16}{'torch ms':>10}{'ours ms':>10}{'ratio':>8}{'most':>7}{'first s':>9}  agree")
    failed = False
    for name, own, loop in rows:
        first = seconds(own)
        pairs = [(seconds(loop), seconds(own)) for _ in range(REPEATS)]
        ratio = statistics.median(b / a for a, b in pairs)
        theirs, ours = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
        a, b = np.asarray(own()), np.asarray(loop())
        if name == "hessian":  # both are sums over all calls, with other factors
            a = np.asarray(COLLECTORS["gram"].finish(a))
            a, b = a / a[0, 0], b / b[0, 0]
        if name == "awq":
            agree = float(abs(a * 20 - b) < 0.5)
        else:
            agree = np.isclose(a, b, rtol=1e-3, atol=1e-4).mean()
        most, slowest = MOST.get(name), FIRST_CALL.get(name)
        failed |= most is not None and ratio > most
        failed |= slowest is not None and first > slowest
        say(
            f"{name:16}{theirs:10.1f}{ours:10.1f}{ratio:8.3f}{most or '':>7}{first:9.2f}  "
            f"{agree:.4f}"
        )
    LOG.write_text("\n".join(lines) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
