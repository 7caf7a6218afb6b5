# SPDX-License-Identifier: Apache-2.0
"""MiniLM after quantization at equal bits of the linear layers: ours beside qwix.

Both quantize the Flax Linen module of `examples/minilm_linen.py` with the same weights and, where a
method needs data, the same 128 background texts. Pearson correlation with human ratings and mean
cosine to the float embedding, on 50 documents; bytes are counted as stored, two int4 values a byte.
qwix leaves embedding tables in float32, ours have int8.

Usage: python benchmarks/quality.py        (needs qwix and what examples/minilm.py needs)

qwix: https://github.com/google/qwix, its PtqProvider and its GPTQ and AWQ (qwix.contrib).
"""

import functools
import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import qwix
from qwix.contrib import awq, gptq

sys.path.insert(0, str(Path(__file__).parent.parent))
import jaxcompress as jc

EXAMPLE = Path(__file__).parent.parent / "examples" / "minilm_linen.py"


def load_example():
    spec = importlib.util.spec_from_file_location("minilm_linen", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def theirs(example, method, settings):
    """(function, bytes) of qwix."""
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


def ours(example, method, recipe):
    """(function, bytes) of jaxcompress."""
    batches = example.minilm.batches
    small = jc.quantize(
        example.apply, example.task.params, recipe, calibration=batches, method=method
    )
    return functools.partial(jax.jit(small.fn), small.params), jc.nbytes(small.params)


def grouped(bits):
    table = jc.Rule("*", "int8", op="gather")
    return jc.Recipe([table, jc.Rule("*", jc.Quantizer(f"int{bits}", "group:32"))], f"w{bits}-g32")


INT8 = {"weight_qtype": "int8", "act_qtype": "int8"}
INT4 = {"weight_qtype": "int4", "tile_size": 32}
ROWS = (
    ("w8a8", "qwix", theirs, "ptq", INT8),
    ("w8a8", "ours, rtn", ours, "rtn", "w8a8"),
    ("w4-g32", "qwix, to nearest", theirs, "ptq", INT4),
    ("w4-g32", "ours, rtn", ours, "rtn", grouped(4)),
    ("w4-g32", "ours, mse", ours, "mse", grouped(4)),
    ("w4-g32", "qwix, AWQ", theirs, "awq", INT4),
    ("w4-g32", "ours, awq", ours, "awq", grouped(4)),
    ("w4-g32", "qwix, GPTQ", theirs, "gptq", INT4),
    ("w4-g32", "ours, gptq", ours, "gptq", grouped(4)),
)


def main():
    example = load_example()
    print(f"qwix {qwix.__version__}, jax {jax.__version__}")
    print(f"{'weights':<9}{'by':<20}{'pearson':>9}{'cosine':>9}{'bytes':>13}")
    for bits, name, make, method, settings in ROWS:
        try:
            fn, size = make(example, method, settings)
            found = example.minilm.evaluate(fn)
            numbers = f"{found['pearson']:>9.4f}{found['cosine']:>9.4f}{size:>13,}"
        except Exception as error:
            if make is ours:
                raise
            numbers = f"  {type(error).__name__}: {str(error).splitlines()[0][:80]}"
        print(f"{bits:<9}{name:<20}{numbers}", flush=True)


if __name__ == "__main__":
    main()
