# SPDX-License-Identifier: Apache-2.0
"""`jc.report` against arithmetic and numpy that know nothing of it."""

import json
import math
import re
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from twins import RECIPES, default
from twins import draw as normal

import jaxcompress as jc
from jaxcompress import Recipe, Rule

PARAMS = {
    "conv": normal(1, 3, 3, 2, 8),
    "bias": normal(2, 8),
    "embed": normal(3, 20, 8),
    "layers": normal(4, 3, 8, 8) * 0.3,
    "head": normal(5, 8, 6).astype(jnp.bfloat16),
    "unused": normal(6, 7),
    "steps": jnp.int32(0),
}
IMAGES, IDS = normal(7, 4, 5, 5, 2), jnp.array([1, 2, 3, 19])


def model(p, images, ids):
    numbers = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(images, p["conv"], (1, 1), "SAME", dimension_numbers=numbers)
    x = x.mean((1, 2)) + p["bias"][None] + p["embed"][ids]
    x = x + jax.nn.softmax(x @ x.T) @ x
    x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]
    return x.astype(jnp.bfloat16) @ p["head"]


def stored(shape, channels, bits):
    """Packed codes and float32 scales. The last axis is packed, row by row."""
    *rows, last = shape
    return math.prod(rows) * math.ceil(last * bits / 8) + 4 * channels


def test_rows_and_totals():
    report = jc.report(model, "w8a8")(PARAMS, IMAGES, IDS)
    rows = {r.site: r for r in report.rows}
    assert list(rows) == [
        "conv", "embed", "dot_general#0", "dot_general#1", "layers", "head",
        "bias", "steps", "unused",
    ]  # fmt: skip
    after = {
        "conv": stored((3, 3, 2, 8), 8, 8),
        "embed": stored((20, 8), 20, 8),
        "layers": 3 * stored((8, 8), 8, 8),
        "head": stored((8, 6), 6, 8),
        "bias": 32,
        "unused": 28,
        "steps": 4,
    }
    assert {n: r.bytes_after for n, r in rows.items() if r.bytes_after} == after
    assert {n: r.bytes_before for n, r in rows.items() if r.bytes_before} == {
        n: a.nbytes for n, a in PARAMS.items()
    }
    assert report.bytes_before == sum(a.nbytes for a in PARAMS.values())
    assert report.bytes_after == sum(after.values())
    assert rows["layers"].shape == (3, 8, 8)
    assert rows["conv"].weight == "int8 per channel"
    assert rows["conv"].activation == "int8 per example" and rows["embed"].activation is None
    assert rows["dot_general#0"].reason == "product of two activations"
    assert rows["dot_general#0"].weight is None and rows["dot_general#0"].snr_db is None
    assert rows["unused"].weight == "float32" and rows["steps"].weight == "int32"
    assert rows["bias"].reason == "read by no matmul, convolution or embedding"
    assert all(r.source.split("/")[-1].startswith("test_report.py:") for r in rows.values() if r.op)
    assert all(rows[n].snr_db > 25 for n in ("conv", "embed", "layers", "head"))


@pytest.mark.parametrize("name", default(jc.recipes.RECIPES, *RECIPES))
def test_totals_of_every_recipe(name):
    report = jc.report(model, name)(PARAMS, IMAGES, IDS)
    assert report.bytes_before == sum(a.nbytes for a in PARAMS.values())
    assert report.bytes_after < report.bytes_before
    assert report.recipe == name


@pytest.mark.parametrize("bits, group", [(4, 4), (2, 8), (8, 16)])
def test_packed_groups(bits, group):
    f = lambda p, x: x @ p["w"]  # noqa: E731
    recipe = Recipe([Rule("*", jc.Quantizer(f"int{bits}", jc.per_group(group)))])
    report = jc.report(f, recipe)({"w": normal(1, 16, 10)}, normal(2, 3, 16))
    assert report.bytes_after == stored((16, 10), 16 // group * 10, bits)


def test_a_group_that_does_not_fit_is_remarked():
    (row,) = jc.report(lambda p, x: x @ p["w"], "w4a16-g32")(
        {"w": normal(1, 6, 4)}, normal(2, 3, 6)
    ).rows
    assert row.reason == "group:32 does not fit: one scale per channel"
    assert row.bytes_after == stored((6, 4), 4, 4)


def test_nothing_is_changed_without_a_recipe():
    report = jc.report(model)(PARAMS, IMAGES, IDS)
    assert report.bytes_before == report.bytes_after == sum(a.nbytes for a in PARAMS.values())
    assert all(r.snr_db is None for r in report.rows)
    assert {r.reason for r in report.rows if r.op} == {"no rule matches"}
    skipped = jc.report(model, jc.recipes.get("w8a8").skip("head"))(PARAMS, IMAGES, IDS)
    row = next(r for r in skipped.rows if r.site == "head")
    assert (row.weight, row.activation, row.reason) == (
        "bfloat16", "bfloat16", "left alone by rule 'head'"
    )  # fmt: skip
    assert row.bytes_after == row.bytes_before == 96


def test_noise_against_numpy():
    w, x = np.asarray(normal(1, 16, 8), np.float64), np.asarray(normal(2, 5, 16), np.float64)

    def rounded(v, axis, top=127):
        s = np.abs(v).max(axis, keepdims=True) / top
        return np.round(v / s) * s

    f = lambda p, x: x @ p["w"]  # noqa: E731
    params, xs = {"w": jnp.asarray(w, jnp.float32)}, jnp.asarray(x, jnp.float32)
    clean = x @ w
    for recipe, noisy in (
        ("w8a8", rounded(x, 1) @ rounded(w, 0)),
        ("w8a16", x @ rounded(w, 0)),
        (Recipe([Rule("*", weight="int4")]), x @ rounded(w, 0, 7)),
    ):
        want = 10 * np.log10((clean**2).sum() / ((noisy - clean) ** 2).sum())
        (row,) = jc.report(f, recipe)(params, xs).rows
        # the error is a difference of nearly equal numbers: float32 keeps about 3 of its digits
        assert row.snr_db == pytest.approx(want, abs=0.02)


def test_more_bits_are_less_noise():
    f, args = lambda p, x: x @ p["w"], ({"w": normal(1, 64, 64)}, normal(2, 32, 64))
    snr = [jc.report(f, Recipe([Rule("*", f"int{b}")]))(*args).rows[0].snr_db for b in range(3, 9)]
    steps = np.diff(snr)
    assert all(5 < s < 8.5 for s in steps), snr  # 6 dB per bit; narrow grids gain a little more


def test_shapes_are_enough():
    specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (PARAMS, IMAGES, IDS))
    by_shape = jc.report(model, "w8a8")(*specs)
    by_value = jc.report(model, "w8a8")(PARAMS, IMAGES, IDS)
    assert all(r.snr_db is None for r in by_shape.rows)
    assert [(r.site, r.bytes_before, r.bytes_after, r.reason) for r in by_shape.rows] == [
        (r.site, r.bytes_before, r.bytes_after, r.reason) for r in by_value.rows
    ]
    mixed = jc.report(model, "w8a8")(PARAMS, *specs[1:])
    assert mixed.bytes_after == by_value.bytes_after


def test_tied_weights_count_once():
    params = {"e": normal(1, 20, 8)}
    f = lambda p, ids: p["e"][ids] @ p["e"].T  # noqa: E731
    first, second = jc.report(f, "w8a8")(params, IDS).rows
    assert (first.bytes_before, first.bytes_after) == (640, stored((20, 8), 20, 8))
    assert (second.bytes_before, second.bytes_after) == (0, 0)
    assert second.reason == "stored with the first use of `e`"


def test_slices_share_the_bytes():
    params = {"qkv": normal(1, 8, 24)}
    f = lambda p, x: [x @ w for w in jnp.split(p["qkv"], 3, 1)]  # noqa: E731
    rows = jc.report(f, "w8a8")(params, normal(2, 4, 8)).rows
    assert [r.bytes_before for r in rows] == [256] * 3
    assert [r.bytes_after for r in rows] == [stored((8, 8), 8, 8)] * 3
    part = jc.report(lambda p, x: x @ p["qkv"][:, :8] + x @ p["qkv"][:, 8:16], "w8a8")
    rows = part(params, normal(2, 4, 8)).rows
    assert rows[-1].reason == "only partly read by a matmul, convolution or embedding"
    assert sum(r.bytes_before for r in rows) == 768


def test_lora():
    params = {"w": normal(1, 8, 8), "a": normal(2, 8, 2), "b": normal(3, 2, 8)}
    merged = jc.report(lambda p, x: x @ (p["w"] + p["a"] @ p["b"]), "w8a8")(params, normal(4, 4, 8))
    assert merged.bytes_before == sum(a.nbytes for a in params.values())
    assert merged.bytes_after == stored((8, 8), 8, 8)  # what the site reads is the merged weight
    assert merged.rows[0].reason == "computed from parameters only: its result is stored"


def test_a_function_that_differentiates():
    def step(p, images, ids):
        loss = lambda p: jnp.mean(model({**p, "steps": 0}, images, ids).astype(jnp.float32) ** 2)  # noqa
        g = jax.grad(loss)({k: v for k, v in p.items() if k != "steps"})
        return jax.tree.map(lambda v: v * 0.1, g)

    report = jc.report(step, "w8a8")(PARAMS, IMAGES, IDS)
    forward = jc.report(model, "w8a8")(PARAMS, IMAGES, IDS)
    sizes = lambda report: {  # noqa: E731
        r.site: (r.weight, r.activation, r.bytes_before, r.bytes_after) for r in report.rows
    }
    assert sizes(report) == sizes(forward)


def test_json():
    report = jc.report(model, "w8a8")(PARAMS, IMAGES, IDS)
    data = json.loads(report.to_json())
    assert data["bytes_after"] == report.bytes_after and data["recipe"] == "w8a8"
    assert data["name"] == "model"
    assert [r["site"] for r in data["rows"]] == [r.site for r in report.rows]
    # exact weights have no noise: JSON has no infinity
    exact = jc.report(lambda p, x: x @ p["w"], "w8a16")({"w": jnp.ones((4, 4))}, normal(1, 2, 4))
    assert exact.rows[0].snr_db == math.inf

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(exact.to_json(), parse_constant=refuse)["rows"][0]["snr_db"] == "inf"


def test_printing_and_html(tmp_path):
    f = lambda p, x: x @ p["<w>&"]["a/b"] @ p["<w>&"]["a"]["b"]  # noqa: E731
    params = {"<w>&": {"a/b": normal(1, 4, 8), "a": {"b": normal(2, 8, 4)}}}
    report = jc.report(f, "w8a8")(params, normal(3, 2, 4))
    text = str(report)
    for row in report.rows:
        assert row.site in text and f"{row.bytes_after:,}" in text and f"{row.snr_db:.1f}" in text
    assert f"{report.bytes_before:,} -> {report.bytes_after:,} bytes" in text
    assert "\x1b" not in text  # no colours where there is no terminal
    path = tmp_path / "report.html"
    report.to_html(path)
    page = path.read_text()
    assert page.startswith("<!DOCTYPE html>") and report._repr_html_() in page
    assert "&lt;w&gt;&amp;" in page and "<w>" not in page
    assert page.count("<tr>") == len(report.rows) + 1
    first, second = re.findall(r"<svg.*?</svg>", page)
    for figure, numbers in (
        (first, [row.snr_db for row in report.rows]),
        (second, [n for row in report.rows for n in (row.bytes_before, row.bytes_after)]),
    ):
        drawn = [el for el in ElementTree.fromstring(figure) if el.tag.endswith("rect")]
        widths = [float(el.get("width")) for el in drawn if float(el.get("x")) == 260]
        widths = widths[-len(numbers) :]  # before them the key
        np.testing.assert_allclose(widths, 420 * np.array(numbers) / max(numbers), atol=0.06)
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(FileNotFoundError):
        report.to_html(tmp_path / "nowhere" / "report.html")
