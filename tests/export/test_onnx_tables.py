# SPDX-License-Identifier: Apache-2.0
"""Quantized tables in ONNX: rows are those of the function, and tables stay small."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

RNG = np.random.default_rng(0)
ROWS, COLUMNS = 40, 64
TABLE = jnp.asarray(RNG.normal(size=(ROWS, COLUMNS)), jnp.float32)
BITS = {
    "binary": 2, "ternary": 2, "int2": 2, "int3": 4, "int4": 4, "uint4": 4, "int5": 8, "int8": 8,
    "uint8": 8,
}  # fmt: skip
SCALES = {"tensor": 1, "channel": ROWS, "group:16": ROWS * COLUMNS // 16}


def look_up(p, ids):
    return p["t"][ids] * 2


def exported(fn, recipe, ids, path, **settings):
    small = jc.quantize(fn, {"t": TABLE}, recipe, method="rtn", example_inputs=ids)
    found = jc.export.onnx(small.fn, small.params, ids, path=path, **settings)
    return found, np.asarray(small.fn(small.params, ids))


@pytest.mark.cover
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("fmt", BITS)
def test_rows_and_bytes(fmt, scales, tmp_path):
    recipe = jc.Recipe([jc.Rule("*", jc.Quantizer(fmt, scales), op="gather")], "table")
    ids = jnp.asarray(RNG.integers(0, ROWS, (2, 3)), jnp.int32)
    found, want = exported(look_up, recipe, ids, tmp_path / "m.onnx")
    np.testing.assert_array_equal(found.run(ids), want)
    assert found.audit()
    (row,) = (row for row in found.report.rows if row.site == "t")
    sets = 2 if fmt[0] == "u" else 1  # scales, and zero points
    size = ROWS * COLUMNS * BITS[fmt] // 8
    assert size < row.bytes_after <= size + 4 * sets * SCALES[scales] + 4
    assert row.weight == (f"{fmt} in uint8" if BITS[fmt] < 8 else "u" * (sets - 1) + "int8")


@pytest.mark.parametrize("scales", SCALES)
def test_one_row_and_any_number(scales, tmp_path):
    recipe = jc.Recipe([jc.Rule("*", jc.Quantizer("uint4", scales), op="gather")], "table")
    found, want = exported(look_up, recipe, jnp.int32(7), tmp_path / "m.onnx")
    np.testing.assert_array_equal(found.run(jnp.int32(7)), want)
    ids = jnp.arange(ROWS)
    found, want = exported(look_up, recipe, ids, tmp_path / "m.onnx", symbolic_batch=True)
    np.testing.assert_array_equal(found.run(ids[:7]), want[:7])


def test_columns(tmp_path):
    """A table that is read along its last axis keeps int4, decoded at every call."""
    recipe = jc.Recipe([jc.Rule("*", jc.Quantizer("int4", "tensor"), op="gather")], "table")
    ids = jnp.asarray([3, 1, 1])
    found, want = exported(lambda p, i: p["t"][:, i], recipe, ids, tmp_path / "m.onnx")
    np.testing.assert_array_equal(found.run(ids), want)
    assert found.nbytes < ROWS * COLUMNS // 2 + 2000
    assert [row.site for row in found.audit().fallbacks] == ["t"]
