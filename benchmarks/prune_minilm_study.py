# SPDX-License-Identifier: Apache-2.0
"""MiniLM: SparseGPT against magnitude and Wanda at 2:4, and 2:4 with int4 jointly or in turn.

Each seed calibrates on another 64 of the 128 background texts. A finished run is a line of
`benchmarks/logs/prune_minilm_study.jsonl`, and what is there is not run again; differences of the
cosine to the float embeddings, in points of 0.01, are paired by seed, with 95 % intervals of
Student's t. Magnitude looks at no data and is the same for all seeds.

Usage: python benchmarks/prune_minilm_study.py [--seeds 5]
"""

import argparse
import functools
import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parent.parent))
from study import finished, print_differences

import jaxcompress as jc
from jaxcompress import prune

LOG = Path(__file__).parent / "logs" / "prune_minilm_study.jsonl"
EXAMPLE = Path(__file__).parent.parent / "examples" / "prune_minilm.py"
TITLES = {
    "magnitude": "magnitude 2:4",
    "wanda": "Wanda 2:4",
    "sparsegpt": "SparseGPT 2:4",
    "joint": "2:4 and int4, jointly",
    "nearest": "2:4, then int4 to nearest",
    "gptq": "2:4, then int4 by GPTQ",
}
COMPARISONS = (
    ("sparsegpt", "magnitude", "above 0"),
    ("joint", "nearest", "above 0"),
    ("joint", "gptq", "reported"),
    ("sparsegpt", "wanda", "reported"),
)


def compressed(example, minilm, config, batches):
    """(function, parameters) of a configuration."""
    net, params, amount = minilm.apply, minilm.params, {"nm": (2, 4)}
    if config == "magnitude":
        return net, example.magnitude(params, amount)
    if config in ("wanda", "sparsegpt"):
        small = getattr(prune, config)(net, params, batches, pattern=example.LINEAR, **amount)
        return small.fn, small.params
    method = {
        "joint": jc.methods.sparsegpt(nm=(2, 4)),
        "nearest": "rtn",
        "gptq": jc.methods.gptq(keep_zeros=True),
    }[config]
    if config != "joint":
        params = prune.sparsegpt(net, params, batches, pattern=example.LINEAR, **amount).params
    small = jc.quantize(net, params, example.INT4, calibration=batches, method=method)
    return small.fn, small.params


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    spec = importlib.util.spec_from_file_location("prune_minilm", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    minilm = example.load_minilm()
    texts = np.concatenate(minilm.batches, axis=1)
    done = {(run["config"], run["seed"]) for run in finished(LOG)}
    todo = [(c, s) for s in range(seeds) for c in TITLES if (c, s) not in done]
    for config, seed in track(todo):
        rows = np.random.default_rng(seed).choice(texts.shape[1], 64, replace=False)
        fn, params = compressed(example, minilm, config, np.split(texts[:, rows], 4, axis=1))
        found = minilm.evaluate(functools.partial(jax.jit(fn), params))
        run = {"config": config, "seed": seed, "accuracy": round(100 * found["cosine"], 3)}
        with LOG.open("a") as file:
            file.write(json.dumps(run | {"pearson": round(found["pearson"], 4)}) + "\n")
    of = {c: {r["seed"]: r for r in finished(LOG) if r["config"] == c} for c in TITLES}
    print(f"{'100 x cosine to the float embedding':<40}{'mean':>7}{'lowest':>9}{'highest':>9}")
    for config, title in TITLES.items():
        found = [run["accuracy"] for run in of[config].values()]
        print(f"{title:<40}{np.mean(found):>7.2f}{min(found):>9.2f}{max(found):>9.2f}")
    print_differences(of, TITLES, COMPARISONS, 52)


if __name__ == "__main__":
    main()
