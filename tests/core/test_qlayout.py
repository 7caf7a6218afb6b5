# SPDX-License-Identifier: Apache-2.0
"""Layout primitives on QTensors: the same bits as on the array, and no float array on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress._core import interpret
from jaxcompress._core.qtensor import QTensor

SHAPE = (2, 64, 6)
IDS = np.array([[1, 0, 1], [1, 1, 0]])

# What has to stay packed whatever the format and whoever shares a scale.
ALWAYS = {
    "transpose": lambda a, xp: xp.transpose(a, (0, 2, 1)),
    "T": lambda a, xp: a.T,
    "leading": lambda a, xp: a[1],
    "leading slice": lambda a, xp: a[1:],
    "expand": lambda a, xp: a[:, None],
    "expand, transpose, squeeze": lambda a, xp: xp.squeeze(xp.transpose(a[None], (3, 1, 0, 2)), 2),
    "rev": lambda a, xp: a[::-1],
    "rows": lambda a, xp: a[IDS],
    "take": lambda a, xp: xp.take(a, IDS, axis=0),
    "split contracted": lambda a, xp: a.reshape(2, 4, 16, 6),
    "split last": lambda a, xp: a.reshape(2, 64, 3, 2),
    "merge again": lambda a, xp: a.reshape(2, 4, 16, 3, 2).reshape(SHAPE),
    "empty": lambda a, xp: a[:0],
}
# What some layouts of scales cannot store: those that can are named below.
SOME = {
    "last slice": lambda a, xp: a[..., 1:4],
    "last stride": lambda a, xp: a[..., ::2],
    "last rev": lambda a, xp: a[..., ::-1],
    "last rows": lambda a, xp: xp.take(a, IDS, axis=2),
    "whole groups": lambda a, xp: a[:, 32:],
    "half a group": lambda a, xp: a[:, 8:24],
    "contracted rev": lambda a, xp: a[:, ::-1],
    "merge leading": lambda a, xp: a.reshape(128, 6),
    "merge last": lambda a, xp: a.reshape(2, 384),
    "flat": lambda a, xp: a.reshape(-1),
    "concatenate 0": lambda a, xp: xp.concatenate([a, a[:1]], 0),
    "concatenate 1": lambda a, xp: xp.concatenate([a[:, :32], a], 1),
    "concatenate 2": lambda a, xp: xp.concatenate([a, a[..., 1:]], 2),
}
PLAIN = {"last slice", "last stride", "last rev", "last rows"}
MUST = {  # by granularity and contracted axis
    ("tensor", 1): {*PLAIN, "whole groups", "half a group", "contracted rev", "merge leading",
                    "merge last", "flat", "concatenate 0", "concatenate 1", "concatenate 2"},
    ("channel", 1): {*PLAIN, "whole groups", "half a group", "contracted rev", "concatenate 0",
                     "concatenate 2"},
    ("channel", 2): {*PLAIN, "whole groups", "half a group", "contracted rev", "merge leading",
                     "concatenate 0", "concatenate 1"},
    ("group:16", 1): {*PLAIN, "whole groups", "contracted rev", "merge leading", "concatenate 0",
                      "concatenate 1", "concatenate 2"},
    ("block:2x16", 1): {"whole groups", "contracted rev", "concatenate 1"},
    (None, 1): {"whole groups", *PLAIN, "contracted rev", "merge leading"},
}  # fmt: skip
# fmt: off
CASES = [(f, g, a) for f in ("int4", "uint4", "int3") for g, a in MUST if g] + [
    (f, g, 1) for f in ("int8", "nf4", "ternary", "float8_e4m3fn") for g in ("channel", "group:16")
] + [("mxfp4", None, 1), ("nvfp4", None, 1)]
HALF = [pytest.param(*case, marks=[pytest.mark.full] * (i % 2)) for i, case in enumerate(CASES)]
# fmt: on


def quantized(fmt, granularity, axis, shape=SHAPE, dtype=jnp.float32):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return jc.Quantizer(fmt, granularity).quantize(jnp.asarray(x, dtype), axis=axis)


def same_bits(got, want):
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    assert got.dtype == want.dtype


@pytest.mark.parametrize("fmt, granularity, axis", HALF)
def test_moves_the_array_bit_for_bit(fmt, granularity, axis):
    # Blocks take rows along both other axes: what splits the first of them is not for them.
    two = "block" in (granularity or "")
    always = {"transpose", "expand", "split contracted"} if two else set(ALWAYS)
    ops = {**ALWAYS, **SOME}
    q = quantized(fmt, granularity, axis)
    packed = {}

    @jax.jit
    def run(q):
        packed.update({k: interpret.apply(lambda a, f=f: f(a, jnp), q) for k, f in ops.items()})
        return {k: out.dequantize() if isinstance(out, QTensor) else out
                for k, out in packed.items()}  # fmt: skip

    got, array = run(q), np.asarray(q.dequantize())
    for name, f in ops.items():
        same_bits(got[name], f(array, np))
    kept = {name for name, out in packed.items() if isinstance(out, QTensor)}
    must = MUST[granularity, axis] | always
    if fmt == "nvfp4":  # one scale of the tensor: of two tensors there are two
        must -= {name for name in must if "concatenate" in name}
    assert must <= kept, must - kept
