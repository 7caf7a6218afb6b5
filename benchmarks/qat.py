# SPDX-License-Identifier: Apache-2.0
"""Train step of quantization-aware models over the float32 step: time, trace, compile, memory.

Candidates: stock float32; float32 with every product collapsed to two dimensions; float fake
quantization by hand, in a few lines; `jc.quantize_aware` with the integer forward (the default
choice by shape), and in floats; qwix where it is installed. All are the gradient of the same loss
and plain SGD. Every gradient must be nonzero, and every loss that of float32 within 5 %.

Usage: python benchmarks/qat.py [--short] [--only mlp,transformer] [--rounds 15] [--out FILE]
"""

import argparse
import functools
import importlib.util
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import jax
import jax.numpy as jnp
from harness import assert_alive, build, integer_products, machine, measure, pin
from jax import lax

import jaxcompress as jc

IMAGES = ("NHWC", "HWIO", "NHWC")


def keys(seed):
    key = jax.random.key(seed)
    while True:
        key, sub = jax.random.split(key)
        yield sub


def matrix(key, *shape):
    fan = 1
    for n in shape[:-1]:
        fan *= n
    return jax.random.normal(key, shape) * fan**-0.5


def norm(x):
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def softmax_loss(logits, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1))


# ---------------------------------------------------------------------- models: fn(ops, params, x)


def mlp(ops, p, x):
    x = jax.nn.relu(ops.dot(x, p[0]))
    return ops.dot(jax.nn.relu(ops.dot(x, p[1])), p[2])


def mlp_case(short):
    k, n, d = keys(0), 32 if short else 256, 64 if short else 1024
    p = [matrix(next(k), 784, d), matrix(next(k), d, d), matrix(next(k), d, 10)]
    return mlp, p, jax.random.normal(next(k), (n, 784)), jax.random.randint(next(k), (n,), 0, 10)


def block(ops, p, x, heads, causal):
    b, s, d = x.shape
    h = norm(x)
    q, k, v = (ops.dot(h, p[n]).reshape(b, s, heads, -1) for n in ("q", "k", "v"))
    a = jnp.einsum("bihd,bjhd->bhij", q, k) * (d // heads) ** -0.5
    if causal:
        a = jnp.where(jnp.tril(jnp.ones((1, 1, s, s), bool)), a, -1e9)
    x = x + ops.dot(jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(a), v).reshape(x.shape), p["o"])
    return x + ops.dot(jax.nn.gelu(ops.dot(norm(x), p["up"])), p["down"])


def transformer(ops, p, ids, heads=4, causal=False):
    x = p["embed"][ids]
    if isinstance(p["layers"], dict):  # stacked
        x, _ = lax.scan(lambda x, w: (block(ops, w, x, heads, causal), None), x, p["layers"])
    else:
        for layer in p["layers"]:
            x = block(ops, layer, x, heads, causal)
    return ops.dot(norm(x), p["head"])


def transformer_case(short, d=256, layers=4, heads=4, seq=128, batch=16, causal=False):
    k = keys(1)
    if short:
        d, layers, seq, batch = 16 * heads, 2, 16, 2
    vocab = 256

    def layer():
        shapes = {**dict.fromkeys("qkvo", (d, d)), "up": (d, 4 * d), "down": (4 * d, d)}
        return {n: matrix(next(k), *s) for n, s in shapes.items()}

    p = {"embed": jax.random.normal(next(k), (vocab, d)), "head": matrix(next(k), d, vocab)}
    p["layers"] = [layer() for _ in range(layers)]
    ids = jax.random.randint(next(k), (batch, seq + 1), 0, vocab)
    fn = functools.partial(transformer, heads=heads, causal=causal)
    return fn, p, ids[:, :-1], ids[:, 1:]


def decoder_case(short):
    return transformer_case(short, d=384, layers=3, heads=6, seq=128, batch=8, causal=True)


def scanned_case(short):
    fn, p, x, y = transformer_case(short, d=128, layers=8, causal=True)
    return fn, p | {"layers": jax.tree.map(lambda *w: jnp.stack(w), *p["layers"])}, x, y


def scaled(x):
    return x * lax.rsqrt(jnp.mean(x * x, (0, 1, 2), keepdims=True) + 1e-5)


def resnet(ops, p, x):
    x = jax.nn.relu(scaled(ops.conv(x, p["stem"])))
    for stage in p["stages"]:
        stride = 2 if "short" in stage else 1
        y = jax.nn.relu(scaled(ops.conv(x, stage["a"], stride)))
        y = scaled(ops.conv(y, stage["b"]))
        x = jax.nn.relu(y + (ops.conv(x, stage["short"], stride) if "short" in stage else x))
    return ops.dot(x.mean((1, 2)), p["head"])


def resnet_case(short):
    k, n, size = keys(2), 4 if short else 64, 8 if short else 32
    p = {"stem": matrix(next(k), 3, 3, 3, 16), "stages": [], "head": matrix(next(k), 64, 10)}
    for i, o in ((16, 16), (16, 32), (32, 64)):
        stage = {"a": matrix(next(k), 3, 3, i, o), "b": matrix(next(k), 3, 3, o, o)}
        if i != o:
            stage["short"] = matrix(next(k), 1, 1, i, o)
        p["stages"].append(stage)
    x = jax.random.normal(next(k), (n, size, size, 3))
    return resnet, p, x, jax.random.randint(next(k), (n,), 0, 10)


def mixer(ops, p, x):
    x = ops.dot(x, p["patch"])
    for layer in p["layers"]:
        h = jnp.swapaxes(norm(x), 1, 2)
        x = x + jnp.swapaxes(ops.dot(jax.nn.gelu(ops.dot(h, layer["t1"])), layer["t2"]), 1, 2)
        x = x + ops.dot(jax.nn.gelu(ops.dot(norm(x), layer["c1"])), layer["c2"])
    return ops.dot(norm(x).mean(1), p["head"])


def mixer_case(short):
    k = keys(3)
    n, s, d, layers = (2, 16, 32, 1) if short else (32, 64, 192, 4)
    p = {"patch": matrix(next(k), 48, d), "layers": [], "head": matrix(next(k), d, 10)}
    for _ in range(layers):
        shapes = {"t1": (s, 2 * s), "t2": (2 * s, s), "c1": (d, 4 * d), "c2": (4 * d, d)}
        p["layers"].append({name: matrix(next(k), *shape) for name, shape in shapes.items()})
    x = jax.random.normal(next(k), (n, s, 48))
    return mixer, p, x, jax.random.randint(next(k), (n,), 0, 10)


def depthwise(ops, p, x):
    x = jax.nn.relu(scaled(ops.conv(x, p["stem"])))
    for layer in p["layers"]:
        x = jax.nn.relu(scaled(ops.conv(x, layer["d"], 1, x.shape[-1])))
        x = jax.nn.relu(scaled(ops.conv(x, layer["p"])))
    return ops.dot(x.mean((1, 2)), p["head"])


def depthwise_case(short):
    k = keys(4)
    n, size, widths = (2, 8, (16, 32)) if short else (32, 16, (32, 64, 128, 128))
    p = {"stem": matrix(next(k), 3, 3, 3, widths[0]), "layers": []}
    for i, o in zip(widths, widths[1:]):
        layer = {"d": matrix(next(k), 3, 3, 1, i), "p": matrix(next(k), 1, 1, i, o)}
        p["layers"].append(layer)
    p["head"] = matrix(next(k), widths[-1], 10)
    x = jax.random.normal(next(k), (n, size, size, 3))
    return depthwise, p, x, jax.random.randint(next(k), (n,), 0, 10)


CASES = {
    "mlp": mlp_case, "transformer": transformer_case, "resnet": resnet_case,
    "mixer": mixer_case, "decoder": decoder_case, "depthwise": depthwise_case,
    "scanned": scanned_case,
}  # fmt: skip

# ---------------------------------------------------------------------- candidates


class Stock:
    """Products as one writes them."""

    @staticmethod
    def dot(x, w):
        return x @ w

    @staticmethod
    def conv(x, w, stride=1, groups=1):
        return lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=IMAGES, feature_group_count=groups
        )


class Collapsed(Stock):
    """Products of matrices: rows merged."""

    @staticmethod
    def dot(x, w):
        return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])


def fake(x, axis):
    """int8 with one scale over an axis, and a straight-through gradient."""
    scale = lax.stop_gradient(jnp.maximum(jnp.max(jnp.abs(x), axis, keepdims=True) / 127, 1e-12))
    return x + lax.stop_gradient(jnp.round(x / scale) * scale - x)


class ByHand(Stock):
    """Fake quantization in two lines."""

    @staticmethod
    def dot(x, w):
        return fake(x, -1) @ fake(w, 0)

    @staticmethod
    def conv(x, w, stride=1, groups=1):
        return Stock.conv(fake(x, (1, 2, 3)), fake(w, (0, 1, 2)), stride, groups)


def candidates(name, fn, p, x):
    stock = functools.partial(fn, Stock)
    out = {
        "float32": stock,
        "float32 again": lambda p, x: stock(p, x),
        "float32 collapsed": functools.partial(fn, Collapsed),
        "by hand": functools.partial(fn, ByHand),
        "jaxcompress": jc.quantize_aware(stock, RECIPE),
        "jaxcompress, floats": jc.quantize_aware(stock, RECIPE, integer=False),
    }
    # qwix 0.1.8 raises where a grouped convolution is differentiated, and has no layers to scan.
    if importlib.util.find_spec("qwix") and name not in ("depthwise", "scanned"):
        out["qwix"] = with_qwix(fn, p, x)
    return out


# The table of an embedding stays in float: the other candidates have it in float too.
RECIPE = jc.Recipe([jc.Rule("embed", None, optional=True), *jc.recipes.get("w8a8").rules])


class Named(NamedTuple):
    """A weight that a Flax layer of this name holds."""

    name: str
    shape: tuple


def with_qwix(fn, p, x):
    """The same function of Flax layers, quantized by qwix: int8 weights and activations."""
    import qwix
    from flax import linen as nn

    class Layers(Stock):
        @staticmethod
        def dot(x, w):
            return nn.Dense(w.shape[1], use_bias=False, name=w.name)(x)

        @staticmethod
        def conv(x, w, stride=1, groups=1):
            return nn.Conv(
                w.shape[-1], w.shape[:2], (stride, stride), "SAME",
                feature_group_count=groups, use_bias=False, name=w.name,
            )(x)  # fmt: skip

    paths, tree = jax.tree_util.tree_flatten_with_path(p)
    tables = ["embed" in jax.tree_util.keystr(path) for path, _ in paths]

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            leaves = [
                self.param(f"w{i}", lambda _, w=w: w) if table else Named(f"w{i}", w.shape)
                for i, ((_, w), table) in enumerate(zip(paths, tables, strict=True))
            ]
            return fn(Layers, jax.tree.unflatten(tree, leaves), x)

    rules = [qwix.QtRule(module_path=".*", weight_qtype="int8", act_qtype="int8")]
    model = qwix.quantize_model(Model(), qwix.QtProvider(rules))

    def apply(p, x):
        leaves = enumerate(zip(jax.tree.leaves(p), tables, strict=True))
        held = {f"w{i}": w if table else {"kernel": w} for i, (w, table) in leaves}
        return model.apply({"params": held}, x)

    rounded = str(jax.make_jaxpr(apply)(p, x)).count("round")
    assert rounded >= 2 * tables.count(False), f"qwix rounds {rounded} operands"
    return apply


def step_of(fn):
    def step(p, x, y):
        loss, g = jax.value_and_grad(lambda p: softmax_loss(fn(p, x), y))(p)
        return jax.tree.map(lambda p, g: p - 0.01 * g, p, g), loss, g

    return step


def run(name, short, rounds):
    """Rows of (candidate, ratios of step, trace and lower, compile, memory, eager call).

    Tracing and compiling are of functions that no cache knows, in a warm process: medians of
    three, candidates in turns. An eager call is one forward pass of the function itself, over the
    jitted float one.
    """
    fn, p, x, y = CASES[name](short)
    functions = candidates(name, fn, p, x)
    compiled, costs, losses = {}, {label: [] for label in functions}, {}
    for turn in range(2 if short else 4):
        for label in list(functions)[:: 1 - turn % 2 * 2]:
            f = candidates(name, fn, p, x)[label]
            c, cost = build(step_of(f), (p, x, y))
            costs[label] += [cost] * (turn > 0)
            compiled[label] = (c, (p, x, y))
    for label, (c, args) in compiled.items():
        _, losses[label], g = c(*args)
        assert_alive(g, f"{name}, {label}")
    for label, loss in losses.items():
        assert abs(float(loss - losses["float32"])) < 0.05 * float(losses["float32"]), label
    cost = {label: [statistics.median(t) for t in zip(*rows)] for label, rows in costs.items()}
    times = measure(compiled, rounds)
    eager = {"float32": (jax.jit(functions["float32"]), (p, x))}
    eager |= {label: (f, (p, x)) for label, f in functions.items() if "jaxcompress" in label}
    calls = measure(eager, rounds)
    base, integers = times["float32"][0], integer_products(compiled["jaxcompress"][0])
    print(f"\n{name}: float32 step {base * 1e3:.2f} ms; {integers} products of integers")
    heads = ("step", "+-", "trace", "compile", "temp", "memory", "eager")
    print(" " * 22 + "".join(f"{head:>8}" for head in heads))
    rows = []
    for label, (t, s) in times.items():
        ratios = (t / base, s, *(a / b for a, b in zip(cost[label], cost["float32"])))
        call = f"{calls[label][0] / calls['float32'][0]:.2f}" if label in calls else ""
        rows.append((label, *(f"{r:.2f}" for r in ratios), call))
        print(f"{label:22}" + "".join(f"{r:8.3f}" for r in ratios) + f"{call:>8}")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--short", action="store_true", help="tiny models, one round: does it work")
    parser.add_argument("--out", type=Path, help="append a table in Markdown to this file")
    args = parser.parse_args()
    pin()
    print(machine())
    found = {n: run(n, args.short, 1 if args.short else args.rounds) for n in args.only.split(",")}
    if args.out:
        with args.out.open("a") as f:
            print(f"\n## Train step over float32\n\n{machine()}, {args.rounds} rounds.\n", file=f)
            head = "model | candidate | step | spread | trace + lower | compile | temp | memory"
            print(f"| {head} | eager |\n|{'---|' * 9}", file=f)
            for name, rows in found.items():
                for row in rows:
                    print(f"| {' | '.join((name, *row))} |", file=f)


if __name__ == "__main__":
    main()
