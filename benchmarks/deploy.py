# SPDX-License-Identifier: Apache-2.0
"""ONNX models in onnxruntime: ours beside its own quantizers, latency and quality.

An MLP (784-512-512-10, trained here on Fashion-MNIST), the pretrained CNN on MNIST digits and
MiniLM. Every model is exported in float by `jc.export.onnx`; onnxruntime's `quantize_static` (QDQ,
uint8 activations, int8 weights per channel, min-max), `quantize_dynamic` (int8 per channel) and
4-bit weights (blocks of 32) start from that file and the same calibration inputs. Ours start from
the function. Latency is the least of interleaved rounds (A B ... B A) on one thread, over that of
the float model; quality is accuracy, or for MiniLM the cosine to the float embedding.

Usage: python benchmarks/deploy.py [mlp] [cnn] [minilm]
    needs onnxruntime, sympy, Fashion-MNIST and what the examples need; prints and writes
    benchmarks/logs/deploy.txt
"""

import contextlib
import functools
import io
import os
import pathlib
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime as ort
import optax
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from harness import load_example  # noqa: E402

import jaxcompress as jc  # noqa: E402

LOG = ROOT / "benchmarks" / "logs" / "deploy.txt"
ROUNDS, LEAST = 12, 0.04


def mlp():
    fashion = load_example("compress_all")
    (x, y), (tx, ty) = (fashion.read(part) for part in ("train", "t10k"))
    sizes, key = (784, 512, 512, 10), jax.random.key(0)
    params = [
        {"w": jax.random.normal(k, (a, b)) * (2 / a) ** 0.5, "b": jnp.zeros(b)}
        for k, a, b in zip(jax.random.split(key, 3), sizes, sizes[1:])
    ]

    def apply(params, x):
        for i, p in enumerate(params):
            x = (jax.nn.relu(x) if i else x) @ p["w"] + p["b"]
        return x

    tx_ = optax.adam(1e-3)

    @jax.jit
    def step(params, opt, x, y):
        def loss(params):
            found = optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y)
            return found.mean()

        updates, opt = tx_.update(jax.grad(loss)(params), opt)
        return optax.apply_updates(params, updates), opt

    opt, order = tx_.init(params), np.random.default_rng(0).permutation(len(x))
    for i in range(0, len(order) - 127, 128):
        params, opt = step(params, opt, x[order[i : i + 128]], y[order[i : i + 128]])
    x, tx = (np.asarray(v, np.float32) for v in (x, tx))

    def evaluate(predict):
        return float(np.mean(np.argmax(predict(tx), -1) == np.asarray(ty)))

    batches = [x[i : i + 64] for i in range(0, 512, 64)]
    return apply, params, batches, evaluate, jax.export.symbolic_shape("batch, 784"), tx


def cnn():
    digits = load_example("pretrained_mnist")

    def evaluate(predict):
        return digits.evaluate(predict)["accuracy"]

    shape = jax.export.symbolic_shape("batch, 28, 28")
    return digits.apply, digits.task.params, digits.batches, evaluate, shape, digits.images


def minilm():
    model = load_example("minilm")

    def evaluate(predict):
        return model.evaluate(predict)["cosine"]

    texts = np.concatenate([b[:, :, :32] for b in model.batches], 1)
    shape = jax.export.symbolic_shape("two, batch, tokens", constraints=["tokens <= 512"])
    shape = (2, *shape[1:])
    return model.apply, model.params, model.batches, evaluate, shape, texts


def one_range(name, **settings):
    """int8 weights and uint8 activations with one range of the tensor."""
    table = jc.Rule("*", "int8", op="gather", shared=True, optional=True)
    return jc.Recipe(
        [table, jc.Rule("*", "int8", jc.Quantizer("uint8", "tensor", **settings))], name
    )


class Reader(CalibrationDataReader):
    def __init__(self, name, batches):
        self.rows = iter([{name: np.asarray(b)} for b in batches])

    def get_next(self):
        return next(self.rows, None)


def theirs(method, source, goal, feed, batches):
    """Writes the float model as onnxruntime's own quantizers make it."""
    weights = {"per_channel": True, "weight_type": QuantType.QInt8}
    with contextlib.redirect_stdout(io.StringIO()):
        if method == "static":
            quantize_static(
                source, goal, Reader(feed, batches), **weights,
                quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8,
            )  # fmt: skip
        elif method == "dynamic":
            quantize_dynamic(source, goal, **weights)
        else:
            four = MatMulNBitsQuantizer(source, bits=4, block_size=32, is_symmetric=True)
            four.process()
            four.model.save_model_to_file(os.fspath(goal))


def session(path):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


def latencies(sessions, name, x):
    """Least milliseconds a call, by session, of interleaved rounds."""
    best = dict.fromkeys(sessions, np.inf)
    for i in range(ROUNDS):
        for key in list(sessions)[:: 1 - i % 2 * 2]:
            start, calls = time.perf_counter(), 0
            while time.perf_counter() - start < LEAST:
                began = time.perf_counter()
                sessions[key].run(None, {name: x})
                best[key] = min(best[key], (time.perf_counter() - began) * 1e3)
                calls += 1
    return best


def measure(kind, say):
    apply, params, batches, evaluate, shape, data = globals()[kind]()
    abstract = jax.ShapeDtypeStruct(shape, data.dtype)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)

        def export(name, fn, params):
            return jc.export.onnx(fn, params, abstract, path=folder / f"{name}.onnx")

        export("float", apply, params)
        source = os.fspath(folder / "float.onnx")
        feed = session(source).get_inputs()[0].name
        kernels = {}
        recipes = [
            "w8a8-static",
            one_range("w8a8-uint8", range="static"),
            "w8a8",
            one_range("dynamic uint8"),
            "w4a16-g32",
        ]
        for recipe in recipes:
            name = getattr(recipe, "name", recipe)
            small = jc.quantize(apply, params, recipe, calibration=batches)
            kernels[f"ours {name}"] = export(f"ours {name}", small.fn, small.params).audit()
        if kind == "minilm":  # the tables of words in int4 too
            table, four = (jc.Quantizer("int4", f"group:{n}") for n in (64, 32))
            rules = [jc.Rule("*", table, op="gather", shared=True), jc.Rule("*", four)]
            for method in ("rtn", "gptq"):
                small = jc.quantize(
                    apply, params, jc.Recipe(rules, "w4"), calibration=batches, method=method
                )
                name = f"ours w4 tables, {method}"
                kernels[name] = export(name, small.fn, small.params).audit()
        for method in ("static", "dynamic", "4 bit"):
            theirs(method, source, folder / f"theirs {method}.onnx", feed, batches)
        names = ["float", *kernels, "theirs static", "theirs dynamic", "theirs 4 bit"]
        sessions = {name: session(folder / f"{name}.onnx") for name in names}
        times = {}
        for n in (1, 32):
            x = data[:, :n] if kind == "minilm" else data[:n]
            times[n] = latencies(sessions, feed, np.ascontiguousarray(x))
        size = (folder / "float.onnx").stat().st_size
        say(
            f"\n{kind}: float {times[1]['float']:.3f} ms at batch 1, {times[32]['float']:.3f} at 32"
        )
        say(
            f"{'':22} {'quality':>8} {'bytes':>7} {'batch 1':>8} {'batch 32':>8}  kernels in floats"
        )
        for name in names:
            quality = evaluate(functools.partial(run, sessions[name], feed))
            bytes_ = (folder / f"{name}.onnx").stat().st_size / size
            ratio = [times[n][name] / times[n]["float"] for n in (1, 32)]
            left = kernels[name].fallbacks if name in kernels else None
            about = "" if left is None else ", ".join(row.site for row in left) or "none"
            say(f"{name:22} {quality:8.4f} {bytes_:7.3f} {ratio[0]:8.2f} {ratio[1]:8.2f}  {about}")


def run(session_, name, x):
    return session_.run(None, {name: np.asarray(x)})[0]


def main():
    kinds = sys.argv[1:] or ["mlp", "cnn", "minilm"]
    lines = []

    def say(line):
        print(line, flush=True)
        lines.append(line)

    say(f"onnxruntime {ort.__version__}, jax {jax.__version__}, one thread")
    for kind in kinds:
        measure(kind, say)
    LOG.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
