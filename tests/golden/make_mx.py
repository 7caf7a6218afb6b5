# SPDX-License-Identifier: Apache-2.0
"""Writes mx.npz: OCP MX v1.0 blocks of 32 under three scale rules, in NumPy and ml_dtypes alone.

The rule "floor" of this code was compared with microxcaling, `_quantize_mx(x, 8, elem_format=f,
axes=[-1], block_size=32, round='even', shared_exp_method='max')`, on 65,536 values of each of the
five float formats: no mismatch. "round" agrees with the golden values of compressed-tensors'
`round_to_power_2`; "ceil" is written from its definition. Run once: `python make_mx.py`.
"""

import pathlib

import ml_dtypes
import numpy as np

ELEMENTS = {
    "mxfp4": (ml_dtypes.float4_e2m1fn, 2, 6.0),
    "mxfp6_e2m3": (ml_dtypes.float6_e2m3fn, 2, 7.5),
    "mxfp6_e3m2": (ml_dtypes.float6_e3m2fn, 4, 28.0),
    "mxfp8_e4m3": (ml_dtypes.float8_e4m3fn, 8, 448.0),
    "mxfp8_e5m2": (ml_dtypes.float8_e5m2, 15, 57344.0),
}


def exponent(absmax, emax, largest, rule):
    if rule == "floor":
        e = np.floor(np.log2(absmax)) - emax
    elif rule == "round":
        m, k = np.frexp(absmax)
        e = np.where(m >= 0.875, k, k - 1) - emax
    else:
        e = np.ceil(np.log2(absmax / np.float32(largest)))
    return np.clip(e, -127, 127)


def main():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((128, 32)) * np.exp2(rng.integers(-30, 30, (128, 1)))
    x[64:] *= np.exp2(rng.integers(-6, 6, (64, 32)))  # wide blocks reach the subnormals
    for i, edge in enumerate((1.0, 1.5, 1.74, 1.75, 1.984375, 1.99, 6.0, 7.5, 7.9, 28.0, 448.0)):
        x[i] *= edge / np.abs(x[i]).max()  # around the places where the rules change
        x[i, 0] = edge
    x = x.astype(np.float32)
    arrays = {"origin": np.array(__doc__), "x": x}
    for name, (dtype, emax, largest) in ELEMENTS.items():
        for rule in ("floor", "round", "ceil"):
            e = exponent(np.abs(x).max(1), emax, largest, rule)
            s = np.exp2(e).astype(np.float32)[:, None]
            q = np.clip(x / s, -largest, largest).astype(dtype)
            arrays[f"{name}_{rule}_scale"] = (e + 127).astype(np.uint8)
            arrays[f"{name}_{rule}_codes"] = q.view(np.uint8)
    np.savez_compressed(pathlib.Path(__file__).with_name("mx.npz"), **arrays)


if __name__ == "__main__":
    main()
