# SPDX-License-Identifier: Apache-2.0
"""Products of integers and of packed weights over float32: linear layers and convolutions.

Linear: K = 1024 terms, N = 4096 columns, M = 1, 4, 32 and 256 rows; the weight is stored in int8,
in int4 in groups of 128, or in fp8 (E4M3). `w8a8` and `w4a8` quantize the activation per token
inside what is measured, and multiply integers where `quantize_aware` does; `w8a16`, `w4a16` and
`fp8` multiply floats, a part of the weight at a time. "x @ w.T": the weight is stored as [N, K],
like a tied embedding.
Convolutions: 3 x 3, 32 and 64 channels. onnxruntime (MatMulInteger, u8 x s8; MatMulNBits, int4 in
groups of 128, accuracy level 4) runs beside where it is installed, on one thread.

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

DIMS = ("NHWC", "HWIO", "NHWC")


def compiled(fn, *args):
    return jax.jit(fn).lower(*args).compile(), args


GROUPS = jc.Quantizer("int4", "group:128")
W4A8 = jc.Recipe([jc.Rule("*", weight=GROUPS, activation=jc.Quantizer("int8", "token"))])


def linear(m, k, n, turned=False):
    """{candidate: (compiled, arguments)} of x [m, k] times w [k, n], or w [n, k] transposed."""
    x = jax.random.normal(jax.random.key(0), (m, k))
    w = jax.random.normal(jax.random.key(1), (n, k) if turned else (k, n)) * k**-0.5
    dot = lambda p, x: x @ (p["w"].T if turned else p["w"])  # noqa: E731
    int8 = {"w": jc.Quantizer("int8").quantize(w, axis=int(turned))}
    int4 = {"w": GROUPS.quantize(w, axis=int(turned))}
    fp8 = {"w": jc.Quantizer("float8_e4m3fn").quantize(w, axis=int(turned))}
    out = {
        "float32": compiled(dot, {"w": w}, x),
        "w8a8": compiled(jc.quantize_aware(dot, "w8a8"), int8, x),
        "w8a16": compiled(jc.with_qtensors(dot), int8, x),
        "w4a8": compiled(jc.quantize_aware(dot, W4A8), int4, x),
        "w4a16": compiled(jc.with_qtensors(dot), int4, x),
        "fp8": compiled(jc.with_qtensors(dot), fp8, x),
    }
    if m >= 32:
        assert integer_products(out["w8a8"][0]) >= 1
        assert turned or integer_products(out["w4a8"][0]) >= 1
    want, params = dot({"w": w}, x), {"w8": int8, "w4": int4, "fp": fp8}
    allowed = {"w8a8": 0.05, "w8a16": 0.05, "w4a8": 0.2, "w4a16": 0.2, "fp8": 0.1}
    for name, most in allowed.items():
        error = jnp.abs(out[name][0](params[name[:2]], x) - want).max() / jnp.abs(want).max()
        assert float(error) < most, (name, error)
    if importlib.util.find_spec("onnxruntime") and not turned:
        codes = np.random.default_rng(0).integers(0, 256, x.shape).astype(np.uint8)
        inputs = {"w": np.asarray(int8["w"].codes)}
        out["onnxruntime u8 x s8"] = with_onnxruntime("MatMulInteger", codes, inputs, np.int32, n)
        out["onnxruntime int4"] = matmul_nbits(np.asarray(x), int4["w"])
    return out


def with_onnxruntime(op, x, weights, dtype, n, **attributes):
    """One node of x and constants with n columns; what a model does around it is left out."""
    import onnxruntime as ort
    from onnx import helper, numpy_helper

    domain = "com.microsoft" if attributes else ""
    node = helper.make_node(op, ["x", *weights], ["y"], domain=domain, **attributes)
    info, kind = helper.make_tensor_value_info, helper.np_dtype_to_tensor_dtype
    graph = helper.make_graph(
        [node], "g", [info("x", kind(x.dtype), x.shape)],
        [info("y", kind(np.dtype(dtype)), (x.shape[0], n))],
        [numpy_helper.from_array(w, name) for name, w in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options)
    return (lambda x: session.run(None, {"x": x})[0]), (x,)


def matmul_nbits(x, w):
    """onnxruntime's product with the same codes and scales, activations in int8 too."""
    k, n = w.shape
    codes = (np.asarray(w.codes).T + 8).astype(np.uint8).reshape(n, -1, GROUPS.granularity.size)
    weights = {
        "w": codes[..., ::2] | codes[..., 1::2] << 4,
        "scales": np.asarray(w.scale)[:, 0].T.ravel().astype(np.float32),
    }
    run, args = with_onnxruntime(
        "MatMulNBits", x, weights, np.float32, n,
        K=k, N=n, bits=4, block_size=GROUPS.granularity.size, accuracy_level=4,
    )  # fmt: skip
    want = x @ np.asarray(w.dequantize())
    assert np.abs(run(x) - want).max() < 0.02 * np.abs(want).max()
    return run, args


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
    for m in (1, 4, 32, 256):
        yield f"linear, {m} x {k} x {n}", linear(m, k, n)
    for m in (1, 32):
        yield f"x @ w.T, {m} x {k} x {n}", linear(m, k, n, turned=True)
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
