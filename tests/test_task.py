# SPDX-License-Identifier: Apache-2.0
"""Tasks: what they accept, where they are found, and how their models are trained."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress._task import load_task, user_code
from jaxcompress._train import combine, compiled_step, fit, start, stream

TASK = """
import jax.numpy as jnp
import jaxcompress as jc

def make(name):
    return jc.Task(name, lambda p, x: x @ p, jnp.eye(2), [jnp.eye(2)], lambda predict: {})
"""


def loss(params, batch):
    x, y = batch
    return jnp.mean((x @ params["w"] - y) ** 2)


def batches(rng):
    for _ in range(4):
        x = rng.normal(size=(16, 3)).astype("float32")
        yield x, x.sum(axis=1, keepdims=True)


def task(**changes):
    fields = {
        "name": "tiny",
        "apply": lambda params, x: x @ params["w"],
        "params": {"w": jnp.ones((3, 1))},
        "calibration": [jnp.ones((2, 3))],
        "evaluate": lambda predict: {"sum": float(predict(jnp.ones((2, 3))).sum())},
    }
    return jc.Task(**{**fields, **changes})


def train(**changes):
    fields = {"loss": loss, "batches": batches, "optimizer": optax.sgd(0.1), "steps": 5}
    return jc.Train(**{**fields, **changes})


def test_the_float_phase_is_like_the_other_one_unless_said():
    same = train(steps=7)
    assert same.float_steps == 7
    assert same.float_optimizer is same.optimizer
    tx = optax.adam(1e-3)
    other = train(steps=7, float_steps=0, float_optimizer=tx)
    assert other.float_steps == 0
    assert other.float_optimizer is tx


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "Task: `name` must be a short name of letters.*; it is 'a/b'"),
        ({"name": ".."}, "Task: `name` must be a short name"),
        ({"apply": 3}, r"Task: `apply` must be a function `apply\(params, x\)`; it is 3"),
        ({"params": None}, "Task: `params` must be a pytree of arrays or a function of a key"),
        ({"calibration": 1.5}, "Task: `calibration` must be an iterable of inputs; it is 1.5"),
        ({"evaluate": {}}, r"Task: `evaluate` must be a function `evaluate\(predict\)`"),
        ({"train": loss}, "Task: `train` must be a `jc.Train.*` or None"),
    ],
)
def test_what_a_task_refuses(changes, message):
    with pytest.raises(jc.JaxCompressError, match=message):
        task(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": None}, r"Train: `loss` must be a function `loss\(params, batch\)`; it is None"),
        ({"batches": 3}, "Train: `batches` must be a list of batches or a function of a numpy"),
        ({"batches": iter([1])}, "Train: `batches` must be a list .* it is walked many times"),
        ({"optimizer": "adam"}, r"Train: `optimizer` must be an optax .*adam\(1e-3\).*'adam'"),
        ({"float_optimizer": 1}, "Train: `float_optimizer` must be an optax transformation"),
        ({"steps": -1}, "Train: `steps` must be a whole number, 0 or more; it is -1"),
        ({"steps": True}, "Train: `steps` must be a whole number"),
        ({"float_steps": 1.5}, "Train: `float_steps` must be a whole number, .*; it is 1.5"),
        ({"seed": "0"}, "Train: `seed` must be a whole number, 0 or more; it is '0'"),
    ],
)
def test_what_train_refuses(changes, message):
    with pytest.raises(jc.JaxCompressError, match=message):
        train(**changes)


def test_a_task_is_found_by_file_by_module_and_by_name(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_text(TASK + "task = again = make('one')\n")
    (tmp_path / "two.py").write_text("from one import make\na, b = make('a'), make('b')\n")
    monkeypatch.chdir(tmp_path)
    for where in ("one.py", "./one.py", f"{tmp_path}/one.py", "one.py:task", "one", "one:again"):
        assert load_task(where).name == "one", where
    assert load_task("two.py:b").name == "b"  # the file beside it can be imported
    with pytest.raises(jc.JaxCompressError, match=r"two.py holds 2 tasks. Name one of two.py:a, t"):
        load_task("two.py")


def test_where_no_task_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none.py").write_text("x = 1\n")
    (tmp_path / "one.py").write_text(TASK + "good = make('one')\n")
    (tmp_path / "notes.txt").write_text("")
    for where, message in {
        "missing.py": f"There is no task file missing.py (seen from {tmp_path}).",
        "./notes.txt": "notes.txt is not a Python file: a task file ends in .py.",
        "none.py": "none.py holds no task. Define one at its top level: `task = jc.Task(name, ",
        "one.py:other": "one.py has no `other`. The tasks it holds: `good`.",
        "none.py:other": "none.py has no `other`. The tasks it holds: none.",
        "none.py:x": "`x` in none.py is a int, not a jc.Task.",
        "no.such.module": "There is no module `no.such.module`: `no` was not found.",
        "json.missing": "There is no module `json.missing`: `json.missing` was not found.",
    }.items():
        with pytest.raises(jc.JaxCompressError, match=re.escape(message)):
            load_task(where)


@pytest.mark.parametrize(
    ("text", "line", "cause"),
    [
        ("\n\nx = 1 / 0\n", 3, "ZeroDivisionError: division by zero"),
        ("def f():\n  raise ValueError('bad')\n\nf()\n", 2, "ValueError: bad"),
        ("import absent_package\n", 1, "ModuleNotFoundError: No module named 'absent_package'"),
        ("import sys\nsys.exit('get the data first')\n", 2, "SystemExit: get the data first"),
        ("x = (\n", 1, "SyntaxError: '(' was never closed"),
        ("import jaxcompress as jc\njc.Task('a b/c', 1, 2, 3, 4)\n", 2, "Task: `name` must be"),
    ],
)
def test_a_file_that_raises_is_named_with_the_line_and_the_cause(tmp_path, text, line, cause):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(jc.JaxCompressError) as error:
        load_task(str(path))
    start = f"The task file {path} raised at line {line} of {path}: {cause}"
    assert str(error.value).startswith(start)


def test_a_module_that_raises_is_named_too(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import absent_package\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(jc.JaxCompressError, match="The module broken_module raised at line 1 of"):
        load_task("broken_module")


def test_user_code_names_the_innermost_line_that_is_not_a_packages():
    def evaluate():
        return jnp.ones(2) @ jnp.ones(3)

    with pytest.raises(jc.JaxCompressError, match=r"evaluate raised at line \d+ of .*test_task.py"):
        with user_code("evaluate"):
            evaluate()


def test_batches_start_again_and_depend_on_the_seed_alone():
    once = [b[0] for b in itertools.islice(stream(train(), 0), 9)]
    again = [b[0] for b in itertools.islice(stream(train(), 0), 9)]
    other = [b[0] for b in itertools.islice(stream(train(), 1), 9)]
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, other)
    assert not np.array_equal(once[0], once[4])  # a second epoch is another one
    assert list(itertools.islice(stream(train(batches=[1, 2]), 0), 5)) == [1, 2, 1, 2, 1]
    with pytest.raises(jc.JaxCompressError, match="`batches` is empty: it must give at least one"):
        next(stream(train(batches=[]), 0))


def test_training_is_that_of_the_loop_written_by_hand():
    tx = optax.adam(0.1)
    params = {"w": jnp.zeros((3, 1)), "unused": np.float32(2)}
    got, losses = fit(compiled_step(loss, tx), params, tx, stream(train(), 0), 6)

    @jax.jit
    def step(params, state, batch):
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    want, state = jax.tree.map(jnp.asarray, params), tx.init(params)
    values = []
    for batch in itertools.islice(stream(train(), 0), 6):
        want, state, value = step(want, state, batch)
        values.append(float(value))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert losses == values
    np.testing.assert_array_equal(params["w"], np.zeros((3, 1)))  # not donated, not changed


def test_leaves_that_are_not_floating_point_are_left_alone():
    params = {"w": jnp.ones((3, 1)), "count": jnp.int32(4), "key": jax.random.key(1), "none": None}
    tx = optax.adamw(0.1)
    state, frozen = start(params, tx)
    assert jax.tree.structure(combine(state.weights, frozen)) == jax.tree.structure(params)
    got, _ = fit(compiled_step(loss, tx), params, tx, stream(train(), 0), 3)
    assert got["count"] == 4
    assert got["key"] == params["key"]
    assert not np.array_equal(got["w"], params["w"])


def test_a_loss_that_is_not_finite_is_named_with_its_step():
    def later(params, batch):
        return jnp.where(batch == 3, jnp.nan, 1.0) * params["w"].sum()

    tx = optax.sgd(0.1)
    with pytest.raises(jc.JaxCompressError, match="float: the loss is not finite in step 3 of 60"):
        fit(compiled_step(later, tx), {"w": jnp.ones(2)}, tx, itertools.count(), 60, label="float")


def test_a_step_is_compiled_once():
    traces = []

    def counted(params, batch):
        traces.append(1)
        return loss(params, batch)

    tx = optax.adam(0.1)
    fit(compiled_step(counted, tx), {"w": jnp.zeros((3, 1))}, tx, stream(train(), 0), 5)
    assert len(traces) == 1
