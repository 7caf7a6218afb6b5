# SPDX-License-Identifier: Apache-2.0
"""The table of docs/deployment.md, cell by cell, from models that are exported and audited here."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from twins import default

import jaxcompress as jc
from jaxcompress import Quantizer, Recipe, Rule

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "deployment.md").read_text("utf-8")
ROWS = {
    cells[0].strip("`"): cells[1:]
    for line in PAGE.split("## Formats and targets")[1].splitlines()
    if line.startswith("| `")
    for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
}
PARAMS = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)}
X = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)


def product(p, x):
    return x @ p["w"]


def exported(fn, params, path, opset):
    try:
        return jc.export.onnx(fn, params, X, path=path, opset=opset)
    except jc.ArtifactError:
        return None


def status(model):
    """native: a kernel on small numbers; storage: small in the file only; decoded: not even so."""
    if model is None:
        return "-"
    (row,) = [row for row in model.report.rows if row.site == "w"]
    if row.weight == "float":
        return "decoded"
    try:
        return "native" if model.audit() else "storage"
    except jc.ArtifactError:
        return "evaluator"


def fpga(fmt, path):
    """Whether QONNX holds it, with scales that are powers of two and stored ranges."""
    try:
        settings = {"range": "fixed"} if fmt == "binary" else {"power_of_two": "ceil"}
        weight = Quantizer(fmt, "tensor", **settings)
        static = {} if fmt == "binary" else {"range": "static", "power_of_two": "ceil"}
        act = weight if fmt == "binary" else Quantizer(fmt, "tensor", **static)
        recipe = Recipe([Rule("w", weight, act)], fmt)
        small = jc.quantize(product, PARAMS, recipe, calibration=[X])
        jc.export.qonnx(small.fn, small.params, X, path=path)
    except jc.JaxCompressError:
        return "-"
    return "native"


FEW = ("int8", "int4", "ternary", "float16", "float8_e4m3fn", "float6_e2m3fn", "float4_e2m1fn")
FEW += ("nf4", "mxfp8_e4m3", "mxfp4", "mxint8", "nvfp4")


@pytest.mark.parametrize("fmt", default(ROWS, *FEW))
def test_a_row(fmt, tmp_path):
    q, path = Quantizer(fmt), tmp_path / "m.onnx"
    act = Quantizer(fmt, None if q.format.block else "token")
    found = []
    for rule in (Rule("w", q), Rule("w", q, act)):
        fn = jc.quantize_aware(product, Recipe([rule], fmt))
        found.append(status(exported(fn, PARAMS, path, 21)))
        newest = exported(fn, PARAMS, path, 28)
        want = np.asarray(fn(PARAMS, X))
        assert newest is not None
        np.testing.assert_allclose(
            newest.run(X, evaluator="reference"), want, rtol=1e-4, atol=1e-4 * np.abs(want).max()
        )
        found.append({"decoded": "decoded"}.get(status(newest), "stored"))
    assert [*found, fpga(fmt, path)] == ROWS[fmt]


def test_the_table_has_every_family():
    assert len(ROWS) >= 20 and {"int8", "mxfp4", "nvfp4", "nf4", "binary"} <= ROWS.keys()
