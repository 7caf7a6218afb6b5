# SPDX-License-Identifier: Apache-2.0
"""What calibrating and solving a whole model costs: MiniLM by GPTQ, in time and in memory.

128 sequences of 128 tokens, `w4a16-g32`. Time is that of `jc.quantize`, everything included, over
one pass of the float function that sums the Hessians of all its linear layers, compiled before.
Memory are the arrays that are alive whenever a layer has just been solved, with its statistics and
all results so far, over the model and the Hessians of one block; scratch memory of running programs
is in the peak of the process only.
The solvers of one layer, against torch, are in `benchmarks/solvers.py`.

Usage: python benchmarks/ptq.py     (needs what examples/minilm.py needs; writes logs/ptq.txt)
"""

import os
import pathlib
import resource
import statistics
import sys
import time

import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from harness import load_example  # noqa: E402

import jaxcompress as jc  # noqa: E402
from jaxcompress._calibration import layerwise  # noqa: E402

LOG = ROOT / "benchmarks" / "logs" / "ptq.txt"
TIMES, MEMORY = 3.0, 1.2


class Held:
    """The most bytes of arrays that are alive when a layer has just been solved."""

    def __init__(self):
        self.most, self.check = 0, layerwise.check_result

    def sample(self, *args):
        self.most = max(self.most, sum(x.nbytes for x in jax.live_arrays()))
        return self.check(*args)

    def __enter__(self):
        layerwise.check_result = self.sample
        return self

    def __exit__(self, *_):
        layerwise.check_result = self.check


class Compiling:
    """Seconds that go into tracing, lowering and compiling."""

    def __init__(self):
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self.hear)

    def hear(self, event, seconds, **_):
        self.seconds += seconds if event.startswith("/jax/core/compile/") else 0.0


def hessian_pass(model):
    """Runs all batches through the float function and sums x xᵀ of every linear layer; compiled."""
    # Queries and values read what keys do.
    sites = [f"layers/{name}/w" for name in ("key", "out", "up", "down")]

    @jax.jit
    def step(sums, params, x):
        _, seen = jc.tap(model.apply, "layers*")(params, x)
        flat = [seen[n].reshape(6, -1, seen[n].shape[-1]) for n in sites]
        return [a + jnp.einsum("lti,ltj->lij", v, v) for a, v in zip(sums, flat, strict=True)]

    def run():
        sums = [jnp.zeros((6, n, n)) for n in (384, 384, 384, 1536)]
        for x in model.batches:
            sums = step(sums, model.params, x)
        return jax.block_until_ready(sums)

    run()
    return run


def timed(fn):
    start = time.perf_counter()
    out = fn()
    return time.perf_counter() - start, out


def main():
    model, lines, compiling = load_example("minilm"), [], Compiling()

    def say(line):
        print(line, flush=True)
        lines.append(line)

    say(f"jax {jax.__version__}, {os.cpu_count()} cores; MiniLM, 128 sequences of 128 tokens")
    base = hessian_pass(model)

    def solve():
        out = jc.quantize(
            model.apply, model.params, "w4a16-g32", calibration=model.batches, method="gptq"
        )
        return jax.block_until_ready(out)

    rows = []
    for _ in range(3):
        float_ = timed(base)[0]
        compiling.seconds = 0.0
        with Held() as held:
            whole = timed(solve)[0]
        rows.append((float_, whole, compiling.seconds, held.most))
    float_, whole, compiled, most = (statistics.median(c) for c in zip(*rows, strict=True))
    say(
        f"float pass with Hessians {float_:.2f} s; whole GPTQ {whole:.2f} s, of which compiling "
        f"{compiled:.2f} s: {whole / float_:.2f} of it (at most {TIMES})"
    )
    block = 4 * (3 * 384**2 + 1536**2)
    limit = jc.nbytes(model.params) + block
    say(
        f"arrays held at most {most / 2**20:.0f} MiB, model and Hessians of a block "
        f"{limit / 2**20:.0f} MiB: {most / limit:.2f} (at most {MEMORY})"
    )
    say(f"peak of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")
    LOG.write_text("\n".join(lines) + "\n")
    sys.exit(whole > TIMES * float_ or most > MEMORY * limit)


if __name__ == "__main__":
    main()
