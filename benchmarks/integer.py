# SPDX-License-Identifier: Apache-2.0
"""Products of integers over float32: int8 linear layers and convolutions, packed int4.

Linear: K = 1024 terms, N = 4096 columns, M = 1, 32 and 256 rows; the activation is quantized per
token inside what is measured, the weight is stored in int8. Convolutions: 3 x 3 of 32 and 64 channels.
int4 in groups of 128 is a loop over groups of products of int8, or dequantized for a float one,
as `jc.QTensor` does. onnxruntime
(MatMulInteger, u8 x s8) runs beside where it is installed, on one thread.

Usage: python benchmarks/integer.py [--short] [--rounds 15] [--out FILE]
"""

import argparse
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import jax
import jax.numpy as jnp
import numpy as np
from harness import integer_products, machine, measure, pin
from jax import lax

import jaxcompress as jc
from jaxcompress._quantize.grouped_dot import grouped_product
from jaxcompress._quantize.straight_through import codes_of

DIMS = ("NHWC", "HWIO", "NHWC")


def compiled(fn, *args):
    return jax.jit(fn).lower(*args).compile(), args


def in_groups(p, x):
    return grouped_product(codes_of(x, jc.Quantizer("int8", "token"), (1,), ()), p["w"])


def linear(m, k, n):
    """{candidate: (compiled, arguments)} of x [m, k] times w [k, n]."""
    x = jax.random.normal(jax.random.key(0), (m, k))
    w = jax.random.normal(jax.random.key(1), (k, n)) * k**-0.5
    dot = lambda p, x: x @ p["w"]  # noqa: E731
    int8 = {"w": jc.Quantizer("int8").quantize(w, axis=0)}
    int4 = {"w": jc.Quantizer("int4", "group:128").quantize(w, axis=0)}
    ours = jc.quantize_aware(dot, "w8a8", integer=True)
    out = {
        "float32": compiled(dot, {"w": w}, x),
        "int8": compiled(ours, int8, x),
        "int4 group 128": compiled(in_groups, int4, x),
        "int4 group 128, floats": compiled(jc.with_qtensors(dot), int4, x),
    }
    assert integer_products(out["int8"][0]) == 1
    error = jnp.abs(out["int8"][0](int8, x) - x @ w).max() / jnp.abs(x @ w).max()
    assert float(error) < 0.05
    if importlib.util.find_spec("onnxruntime"):
        out["onnxruntime u8 x s8"] = with_onnxruntime(np.asarray(x), np.asarray(int8["w"].codes))
    return out


def with_onnxruntime(x, w):
    """MatMulInteger of an unsigned activation and a signed weight; quantizing is left out."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "g", [info("x", TensorProto.UINT8, x.shape)],
        [info("y", TensorProto.INT32, (x.shape[0], w.shape[1]))],
        [numpy_helper.from_array(w, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options)
    codes = np.random.default_rng(0).integers(0, 256, x.shape).astype(np.uint8)
    return (lambda x: session.run(None, {"x": x})[0]), (codes,)


def conv(channels, batch, size):
    x = jax.random.normal(jax.random.key(0), (batch, size, size, channels))
    w = jax.random.normal(jax.random.key(1), (3, 3, channels, channels)) / 24

    def fn(p, x):
        return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=DIMS)

    int8 = {"w": jc.Quantizer("int8").quantize(w, axis=(2, 0, 1))}
    out = {
        "float32": compiled(fn, {"w": w}, x),
        "int8": compiled(jc.quantize_aware(fn, "w8a8", integer=True), int8, x),
    }
    assert integer_products(out["int8"][0]) == 1
    return out


def cases(short):
    k, n = (256, 512) if short else (1024, 4096)
    for m in (1, 32, 256):
        yield f"linear, {m} x {k} x {n}", linear(m, k, n)
    for channels in (32, 64):
        batch, size = (1, 8) if short else (16, 32)
        yield f"conv 3 x 3, {channels} channels", conv(channels, batch, size)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--short", action="store_true", help="small sizes, one round")
    parser.add_argument("--out", type=Path, help="append a table in Markdown to this file")
    args = parser.parse_args()
    pin()
    lines = ["", "## Products over float32", "", f"{machine()}.", ""]
    lines += ["| product | candidate | time | spread |", "|---|---|---|---|"]
    print(machine())
    for name, candidates in cases(args.short):
        times = measure(candidates, 1 if args.short else args.rounds)
        base = times["float32"][0]
        for label, (t, s) in times.items():
            print(f"{name:28}{label:26}{t / base:8.3f}{s:8.3f}", flush=True)
            lines.append(f"| {name} | {label} | {t / base:.2f} | {s:.2f} |")
    if args.out:
        with args.out.open("a") as f:
            print("\n".join(lines), file=f)


if __name__ == "__main__":
    main()
