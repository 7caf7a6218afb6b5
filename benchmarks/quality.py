# SPDX-License-Identifier: Apache-2.0
"""Quality at equal bits: ours, qwix, onnxruntime's quantizers and the published GPTQ loop in torch.

MiniLM (`examples/minilm.py`; for qwix its twin `minilm_linen.py`): Pearson correlation with human
ratings and mean cosine to the float embedding on 50 documents, calibrated on the same 128 texts.
The pretrained CNN (`examples/pretrained_mnist.py`): accuracy on 5,000 digits, calibrated on 256
images; qwix has no rules for plain JAX functions. Bytes are counted as stored, two int4 values a
byte; qwix and onnxruntime's 4 bits leave embedding tables in float32, ours have int8.

The torch loop is plugged in as a method of `jc.quantize`: same statistics, same blocks, its solver.

Usage: python benchmarks/quality.py [minilm] [cnn]
    needs qwix, torch, onnxruntime, sympy and what the examples need; prints, and writes
    benchmarks/logs/quality.txt

qwix: https://github.com/google/qwix, its PtqProvider and its GPTQ and AWQ (qwix.contrib).
"""

import functools
import os
import sys
import tempfile
from pathlib import Path

import deploy
import jax
import jax.numpy as jnp
import numpy as np
import qwix
import torch
import torch_loops
from harness import load_example
from qwix.contrib import awq, gptq

sys.path.insert(0, str(Path(__file__).parent.parent))
import jaxcompress as jc

LOG = Path(__file__).parent / "logs" / "quality.txt"


def of_qwix(kind, method, settings):
    """(function, bytes) of qwix on the Linen module."""
    example = load_example("minilm_linen")
    model, params, batches = example.MiniLM(), example.task.params["params"], example.minilm.batches
    parts = {"gptq": gptq.GptqRule, "awq": awq.AwqRule, "ptq": qwix.QuantizationRule}
    rule = parts[method](module_path=".*", **settings)
    serve = awq.AwqInferenceProvider if method == "awq" else qwix.PtqProvider
    small = qwix.quantize_model(model, serve([rule]))
    abstract = jax.eval_shape(small.init, jax.random.key(0), batches[0])["params"]
    if method == "ptq":
        new = qwix.quantize_params(params, abstract)
    else:
        module = {"gptq": gptq, "awq": awq}[method]
        provider = {"gptq": "GptqCalibrationProvider", "awq": "AwqCalibrationProvider"}[method]
        watched = qwix.quantize_model(model, getattr(module, provider)([rule]))
        seen = {}
        for x in batches:
            _, seen = watched.apply({"params": params, **seen}, x, mutable=["quant_stats"])
        new = module.quantize_params(params, abstract, seen["quant_stats"])
    size = sum(x.size // 2 if x.dtype == jnp.int4 else x.nbytes for x in jax.tree.leaves(new))
    return jax.jit(lambda x: small.apply({"params": new}, x)), size


def of_onnxruntime(kind, method, settings):
    """(function, bytes) of onnxruntime's quantizers, from the float function as ONNX."""
    apply, params, batches, _, shape, data = getattr(deploy, kind)()
    abstract = jax.ShapeDtypeStruct(shape, data.dtype)
    with tempfile.TemporaryDirectory() as folder:
        source, goal = f"{folder}/float.onnx", f"{folder}/small.onnx"
        jc.export.onnx(apply, params, abstract, path=source)
        name = deploy.session(source).get_inputs()[0].name
        deploy.theirs(method, source, goal, name, batches)
        return functools.partial(deploy.run, deploy.session(goal), name), os.path.getsize(goal)


def of_torch():
    """The published loop as a method: groups found on the way, no order, no search."""

    def round(layer):
        top, size = int(layer.weight.quantizer.top), layer.group_size
        w, gram = np.asarray(layer.w), np.asarray(layer.statistics["gram"])
        q, scale = np.empty_like(w), []
        for index in np.ndindex(w.shape[:-2]):
            hessian = 2 * torch.tensor(gram[index])
            q[index], s = torch_loops.gptq(torch.tensor(w[index]), hessian, size, top)
            scale.append(np.asarray(s))
        scale = np.stack(scale).reshape(*w.shape[:-1], -1)
        codes = np.rint(q / np.repeat(scale, size or w.shape[-1], -1))
        codes = layer.weight.quantizer.format.to_codes(jnp.asarray(codes))
        return layer.packed(codes, jnp.asarray(scale), None, None)

    return jc.methods.Method("torch", round=round, needs=("gram",), sequential=True)


def ours(kind, method, recipe):
    """(function, bytes) of jaxcompress, or of a method that is plugged into it."""
    example = load_example({"minilm": "minilm", "cnn": "pretrained_mnist"}[kind])
    made = {"torch": of_torch, "unsearched": lambda: jc.methods.gptq(search=False)}
    method = [made[m]() if m in made else m for m in method.split("+")]
    params = example.task.params
    small = jc.quantize(example.apply, params, recipe, calibration=example.batches, method=method)
    return functools.partial(jax.jit(small.fn), small.params), jc.nbytes(small.params)


def grouped(bits):
    table = jc.Rule("*", "int8", op="gather")
    return jc.Recipe([table, jc.Rule("*", jc.Quantizer(f"int{bits}", "group:32"))], f"w{bits}-g32")


def all_codes():
    """All sixteen codes of int4, as qwix and onnxruntime use them."""
    table = jc.Rule("*", "int8", op="gather")
    four = jc.Quantizer("int4_full", "group:32", convention="signed")
    return jc.Recipe([table, jc.Rule("*", four)], "w4-full")


def channels(bits):
    return jc.Recipe([jc.Rule("*", jc.Quantizer(f"int{bits}", "channel"))], f"w{bits}")


INT8 = {"weight_qtype": "int8", "act_qtype": "int8"}
INT4 = {"weight_qtype": "int4", "tile_size": 32}
STATIC = deploy.one_range("w8a8-uint8", range="static")
ROWS = {
    "minilm": (
        ("w8a8", "qwix", of_qwix, "ptq", INT8),
        ("w8a8", "onnxruntime, dynamic", of_onnxruntime, "dynamic", {}),
        ("w8a8", "ours, rtn", ours, "rtn", "w8a8"),
        ("w8a8 static", "onnxruntime", of_onnxruntime, "static", {}),
        ("w8a8 static", "ours", ours, "rtn", STATIC),
        ("w4-g32", "qwix, to nearest", of_qwix, "ptq", INT4),
        ("w4-g32", "onnxruntime", of_onnxruntime, "4 bit", {}),
        ("w4-g32", "ours, rtn", ours, "rtn", grouped(4)),
        ("w4-g32", "ours, rtn, int4_full", ours, "rtn", all_codes()),
        ("w4-g32", "ours, mse", ours, "mse", grouped(4)),
        ("w4-g32", "qwix, AWQ", of_qwix, "awq", INT4),
        ("w4-g32", "ours, awq", ours, "awq", grouped(4)),
        ("w4-g32", "qwix, GPTQ", of_qwix, "gptq", INT4),
        ("w4-g32", "published GPTQ loop", ours, "torch", grouped(4)),
        ("w4-g32", "ours, gptq", ours, "gptq", grouped(4)),
        ("w4-g32", "ours, gptq, int4_full", ours, "unsearched", all_codes()),
        ("w3-g32", "published GPTQ loop", ours, "torch", grouped(3)),
        ("w3-g32", "ours, gptq", ours, "gptq", grouped(3)),
        ("w3-g32", "ours, awq+gptq", ours, "awq+gptq", grouped(3)),
    ),
    "cnn": (
        ("w8a8", "onnxruntime, dynamic", of_onnxruntime, "dynamic", {}),
        ("w8a8", "ours, rtn", ours, "rtn", "w8a8"),
        ("w8a8 static", "onnxruntime", of_onnxruntime, "static", {}),
        ("w8a8 static", "ours", ours, "rtn", STATIC),
        ("w4", "ours, rtn", ours, "rtn", channels(4)),
        ("w4", "published GPTQ loop", ours, "torch", channels(4)),
        ("w4", "ours, gptq", ours, "gptq", channels(4)),
        ("w2", "ours, rtn", ours, "rtn", channels(2)),
        ("w2", "published GPTQ loop", ours, "torch", channels(2)),
        ("w2", "ours, gptq", ours, "gptq", channels(2)),
        ("w2", "ours, gptq+bias_correction", ours, "gptq+bias_correction", channels(2)),
    ),
}


def main():
    lines = []

    def say(line):
        print(line, flush=True)
        lines.append(line)

    say(f"qwix {qwix.__version__}, torch {torch.__version__}, jax {jax.__version__}")
    for kind in sys.argv[1:] or ROWS:
        example = load_example({"minilm": "minilm", "cnn": "pretrained_mnist"}[kind])
        metrics = {"minilm": ("pearson", "cosine"), "cnn": ("accuracy",)}[kind]
        say("")
        say(f"{kind:<13}{'by':<28}" + "".join(f"{m:>9}" for m in metrics) + f"{'bytes':>13}")
        for bits, name, make, method, settings in ROWS[kind]:
            try:
                fn, size = make(kind, method, settings)
                found = example.evaluate(fn)
                numbers = "".join(f"{found[m]:>9.4f}" for m in metrics) + f"{size:>13,}"
            except Exception as error:
                if make is ours:
                    raise
                numbers = f"  {type(error).__name__}: {str(error).splitlines()[0][:80]}"
            say(f"{bits:<13}{name:<28}{numbers}")
    LOG.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
