# SPDX-License-Identifier: Apache-2.0
"""What distillation costs: `vocab_kl` over full logits, a step over its parts, taps over returns.

1. Value and gradients of KL over a vocabulary, T=4096 tokens, V=32000, D=256, fused in chunks
   against two full logits: time, and XLA's temporary memory.
2. A train step with a teacher against a student step plus the teacher's forward pass, run alone.
3. A loss on features of 12 tapped sites against a model that returns them by hand.

All variants take turns (A B A B) in one process; ratios are of medians.

Usage: python benchmarks/distill.py [--rounds 7] [--tokens 4096] [--vocab 32000] [--width 256]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent.parent))
import jaxcompress as jc

KL = jc.distill.kl(temperature=2.0)


def seconds(variants, args, rounds):
    """Median seconds of each compiled function, in turns, after one round of warming up."""
    times = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, fn in variants.items():
            start = time.perf_counter()
            jax.block_until_ready(fn(*args[name]))
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def vocabulary(tokens, vocab, width, rounds):
    keys = jax.random.split(jax.random.key(0), 4)
    args = [jax.random.normal(k, (tokens, width)) for k in keys[:2]]
    heads = [jax.random.normal(k, (width, vocab)) / width**0.5 for k in keys[2:]]
    args = (args[0], heads[0], args[1], heads[1])
    losses = {
        "full": lambda h, w, t, v: KL(h @ w, t @ v),
        "fused": lambda h, w, t, v: jc.distill.vocab_kl(h, w, t, v, temperature=2.0),
    }
    compiled = {
        name: jax.jit(jax.value_and_grad(f, (0, 1))).lower(*args).compile()
        for name, f in losses.items()
    }
    bytes_ = {n: c.memory_analysis().temp_size_in_bytes for n, c in compiled.items()}
    found = seconds(compiled, dict.fromkeys(compiled, args), rounds)
    (full, d_full), (fused, d_fused) = (compiled[n](*args) for n in ("full", "fused"))
    apart = max(float(jnp.abs(a - b).max() / jnp.abs(a).max()) for a, b in zip(d_full, d_fused))
    print(f"vocabulary {vocab}, {tokens} tokens, width {width}; full -> fused")
    print(f"  time    {found['full']:.3f} s -> {found['fused']:.3f} s, ratio "
          f"{found['fused'] / found['full']:.2f}")  # fmt: skip
    print(f"  memory  {bytes_['full'] / 1e6:.0f} MB -> {bytes_['fused'] / 1e6:.0f} MB, ratio "
          f"{bytes_['fused'] / bytes_['full']:.4f}")  # fmt: skip
    print(f"  loss {full:.6f} and {fused:.6f}, gradients within {apart:.1e}", flush=True)


def layers(key, width, count=12):
    return [jax.random.normal(k, (width, width)) / width**0.5 for k in jax.random.split(key, count)]


def model(params, x):
    for w in params:
        x = jax.nn.relu(x @ w)
    return x


def model_with_features(params, x):
    seen = []
    for w in params:
        seen.append(x)
        x = jax.nn.relu(x @ w)
    return x, seen


def steps(rounds):
    student, teacher = layers(jax.random.key(1), 256), layers(jax.random.key(2), 256)
    wide = layers(jax.random.key(3), 1024, 4)
    x = jax.random.normal(jax.random.key(4), (512, 256))

    def big(params, x):  # a teacher of another width
        x = jnp.pad(x, ((0, 0), (0, 768)))
        return model(params, x)[:, :256]

    def sgd(loss, params, *args):
        (value, _), g = jax.value_and_grad(loss, has_aux=True)(params, *args)
        return value, jax.tree.map(lambda p, g: p - 1e-3 * g, params, g)

    distilled = jc.distill.loss_fn(model, big, KL)
    fixed = jax.random.normal(jax.random.key(5), (512, 256))
    variants = {
        "step with teacher": jax.jit(
            lambda p, t, x: sgd(lambda p, x: distilled(p, x, teacher_params=t), p, x)
        ),
        "student step": jax.jit(
            lambda p, t, x: sgd(lambda p, x: (KL(model(p, x), fixed), {}), p, x)
        ),
        "teacher forward": jax.jit(lambda p, t, x: big(t, x)),
    }
    args = dict.fromkeys(variants, (student, wide, x))
    found = seconds(variants, args, rounds)
    parts = found["student step"] + found["teacher forward"]
    both = found["step with teacher"]
    print("step with a teacher over student step + teacher forward, each run alone")
    print(f"  time    {parts:.4f} s -> {both:.4f} s, ratio {both / parts:.2f}", flush=True)

    fit = jc.distill.fitnet()
    tapped = jc.distill.loss_fn(model, model, KL, match=jc.distill.match("*", "*", fit))

    def by_hand(p, x, teacher_params):
        out, ours = model_with_features(p, x)
        said, theirs = model_with_features(teacher_params, x)
        pairs = zip(ours, theirs, strict=True)
        return KL(out, said) + sum(fit(a, b) for a, b in pairs) / len(ours), {}

    variants = {
        name: jax.jit(lambda p, t, x, f=f: sgd(lambda p, x: f(p, x, teacher_params=t), p, x))
        for name, f in (("by hand", by_hand), ("tapped", tapped))
    }
    found = seconds(variants, dict.fromkeys(variants, (student, teacher, x)), rounds)
    a, b = found["by hand"], found["tapped"]
    print("features of 12 sites: returned by hand -> tapped")
    print(f"  time    {a:.4f} s -> {b:.4f} s, ratio {b / a:.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rounds", 7), ("tokens", 4096), ("vocab", 32000), ("width", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.default_backend()}, median of {args.rounds} rounds")
    vocabulary(args.tokens, args.vocab, args.width, args.rounds)
    steps(args.rounds * 5)


if __name__ == "__main__":
    main()
