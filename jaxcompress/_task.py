# SPDX-License-Identifier: Apache-2.0
"""What the command line works on: a model, its data and its measure, in one object."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import pathlib
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import optax

from ._errors import JaxCompressError

_HERE = pathlib.Path(__file__).parent
# Where the lines of a traceback lie that are not of the user's making.
_NOT_THE_USERS = (*map(sysconfig.get_path, ("purelib", "stdlib")), f"{_HERE}{os.sep}", "<")


@dataclasses.dataclass(frozen=True)
class Train:
    """How a task's model is trained: first in float, then with the recipe in the loop.

    Args:
      loss: `loss(params, batch)`, a scalar.
      batches: the training data, any pytrees. Either an iterable that can be walked again and
        again (a list of batches), or a function of a `numpy.random.Generator` that returns an
        iterable of batches. Both are restarted when they end, the function with the same
        generator, so that every epoch is shuffled anew.
      optimizer: an optax transformation; its state starts afresh with the int8-aware steps.
      steps: number of steps with the recipe in the loop; 0 rounds the float model.
      seed: of the batches, and of the parameters where the task makes them from a key.
      float_steps: number of float steps before them; `steps` when left out, 0 for a model that
        comes trained.
      float_optimizer: optax transformation of the float steps; `optimizer` when left out.

    Raises:
      JaxCompressError: for an argument of the wrong kind.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> def batches(rng):
      ...   for _ in range(10):
      ...     x = rng.normal(size=(32, 4)).astype("float32")
      ...     yield x, x.sum(1, keepdims=True)
      >>> def loss(params, batch):
      ...   return jnp.mean((batch[0] @ params["w"] - batch[1]) ** 2)
      >>> Train(loss, batches, optax.sgd(0.1), steps=100).float_steps
      100
    """

    loss: Callable[[Any, Any], Any]
    batches: Iterable[Any] | Callable[[Any], Iterable[Any]]
    optimizer: optax.GradientTransformation
    steps: int
    seed: int = 0
    float_steps: int | None = None
    float_optimizer: optax.GradientTransformation | None = None

    def __post_init__(self):
        if self.float_steps is None:
            object.__setattr__(self, "float_steps", self.steps)
        if self.float_optimizer is None:
            object.__setattr__(self, "float_optimizer", self.optimizer)
        _need("Train", "loss", self.loss, callable(self.loss), "a function `loss(params, batch)`")
        again = callable(self.batches) or _can_restart(self.batches)
        wanted = "a list of batches or a function of a numpy Generator: it is walked many times"
        _need("Train", "batches", self.batches, again, wanted)
        for field in ("optimizer", "float_optimizer"):
            tx = getattr(self, field)
            fits = callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))
            _need("Train", field, tx, fits, "an optax transformation such as `optax.adam(1e-3)`")
        for field in ("steps", "float_steps", "seed"):
            value = getattr(self, field)
            fits = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            _need("Train", field, value, fits, "a whole number, 0 or more")


@dataclasses.dataclass(frozen=True)
class Task:
    """A model with what is needed to compress it and to see what that costs.

    Args:
      name: a short name; result directories are called after it.
      apply: `apply(params, x)`, the model as a pure function.
      params: a pytree of arrays, or a function of a `jax.random.key` that makes it.
      calibration: an iterable of inputs `x`; the first one is also the example from which the
        model is traced.
      evaluate: `evaluate(predict)`, where `predict(x)` runs the model; returns a dictionary
        from names of metrics to numbers. A metric called `accuracy` should be the share of
        examples whose largest output is the right one: for it the change is given with its
        paired 95 % interval.
      train: how the model is trained, a `Train`; without it weights are only rounded.

    Raises:
      JaxCompressError: for an argument of the wrong kind.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.eye(4)
      >>> task = Task(
      ...   "identity",
      ...   apply=lambda params, x: x @ params["w"],
      ...   params={"w": jnp.eye(4)},
      ...   calibration=[x],
      ...   evaluate=lambda predict: {"error": float(jnp.abs(predict(x) - x).max())},
      ... )
      >>> task.evaluate(lambda x: task.apply(task.params, x))
      {'error': 0.0}
    """

    name: str
    apply: Callable[[Any, Any], Any]
    params: Any
    calibration: Iterable[Any]
    evaluate: Callable[[Callable[[Any], Any]], Mapping[str, float]]
    train: Train | None = None

    def __post_init__(self):
        fits = isinstance(self.name, str) and re.fullmatch(r"\w[\w.+ -]*", self.name) is not None
        _need("Task", "name", self.name, fits, "a short name of letters, digits and . _ + -")
        _need("Task", "apply", self.apply, callable(self.apply), "a function `apply(params, x)`")
        fits = self.params is not None
        _need("Task", "params", self.params, fits, "a pytree of arrays or a function of a key")
        fits = isinstance(self.calibration, Iterable) and not isinstance(self.calibration, str)
        _need("Task", "calibration", self.calibration, fits, "an iterable of inputs")
        fits = callable(self.evaluate)
        _need("Task", "evaluate", self.evaluate, fits, "a function `evaluate(predict)`")
        fits = self.train is None or isinstance(self.train, Train)
        _need("Task", "train", self.train, fits, "a `jc.Train(...)` or None")


def load_task(where: str) -> Task:
    """Finds the task in a file or module.

    Args:
      where: `path/to/file.py` or `package.module`, with `:name` behind it where it holds more
        than one task.

    Raises:
      JaxCompressError: no such file, module or name; the file raises when it is run; it holds
        no task, or several and no name was given.
    """
    head, colon, tail = where.rpartition(":")
    place, name = (head, tail) if colon and tail.isidentifier() else (where, None)
    is_file = place.endswith(".py") or "/" in place or "\\" in place
    module = _run_file(pathlib.Path(place)) if is_file else _import_module(place)
    if name is not None:
        if not hasattr(module, name):
            found = ", ".join(f"`{each}`" for each in _tasks(module)) or "none"
            raise JaxCompressError(f"{place} has no `{name}`. The tasks it holds: {found}.")
        task = getattr(module, name)
        if not isinstance(task, Task):
            kind = type(task).__name__
            raise JaxCompressError(f"`{name}` in {place} is a {kind}, not a jc.Task.")
        return task
    tasks = _tasks(module)
    if not tasks:
        raise JaxCompressError(
            f"{place} holds no task. Define one at its top level: `task = jc.Task(name, apply, "
            "params, calibration, evaluate)`."
        )
    if len(set(map(id, tasks.values()))) > 1:
        choices = ", ".join(f"{place}:{each}" for each in tasks)
        raise JaxCompressError(f"{place} holds {len(tasks)} tasks. Name one of {choices}.")
    return next(iter(tasks.values()))


@contextlib.contextmanager
def user_code(what: str, file: str | None = None) -> Iterator[None]:
    """Turns an exception of the user's code into one message: what raised, where, and why.

    Args:
      what: what was being run, the start of the sentence.
      file: the file whose line is named; by default the innermost one outside of packages.
    """
    try:
        yield
    except JaxCompressError as error:
        if file is None:  # one of ours, already clear; a file still says where it came from
            raise
        raise JaxCompressError(f"{what} raised at {_line(error, file)}: {error}") from error
    except (Exception, SystemExit) as error:
        cause = f"{type(error).__name__}: {error}"
        raise JaxCompressError(f"{what} raised at {_line(error, file)}: {cause}") from error


def _line(error: BaseException, file: str | None) -> str:
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"line {error.lineno} of {file}"
    frames = traceback.extract_tb(error.__traceback__)
    if file is None:
        inside = [f for f in frames if not f.filename.startswith(_NOT_THE_USERS)]
        frame = (inside or list(frames))[-1]
    else:
        frame = ([f for f in frames if f.filename == file] or list(frames))[-1]
    return f"line {frame.lineno} of {frame.filename}"


def _run_file(path: pathlib.Path) -> Any:
    if not path.is_file():
        raise JaxCompressError(f"There is no task file {path} (seen from {pathlib.Path.cwd()}).")
    name, origin = "_jaxcompress_task_" + re.sub(r"\W", "_", path.stem), str(path.absolute())
    spec = importlib.util.spec_from_file_location(name, origin)
    if spec is None or spec.loader is None:
        raise JaxCompressError(f"{path} is not a Python file: a task file ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles of the file look themselves up there
    with _on_path(path.parent), user_code(f"The task file {path}", origin):
        spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> Any:
    with _on_path(pathlib.Path.cwd()), user_code(f"The module {name}"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise JaxCompressError(
                f"There is no module `{name}`: `{error.name}` was not found. A task is the path "
                "of a file that ends in .py, or a module that can be imported from here."
            ) from None


@contextlib.contextmanager
def _on_path(folder: pathlib.Path) -> Iterator[None]:
    """As for a script: what lies beside it can be imported while it is loaded."""
    entry = str(folder.absolute())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _tasks(module: Any) -> dict[str, Task]:
    return {name: each for name, each in vars(module).items() if isinstance(each, Task)}


def _can_restart(batches: Any) -> bool:
    return isinstance(batches, Iterable) and not isinstance(batches, Iterator | str)


def _need(owner: str, field: str, found: Any, fits: bool, wanted: str):
    if not fits:
        shown = repr(found)
        shown = shown if len(shown) <= 60 else f"a {type(found).__name__}"
        raise JaxCompressError(f"{owner}: `{field}` must be {wanted}; it is {shown}.")
