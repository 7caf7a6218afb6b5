# SPDX-License-Identifier: Apache-2.0
"""The command line, from its words to what is on the disk and on the screen."""

import html
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
from safetensors import safe_open

import jaxcompress as jc
from jaxcompress import _compress, _result
from jaxcompress._cli import main
from jaxcompress._page import summary
from jaxcompress._task import load_task

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
FILES = {"report.json", "report.html", "model.safetensors", "float_model.safetensors"}

TASK = """
import jax, jax.numpy as jnp, numpy as np, optax
import jaxcompress as jc

x = np.random.default_rng(0).normal(size=(256, 8)).astype("float32")
y = np.abs(x[:, :4]).argmax(axis=1)

def make(key):
    up, down = jax.random.split(key)
    return {
        "up": jax.random.normal(up, (8, 32)) / 3,
        "down": jax.random.normal(down, (32, 4)) / 6,
        "bias": jnp.zeros((1, 4)),
    }

def apply(p, x):
    return jax.nn.relu(x @ p["up"]) @ p["down"] + p["bias"]

def loss(p, batch):
    logits = apply(p, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

def evaluate(predict):
    return {"accuracy": float(np.mean(np.argmax(predict(x), axis=-1) == y))}

def batches(rng):
    for _ in range(8):
        rows = rng.permutation(256)[:64]
        yield x[rows], y[rows]

def build(**changes):
    fields = dict(
        name="tiny", apply=apply, params=make, calibration=[x[:32]], evaluate=evaluate,
        train=jc.Train(loss, batches, optax.adam(1e-2), steps=20, float_steps=60),
    )
    return jc.Task(**{**fields, **changes})

"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, in which no bytecode of the task files is left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


@pytest.fixture
def write(folder):
    """Writes a task file and gives its path: what is added to TASK must define `task`."""

    def write_task(text="task = build()"):
        path = folder / "tiny.py"
        path.write_text(TASK + text)
        return str(path)

    return write_task


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail with one message and leave nothing behind."""

    def run(*words, left=("tiny.py",)):
        capsys.readouterr()
        assert main(list(words)) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("jaxcompress: ")
        assert "Traceback" not in err
        assert {p.name for p in pathlib.Path.cwd().iterdir()} <= set(left)
        return err.removeprefix("jaxcompress: ").strip()

    return run


def test_compress_trains_measures_and_writes(write, folder, capsys):
    assert main(["compress", write(), "--out", "out"]) == 0
    assert {p.name for p in folder.iterdir()} == {"tiny.py", "out"}  # no temporary directory left
    assert {p.name for p in (folder / "out").iterdir()} == FILES
    result = json.loads((folder / "out/report.json").read_text())
    assert result["tool"] == "jaxcompress"
    assert result["schema_version"] == 1
    assert result["recipe"] == json.loads(jc.recipes.get("w8a8").to_json())
    assert result["steps"] == {"float": 60, "aware": 20}
    assert result["versions"]["jax"] == jax.__version__
    assert result["versions"]["jaxcompress"] == jc.__version__
    assert result["platform"]["backend"] == jax.default_backend()
    assert result["metrics"]["before"]["accuracy"] > 0.5
    assert result["metrics"]["after"]["accuracy"] > 0.5
    interval = result["comparison"]["accuracy"]
    assert interval["examples"] == 256
    assert interval["low"] <= interval["change"] <= interval["high"]
    assert 0.8 < result["comparison"]["agreement"] <= 1
    assert result["step_ms"]["of"] == "training"
    assert result["step_ms"]["before"] > 0
    floats = 4 * (8 * 32 + 32 * 4 + 4)
    packed = 8 * 32 + 32 * 4 + 4 * (32 + 4 + 4)
    assert result["bytes"]["parameters"] == {"before": floats, "after": packed}
    for when, name in (("before", "float_model.safetensors"), ("after", "model.safetensors")):
        assert result["bytes"]["files"][when] == (folder / "out" / name).stat().st_size
    assert [row["site"] for row in result["rows"]] == ["up", "down", "bias"]
    assert sum(row["bytes_after"] for row in result["rows"]) == packed
    assert all(row["snr_db"] > 30 for row in result["rows"][:2])

    shown = capsys.readouterr().out
    for text in ("up", "int8 per channel", "read by no matmul", "accuracy", "same prediction"):
        assert text in shown
    assert f"{floats:,}" in shown
    assert "training step, ms" in shown
    assert main(["report", "out"]) == 0
    assert capsys.readouterr().out == shown

    losses = result["losses"]
    assert [len(points) for points in losses.values()] == [60, 20]
    assert losses["float training"][-1][1] < losses["float training"][0][1]
    page = (folder / "out/report.html").read_text()
    assert not re.findall(r"(?:src|href)=", page)  # it needs no other file
    for text in ("tiny, recipe w8a8, method qat", "Loss while training", "Bytes by layer"):
        assert text in page
    for row in summary(result):
        assert all(html.escape(cell) in page for cell in row)
    (curve,) = (f for f in re.findall(r"<svg.*?</svg>", page) if "<polyline" in f)
    lines = [el for el in ElementTree.fromstring(curve) if el.tag.endswith("polyline")]
    points = [[p.split(",") for p in line.get("points").split()] for line in lines]
    # Lower is a larger loss, and the second phase goes on where the first one ended.
    heights = [float(y) for _, y in points[0]]
    order = np.argsort([loss for _, loss in losses["float training"]], kind="stable")
    assert (np.diff(np.array(heights)[order]) <= 0.1).all()
    across = [float(x) for line in points for x, _ in line]
    np.testing.assert_allclose(across, np.linspace(64, 744, 80), atol=0.06)


def test_what_is_stored_is_the_model(write, folder):
    path = write()
    assert main(["compress", path, "--out", "out", "--quiet"]) == 0
    task = load_task(path)
    metrics = json.loads((folder / "out/report.json").read_text())["metrics"]
    params = jc.load_params(folder / "out/float_model.safetensors")
    assert task.evaluate(lambda x: task.apply(params, x)) == metrics["before"]
    stored = jc.load_params(folder / "out")
    assert all(stored[name].format.name == "int8" for name in ("up", "down"))
    with safe_open(folder / "out/model.safetensors", "numpy") as file:
        params = {
            n: file.get_tensor(f"{n}:packed") * file.get_tensor(f"{n}:scale")
            for n in ("up", "down")
        }
        params["bias"] = file.get_tensor("bias")
    for name, array in params.items():
        read = stored[name].dequantize() if name != "bias" else stored[name]
        np.testing.assert_array_equal(read, array)
    aware = jc.quantize_aware(task.apply, "w8a8")
    assert task.evaluate(lambda x: aware(params, x)) == metrics["after"]


def test_a_second_run_with_the_same_seed_writes_the_same_parameters(write, folder):
    path = write()
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        words = ["compress", path, "--out", out, "--seed", seed, "--steps", "3", "--quiet"]
        assert main(words) == 0
    a, b, c = ((folder / out / "model.safetensors").read_bytes() for out in "abc")
    assert a == b
    assert a != c


def test_an_exported_program_is_verified(write, folder, capsys, fails):
    out, command = folder / "out", ["compress", write(), "--out", "out", "--quiet"]
    assert main(command) == 0
    message = fails("verify", "out", left=("tiny.py", "out"))
    assert message == "out holds no program. Compress again with --export stablehlo."
    assert main([*command, "--export", "stablehlo"]) == 0
    assert {p.name for p in out.iterdir()} == {*FILES, "stablehlo"}
    capsys.readouterr()
    assert main(["verify", "out"]) == 0
    shown = capsys.readouterr().out
    assert "equal in every bit" in shown and "up" in shown and "output" in shown
    artifact = jc.export.load(out / "stablehlo")
    x = np.random.default_rng(1).normal(size=(7, 8)).astype("float32")  # another batch
    assert artifact.run(x).shape == (7, 4)
    codes = artifact.params["up"].codes
    np.testing.assert_array_equal(codes, jc.load_params(out)["up"].codes)


def test_an_exported_onnx_model_is_measured_and_verified(write, folder, capsys, fails):
    command = ["compress", write(), "--out", "out", "--quiet", "--export", "onnx"]
    assert main([*command, "--export", "stablehlo"]) == 0
    shown = capsys.readouterr().out
    assert "onnxruntime, batch 1, ms" in shown and "onnxruntime, batch 32, ms" in shown
    out = folder / "out"
    assert {p.name for p in out.iterdir()} == {*FILES, "stablehlo", "onnx"}
    data = json.loads((out / "report.json").read_text())["onnx"]
    assert data["in_floats"] == {} and data["largest_difference"] < 1e-5
    assert data["bytes"]["after"] == (out / "onnx" / "model.onnx").stat().st_size
    assert all(t > 0 for times in data["latency_ms"].values() for t in times.values())
    assert main(["verify", "out"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("against its reference") == 2
    model = jc.export.load(out / "onnx" / "model.onnx")
    x = np.random.default_rng(1).normal(size=(7, 8)).astype("float32")  # another batch
    program = jc.export.load(out / "stablehlo")
    np.testing.assert_allclose(model.run(x), program.run(x), rtol=1e-5, atol=1e-5)
    reference = jax.tree.map(np.array, model.reference)
    reference["outputs"][0] *= 1.1
    jc.save_params(reference, out / "onnx" / "model.reference.safetensors")
    assert main(["verify", "out"]) == 1
    assert main(command) == 0 and not (out / "stablehlo").exists()


def test_a_model_for_hardware(write, folder, capsys, fails):
    """QONNX: executed and verified; a recipe that hardware cannot hold is refused at once."""
    command = ["compress", write(), "--out", "out", "--quiet", "--export", "qonnx"]
    assert main([*command, "--recipe", "fpga-w6a6-static", "--method", "rtn"]) == 0
    assert "qonnx, bytes" in capsys.readouterr().out
    data = json.loads((folder / "out" / "report.json").read_text())["qonnx"]
    assert data["largest_difference"] < 1e-6
    assert data["bytes"] == (folder / "out" / "qonnx" / "model.onnx").stat().st_size
    assert main(["verify", "out"]) == 0
    assert capsys.readouterr().out.count("against its reference") == 1
    model = jc.export.load(folder / "out" / "qonnx" / "model.onnx")
    reference = jax.tree.map(np.array, model.reference)
    reference["outputs"][0] *= 1.1
    jc.save_params(reference, folder / "out" / "qonnx" / "model.reference.safetensors")
    assert main(["verify", "out"]) == 1
    capsys.readouterr()
    message = fails(*command[:3], "other", *command[4:], left=("tiny.py", "out"))
    assert "finds the range of activations in each call" in message


def test_verify_of_a_program_that_differs(folder, capsys, monkeypatch, fails):
    params, x = {"up": np.eye(4, dtype="float32")}, np.ones((2, 4), "float32")
    artifact = jc.export.stablehlo(lambda p, x: x @ p["up"], params, x, path="a")
    reference = jax.tree.map(np.array, artifact.reference)
    reference["outputs"][0][1, 2] += 1
    monkeypatch.setattr(type(artifact), "reference", reference)
    assert main(["verify", "a"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "the first difference is at output output, batch 0, index (1, 2)" in shown
    assert fails("verify", ".", left=("a",)) == ". is no artifact: it has no manifest.json."


def test_without_train_weights_are_only_rounded(write, folder):
    path = write("task = build(train=None, params=make(jax.random.key(0)))")
    assert main(["compress", path, "--recipe", "w4a16-g32", "--out", "out"]) == 0
    result = json.loads((folder / "out/report.json").read_text())
    assert result["steps"] is None
    assert result["step_ms"]["of"] == "prediction"
    stored = jc.load_params(folder / "out/float_model.safetensors")
    want = load_task(path).params
    assert stored.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(stored[name], array)


def test_the_default_directory_and_recipe_and_skipped_sites(write, folder):
    words = ["compress", write(), "--skip", "down", "--steps", "2", "--float-steps", "0"]
    assert main(words) == 0
    result = json.loads((folder / "compressed/tiny-w8a8/report.json").read_text())
    assert result["steps"] == {"float": 0, "aware": 2}
    rows = {row["site"]: row for row in result["rows"]}
    assert rows["up"]["weight"] == "int8 per channel"
    assert rows["down"]["weight"] == "float32"
    assert rows["down"]["reason"] == "left alone by rule 'down'"


def test_a_recipe_from_a_file(write, folder):
    recipe = jc.Recipe([jc.Rule("*", weight="int4")], "mine")
    (folder / "mine.json").write_text(recipe.to_json())
    assert main(["compress", write(), "--recipe", "mine.json", "--steps", "1", "--quiet"]) == 0
    result = json.loads((folder / "compressed/tiny-mine/report.json").read_text())
    assert result["rows"][0]["weight"] == "int4 per channel"


def test_an_earlier_result_is_replaced_and_anything_else_is_not(write, folder, fails):
    path = write("task = build(train=None)")
    (folder / "out").mkdir()  # empty: as good as none
    assert main(["compress", path, "--out", "out", "--seed", "1"]) == 0
    assert main(["compress", path, "--out", "out", "--seed", "2"]) == 0
    assert json.loads((folder / "out/report.json").read_text())["seed"] == 2
    (folder / "out/notes.txt").write_text("mine")
    before = (folder / "out/report.json").read_bytes()
    message = fails("compress", path, "--out", "out", left=("tiny.py", "out"))
    assert "exists and is not an earlier result: it holds" in message
    assert "Nothing was changed. Choose another --out" in message
    assert (folder / "out/report.json").read_bytes() == before
    message = fails("compress", path, "--out", "tiny.py", left=("tiny.py", "out"))
    assert "tiny.py is a file and the result a directory" in message


def test_a_failure_leaves_the_earlier_result_as_it_was(write, folder, fails, monkeypatch):
    path = write("task = build(train=None)")
    assert main(["compress", path, "--out", "out"]) == 0
    before = {p.name: p.read_bytes() for p in (folder / "out").iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device", "report.json")

    monkeypatch.setattr(_compress, "write_report", full)
    message = fails("compress", path, "--out", "out", left=("tiny.py", "out"))
    assert "No space left on device" in message
    assert {p.name: p.read_bytes() for p in (folder / "out").iterdir()} == before


def test_a_directory_that_cannot_be_replaced_is_put_back(folder, monkeypatch):
    out = folder / "out"
    with _result.new_result(out) as new:
        _result.write_report(new, {"which": "first"})
    rename = pathlib.Path.rename

    def refuse(self, target):
        if target == out and "earlier" not in self.name:
            raise PermissionError(13, "Permission denied", str(target))
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    with pytest.raises(PermissionError), _result.new_result(out) as new:
        _result.write_report(new, {"which": "second"})
    assert _result.read_report(out)["which"] == "first"
    assert [p.name for p in folder.iterdir()] == ["out"]


def test_interrupted(write, folder, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(_compress, "fit", interrupt)
    assert main(["compress", write()]) == 130
    assert "interrupted, nothing was written" in capsys.readouterr().err
    assert not list(folder.glob("compressed/*"))
    assert not list(folder.glob("compressed/.*"))


def test_an_unknown_recipe(write, fails):
    message = fails("compress", write(), "--recipe", "w8a9")
    assert message.startswith("unknown recipe 'w8a9'. Nearest: ")
    assert "w8a8" in message


def test_a_recipe_file_with_a_typo(write, folder, fails):
    recipe = folder / "mine.json"
    recipe.write_text('{"name": "mine", "rules": [{"pattern": "*", "weigth": "int8"}]}')
    message = fails("compress", write(), "--recipe", str(recipe), left=("tiny.py", "mine.json"))
    assert message.startswith(f"The recipe {recipe} is wrong: unknown key 'weigth' in a rule")
    assert "did you mean 'weight'?" in message
    recipe.write_text("{")
    message = fails("compress", write(), "--recipe", str(recipe), left=("tiny.py", "mine.json"))
    assert "is wrong: the recipe is not valid JSON" in message
    message = fails("compress", write(), "--recipe", "no.json", left=("tiny.py", "mine.json"))
    assert message == "The recipe no.json cannot be read: No such file or directory."


def test_a_pattern_that_matches_nothing(write, fails):
    message = fails("compress", write(), "--skip", "dwon")
    assert "dwon" in message
    assert "`down`" in message


def test_a_missing_task_and_one_that_raises(write, fails):
    assert "There is no task file missing.py" in fails("compress", "missing.py")
    message = fails("compress", write("1 / 0"))
    assert "raised at line" in message
    assert message.endswith("ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "task = build(params={**make(jax.random.key(0)), 'up': jnp.full((8, 32), jnp.nan)})",
            "Task `tiny`: 256 of the 256 values of parameter `up` are NaN or infinite.",
        ),
        (
            "task = build(params=lambda key: 1 / 0)",
            "params of task `tiny` raised at line {line} of {path}: ZeroDivisionError",
        ),
        ("task = build(calibration=[])", "Task `tiny`: `calibration` is empty"),
        (
            "task = build(calibration=[x[:, :5]])",
            "apply of task `tiny` raised at line 17 of {path}: TypeError: dot_general requires",
        ),
        (
            "task = build(train=jc.Train(lambda p, b: apply(p, b[0]), batches, optax.sgd(0.1), 3))",
            "Task `tiny`: `loss` must return one number, found ShapeDtypeStruct(shape=(64, 4)",
        ),
        (
            "task = build(train=jc.Train(loss, [x], optax.sgd(0.1), 3))",
            "loss of task `tiny` raised at line",
        ),
        (
            "task = build(evaluate=lambda predict: 1 / 0)",
            "evaluate of task `tiny` raised at line {line} of {path}: ZeroDivisionError",
        ),
        (
            "task = build(evaluate=lambda predict: 0.5)",
            "TypeError: it must return {{metric: float}}, found float",
        ),
        (
            "task = build(train=jc.Train(loss, batches, optax.sgd(float('nan')), 20))",
            "float training: the loss is not finite in step 1 of 20. Lower the learning rate",
        ),
    ],
)
def test_a_task_that_is_wrong(write, fails, text, message):
    path, line = write(text), TASK.count("\n") + 1
    assert message.format(path=path, line=line) in fails("compress", path, "--out", "out")


def test_what_can_be_known_is_known_before_training(write, fails, monkeypatch):
    monkeypatch.setattr(_compress, "fit", lambda *_, **__: pytest.fail("it has trained"))
    (pathlib.Path.cwd() / "mine.json").write_text(jc.Recipe([jc.Rule("bias", "int8")]).to_json())
    left = ("tiny.py", "mine.json")
    assert "`bias`" in fails("compress", write(), "--recipe", "mine.json", "--out", "o", left=left)
    path = write("task = build(evaluate=lambda predict: 1 / 0)")
    assert "ZeroDivisionError" in fails("compress", path, "--out", "out", left=left)


def test_a_place_that_cannot_be_written(write, fails, monkeypatch):
    path = write()
    message = fails("compress", path, "--out", "tiny.py/out")
    assert "tiny.py/out" in message
    assert "Not a directory" in message
    assert "Choose a directory that can be written with --out." in message

    def refuse(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    message = fails("compress", path, "--out", "locked/out")
    assert "out cannot be written: Permission denied" in message


@pytest.mark.parametrize(
    "text", ["task = build()", "task = build(train=None, params=make(jax.random.key(0)))"]
)
def test_methods_after_training(text, write, folder):
    """The model is the one of `jc.quantize`, whose float parameters are stored beside it."""
    words = ["compress", write(text), "--recipe", "w4a16-g32", "--method", "gptq+bias_correction"]
    assert main([*words, "--quiet", "--export", "stablehlo"]) == 0
    out = folder / "compressed" / "tiny-w4a16-g32-gptq+bias_correction"
    task = load_task(str(folder / "tiny.py"))
    params = jc.load_params(out / "float_model.safetensors")
    want = jc.quantize(
        task.apply, params, "w4a16-g32", calibration=task.calibration,
        method=["gptq", "bias_correction"],
    )  # fmt: skip
    stored = jc.load_params(out / "model.safetensors")
    assert jax.tree.structure(stored) == jax.tree.structure(want.params)
    for a, b in zip(jax.tree.leaves(stored), jax.tree.leaves(want.params), strict=True):
        np.testing.assert_array_equal(a, b)
    found = json.loads((out / "report.json").read_text())
    assert found["method"] == "gptq+bias_correction"
    assert found["bytes"]["parameters"]["after"] == jc.nbytes(want.params)
    assert found["steps"] == (None if "None" in text else {"float": 60, "aware": 0})
    assert {row["weight"] for row in found["rows"]} >= {"int4 per group:32"} or "None" in text
    x = task.calibration[0]
    artifact = jc.export.load(out / "stablehlo")
    np.testing.assert_array_equal(artifact.run(x), jax.jit(want.fn)(want.params, x))
    accuracy = task.evaluate(lambda x: want.fn(want.params, x))["accuracy"]
    assert found["metrics"]["after"]["accuracy"] == accuracy
    assert main(["report", str(out)]) == 0


def test_options_that_do_not_fit(write, fails, capsys):
    for method, text in (("gptx", "gptx"), ("rtn+gptq", "both round"), ("", "''")):
        assert text in fails("compress", write(), "--method", method)
    message = fails("compress", write("task = build(train=None)"), "--steps", "3")
    assert "`tiny` has no `train=jc.Train(...)`" in message
    for words in (["compress"], ["nonsense"], ["compress", "tiny.py", "--steps", "-1"]):
        with pytest.raises(SystemExit) as error:
            main(words)
        assert error.value.code == 2
    assert "'-1' is not a whole number of 0 or more" in capsys.readouterr().err


def test_sites(write, capsys):
    assert main(["sites", write()]) == 0
    shown = capsys.readouterr().out
    for text in ("up", "down", "dot_general", "weight float32[8, 32]", "tiny.py:17"):
        assert text in shown


def test_recipes(capsys):
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in jc.recipes.RECIPES)
    assert "int4 per group:32" in shown


def test_report_of_what_is_none(folder, fails):
    (folder / "empty").mkdir()
    other = folder / "other"
    other.mkdir()
    left = ("empty", "other")
    message = fails("report", "empty", left=left)
    assert message == "empty is not a result of `jaxcompress compress`: it has no report.json."
    for text, message in (
        ("{", "is damaged"),
        ("[]", "is damaged: it holds no JSON object"),
        ('{"tool": "other"}', "was not written by jaxcompress"),
        ('{"tool": "jaxcompress", "schema_version": 1}', "is damaged: KeyError: 'rows'."),
        ('{"a": 1, "a": 2}', "is damaged: a key comes twice."),
        ('{"tool": "jaxcompress", "schema_version": 9}', "has schema version 9, this jaxcompress"),
    ):
        (other / "report.json").write_text(text)
        assert message in fails("report", "other", left=left)


def test_results_of_earlier_versions(write, folder, fails, capsys):
    """They had `parameters.npz`: shown and replaced as before, and refused by `load_params`."""
    path = write("task = build(train=None)")
    assert main(["compress", path, "--out", "out"]) == 0
    shown = capsys.readouterr().out
    for new, old in (
        ("model.safetensors", "parameters.npz"),
        ("float_model.safetensors", "float_parameters.npz"),
    ):
        (folder / "out" / new).rename(folder / "out" / old)
    assert main(["report", "out"]) == 0
    table, _, names = capsys.readouterr().out.rstrip().rpartition("\n")
    assert table == shown.rstrip().rpartition("\n")[0]
    assert names == "out: float_parameters.npz, parameters.npz, report.html, report.json"
    with pytest.raises(jc.ArtifactError, match="has neither model.safetensors nor"):
        jc.load_params("out")
    assert main(["compress", path, "--out", "out"]) == 0
    assert {p.name for p in (folder / "out").iterdir()} == FILES


@pytest.mark.parametrize(
    ("old", "new", "agreement", "examples", "want"),
    [
        (0.9, 0.9, 1.0, 100, (-0.0192, 0.0192)),  # all the same: not an interval of length zero
        (0.9, 0.92, 0.98, 100, (-0.0135, 0.0527)),
        (0.905, 0.9, 0.98, 100, None),  # no share of 100
        (None, 0.9, 1.0, 100, None),
    ],
)
def test_the_paired_interval(old, new, agreement, examples, want):
    found = _compress._paired_interval(old, new, agreement, examples)
    if want is None:
        assert found is None
    else:
        np.testing.assert_allclose((found["low"], found["high"]), want, atol=2e-4)


def test_the_paired_interval_covers():
    """The true change lies inside in at least 95 % of draws, with a margin for 2,000 draws."""
    rng = np.random.default_rng(0)
    better, worse, n = 0.02, 0.01, 500
    inside = 0
    for _ in range(2000):
        up, down, _ = rng.multinomial(n, [better, worse, 1 - better - worse])
        found = _compress._paired_interval(0.9, 0.9 + (up - down) / n, 1 - (up + down) / n, n)
        inside += found["low"] <= better - worse <= found["high"]
    assert inside / 2000 > 0.94


def test_the_command_is_installed():
    scripts = importlib.metadata.entry_points(group="console_scripts", name="jaxcompress")
    if not scripts:
        pytest.skip("jaxcompress runs from its source tree and is not installed")
    assert next(iter(scripts)).load() is main


def test_digits_reaches_what_is_promised(folder):
    """The README's main job, in a process of its own as a user runs it."""
    words = ["compress", str(EXAMPLES / "digits.py"), "--recipe", "w8a8", "--out", "out"]
    code = "import sys; from jaxcompress._cli import main; sys.exit(main())"
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-c", code, *words],
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )
    result = json.loads((folder / "out/report.json").read_text())
    assert result["metrics"]["before"]["accuracy"] >= 0.97
    assert result["comparison"]["agreement"] >= 0.99
    size = result["bytes"]["parameters"]
    assert size["after"] < 0.27 * size["before"]


def test_fashion_mnist_says_how_to_get_the_data(folder, fails, monkeypatch):
    monkeypatch.setenv("FMNIST_DIR", str(folder / "nowhere"))
    message = fails("compress", str(EXAMPLES / "fashion_mnist.py"))
    assert f"FileNotFoundError: Fashion-MNIST is not in {folder}/nowhere" in message
    assert "apt-get install dataset-fashion-mnist" in message


@pytest.mark.full
def test_fashion_mnist_runs_on_images_of_its_kind(folder, noise_images):
    """A few steps on noise: the data set need not be there."""
    words = ["compress", str(EXAMPLES / "fashion_mnist.py"), "--steps", "2", "--float-steps", "2"]
    assert main([*words, "--out", "out"]) == 0
    result = json.loads((folder / "out/report.json").read_text())
    assert 0 < result["metrics"]["before"]["accuracy"] < 0.3
    assert result["comparison"]["accuracy"]["examples"] == 1000
