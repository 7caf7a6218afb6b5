# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST: a conv net at a quarter of its FLOPs, against one of that size from scratch.

A net of four convolutions is trained on 20,000 images, made smaller by `jaxcompress.prune.shrink`
with `budget(flops=0.25)`, repaired by least squares on 1,000 of these images and trained on. The
nets from scratch have the sizes of that shrunk by L2 norms; one is trained for as many steps as the
small nets are trained on, the other for as many as these and the original together. Each finished
run is a line of `benchmarks/logs/shrink_study.jsonl`, and what is there is not run again.
Differences are paired by seed; the 95 % intervals are those of Student's t.

Usage: python benchmarks/shrink_study.py [--only original,l2] [--seeds 5] [--times]

FMNIST_DIR says where the images lie.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parent.parent))
from prune_study import read
from study import finished, print_differences

import jaxcompress as jc

LOG = Path(__file__).parent / "logs" / "shrink_study.jsonl"
TRAIN, BATCH, RATE, CALIBRATION = 20_000, 100, 3e-3, 1000
EPOCHS, TUNE = 6, 8
WIDTHS = (16, 32, 64, 64)
CONFIGS = {
    "original": "original",
    "l2": "L2, repair, fine-tuned",
    "taylor": "Taylor, repair, fine-tuned",
    "random": "random, repair, fine-tuned",
    "l2-plain": "L2, fine-tuned",
    "scratch": "that size from scratch, 8 epochs",
    "scratch-long": "that size from scratch, 14 epochs",
}
COMPARISONS = (
    ("l2", "original", "above -1.5"),
    ("taylor", "original", "above -1.5"),
    ("l2", "scratch", "above 0"),
    ("taylor", "scratch", "above 0"),
    ("l2", "scratch-long", "reported"),
    ("l2", "random", "reported"),
    ("l2", "l2-plain", "reported"),
)


def init(key, widths=WIDTHS):
    """He's initialization; biases are zero."""
    sizes, params = (1, *widths), {}
    for i, (a, b) in enumerate(zip(sizes, sizes[1:])):
        w = (2 / (9 * a)) ** 0.5 * jax.random.normal(jax.random.fold_in(key, i), (3, 3, a, b))
        params[f"conv{i}"] = {"w": w, "b": jnp.zeros((1, 1, 1, b))}
    w = widths[-1] ** -0.5 * jax.random.normal(jax.random.fold_in(key, 9), (widths[-1], 10))
    return params | {"dense": {"w": w, "b": jnp.zeros((1, 10))}}


def model(params, x):
    x = x.reshape(-1, 28, 28, 1)
    for i in range(4):
        p, step = params[f"conv{i}"], 2 if i in (0, 1, 3) else 1
        x = jax.lax.conv_general_dilated(
            x, p["w"], (step, step), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + p["b"])
    return x.mean((1, 2)) @ params["dense"]["w"] + params["dense"]["b"]


def fit(fn, params, data, epochs, rate, seed, advance):
    """Trains and returns the parameters; the schedule is a cosine to zero."""
    train_x, train_y = data
    tx = optax.adam(optax.cosine_decay_schedule(rate, epochs * TRAIN // BATCH))

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(fn(params, x), y).mean()

    @jax.jit
    def step(params, opt, x, y):
        g = jax.grad(loss)(params, x, y)
        updates, opt = tx.update(g, opt, params)
        return optax.apply_updates(params, updates), opt

    opt, rng = tx.init(params), np.random.default_rng(seed)
    for _ in range(epochs):
        for rows in rng.permutation(TRAIN).reshape(-1, BATCH):
            params, opt = step(params, opt, train_x[rows], train_y[rows])
        jax.block_until_ready(params)
        advance()
    return params


def accuracy(fn, params, data):
    x, y = data
    return 100 * float(jnp.mean(jnp.argmax(jax.jit(fn)(params, x), -1) == y))


def time_ratios():
    """Times of the small net over the original's: interleaved calls in one process, medians."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 784)).astype(np.float32)
    labels = rng.integers(0, 10, BATCH)
    params = init(jax.random.key(0))
    small = jc.prune.shrink(model, params, x[:1], keep=jc.prune.budget(flops=0.25))

    def loss(fn):
        def of(p):
            logits = fn(p, x[:BATCH])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return of

    pairs = [(model, params), (small.fn, small.params)]
    for what in ("forward, 1000 images", "gradient, 100 images"):
        if what.startswith("forward"):
            runs = [(jax.jit(lambda p, fn=fn: fn(p, x)), p) for fn, p in pairs]
        else:
            runs = [(jax.jit(jax.grad(loss(fn))), p) for fn, p in pairs]
        times = [[], []]
        for k in range(34):
            for (run, p), found in zip(runs, times):
                begin = time.perf_counter()
                jax.block_until_ready(run(p))
                if k > 3:
                    found.append(time.perf_counter() - begin)
        before, after = (1e3 * statistics.median(t) for t in times)
        print(f"{what}: {before:.1f} ms -> {after:.1f} ms, {after / before:.2f}")
    in_onnxruntime(pairs, x)


def in_onnxruntime(pairs, x):
    """Latency of the net and of the small net in onnxruntime, float and int8, one thread."""
    import tempfile

    import deploy

    batch = jax.export.symbolic_shape("batch, 784")
    static = jc.Quantizer("uint8", "tensor", range="static")
    recipe = jc.Recipe([jc.Rule("*", "int8", static)], "w8a8")
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for name, (fn, params) in zip(("original", "small"), pairs):
            packed = jc.quantize(fn, params, recipe, calibration=[x[:256]])
            for kind, (f, p) in {"float": (fn, params), "int8": packed[:2]}.items():
                path = f"{folder}/{name} {kind}.onnx"
                model = jc.export.onnx(f, p, jax.ShapeDtypeStruct(batch, x.dtype), path=path)
                assert np.allclose(model.run(x[:100]), jax.jit(f)(p, x[:100]), atol=0.1)
                sessions[f"{name} {kind}"] = deploy.session(path)
        feed = next(iter(sessions.values())).get_inputs()[0].name
        for n in (1, 32):
            times = deploy.latencies(sessions, feed, x[:n])
            ratios = {k: f"{t / times['original float']:.2f}" for k, t in times.items()}
            print(f"onnxruntime, batch {n}: {times['original float']:.3f} ms, {ratios}")


def shrunk(config, params, data):
    """The small net and its accuracy before it is trained on."""
    x, y = data[0][:CALIBRATION], data[1][:CALIBRATION]

    def loss(params, batch):
        logits = model(params, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    name = config.split("-")[0]
    importance = {
        "l2": "l2",
        "random": jc.prune.importance.random(0),
        "taylor": jc.prune.importance.taylor(loss),
    }[name]
    keep = jc.prune.budget(flops=0.25)
    if name == "taylor":  # its batches have labels, those of the repair have none
        batches = [{"x": a, "y": b} for a, b in zip(np.split(x, 10), np.split(y, 10))]
        first = jc.prune.shrink(
            model, params, x[:1], keep=keep, importance=importance, calibration=batches
        )
        keep = {row.name: row.indices for row in first.report.rows if row.indices is not None}
        importance = "l2"
    repair = None if config.endswith("plain") else "least_squares"
    return jc.prune.shrink(
        model, params, x[:1], keep=keep, importance=importance, calibration=[x], repair=repair
    )


def run(config, seed, train, test, original, advance):
    start, extra = time.perf_counter(), {}
    if config == "original":
        fn, params = (
            model,
            fit(model, init(jax.random.key(seed)), train, EPOCHS, RATE, seed, advance),
        )
    elif config.startswith("scratch"):
        small = shrunk("l2", original, train)
        widths = [small.params[f"conv{i}"]["w"].shape[-1] for i in range(4)]
        params = init(jax.random.key(100 + seed), widths)
        epochs = TUNE if config == "scratch" else EPOCHS + TUNE
        fn, params = model, fit(model, params, train, epochs, RATE, seed, advance)
    else:
        small = shrunk(config, original, train)
        fn, params = small.fn, small.params
        extra = {
            "flops": small.report.flops,
            "before_tuning": round(accuracy(fn, params, test), 2),
            "widths": [params[f"conv{i}"]["w"].shape[-1] for i in range(4)],
        }
        params = fit(fn, params, train, TUNE, RATE, seed, advance)
    found = {"accuracy": round(accuracy(fn, params, test), 2)} | extra
    return found | {"seconds": round(time.perf_counter() - start, 1)}, params


def summary(rows):
    of = {config: {r["seed"]: r for r in rows if r["config"] == config} for config in CONFIGS}
    titles = f"{'configuration':<36}{'seeds':>6}{'accuracy':>10}{'lowest':>8}{'untuned':>9}"
    print(f"{titles}{'s':>6}")
    for config, title in CONFIGS.items():
        if found := list(of[config].values()):
            mean = np.mean([r["accuracy"] for r in found])
            untuned = [r["before_tuning"] for r in found if "before_tuning" in r]
            before = f"{np.mean(untuned):.2f}" if untuned else ""
            t = np.median([r["seconds"] for r in found])
            low = min(r["accuracy"] for r in found)
            print(f"{title:<36}{len(found):>6}{mean:>10.2f}{low:>8.2f}{before:>9}{t:>6.0f}")
    print_differences(of, CONFIGS, COMPARISONS, 56)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(CONFIGS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--times", action="store_true", help="only the ratios of times")
    args = parser.parse_args()
    if args.times:
        return time_ratios()
    done = {(row["config"], row["seed"]) for row in finished(LOG)}
    configs = args.only.split(",")
    plan = [(c, s) for s in range(args.seeds) for c in configs if (c, s) not in done]
    if plan:
        images, labels = read("train")
        train, test = jax.tree.map(jnp.asarray, ((images[:TRAIN], labels[:TRAIN]), read("t10k")))
    originals: dict = {}
    with Progress() as progress:
        bar = progress.add_task("", total=len(plan) * EPOCHS)
        for config, seed in plan:
            progress.update(bar, description=f"{config}, seed {seed}")
            if config != "original" and seed not in originals:
                originals[seed] = fit(
                    model, init(jax.random.key(seed)), train, EPOCHS, RATE, seed, lambda: None
                )
            original = originals.get(seed)
            found, params = run(config, seed, train, test, original, lambda: progress.advance(bar))
            if config == "original":
                originals[seed] = params
            with LOG.open("a") as log:
                print(json.dumps({"config": config, "seed": seed} | found), file=log, flush=True)
    print(f"{EPOCHS} epochs of {TRAIN} images, {TUNE} more for the small ones, Adam {RATE}")
    summary(finished(LOG))


if __name__ == "__main__":
    main()
