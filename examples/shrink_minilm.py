# SPDX-License-Identifier: Apache-2.0
"""A sentence encoder without a quarter of its heads and hidden units, or without a layer.

    python examples/shrink_minilm.py

The model, its calibration texts and its documents are those of `minilm.py`, which also says how
to get them. Every layer of the scan keeps its own heads and units; all keep the same number. Repair
sees the 128 background texts only, never the documents.
"""

import functools

import jax
import minilm

import jaxcompress as jc

HEADS, UNITS, LAYERS = "layers/out/w:2[0::32]", "layers/down/w:2", "layers/down/w:0"
BOTH = {HEADS: 9, UNITS: 1152}
ROWS = {  # what is kept, the importance, the repair
    "3/4 of heads and units": (BOTH, "wanda", None),
    "and biases": (BOTH, "wanda", "bias"),
    "and least squares": (BOTH, "wanda", "least_squares"),
    "the same, obs": (BOTH, "obs", "least_squares"),
    "3/4 of units, obs": ({UNITS: 1152}, "obs", "least_squares"),
    "3/4 of heads, obs": ({HEADS: 9}, "obs", "least_squares"),
    "5 of 6 layers": ({LAYERS: 5}, "wanda", None),
}


def main(rows=ROWS):
    task = minilm.task
    print(f"{'kept':<24}{'pearson':>9}{'cosine':>9}{'flops':>8}{'parameters':>14}")
    print(f"{'everything':<24}", end="")
    found = task.evaluate(functools.partial(jax.jit(task.apply), minilm.params))
    print(
        f"{found['pearson']:>9.4f}{found['cosine']:>9.4f}{1:>8.2f}{jc.nbytes(minilm.params):>14,}"
    )
    for name, (keep, importance, repair) in rows.items():
        small = jc.prune.shrink(
            task.apply,
            minilm.params,
            minilm.batches[0],
            keep=keep,
            importance=importance,
            calibration=minilm.batches,
            repair=repair,
        )
        found = task.evaluate(functools.partial(small.fn, small.params))
        before, after = small.report.flops
        print(
            f"{name:<24}{found['pearson']:>9.4f}{found['cosine']:>9.4f}"
            f"{after / before:>8.2f}{jc.nbytes(small.params):>14,}",
            flush=True,
        )


if __name__ == "__main__":
    main()
