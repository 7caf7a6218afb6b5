# SPDX-License-Identifier: Apache-2.0
"""The command line: `jaxcompress compress | sites | report | verify | recipes`."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from . import __version__
from ._compress import QAT, compress, initial
from ._core.observe import sites
from ._errors import ArtifactError, JaxCompressError, RecipeError
from ._page import COLUMNS, report_of, summary
from ._quantize import methods, recipes
from ._quantize.decisions import describe
from ._quantize.recipe import Recipe
from ._result import EXPORTS, ONNX, QONNX, REPORT, STABLEHLO, read_report
from ._task import Task, load_task, user_code
from .export import load, verify

_CLOSE = 0.01  # of the largest value of an output: how far runtimes may be apart


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the words behind `jaxcompress`; those of the process when left out.

    Returns:
      The exit code: 0, 1 for an artifact that differs, 2 for anything that the user can mend, 130
      when interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except (JaxCompressError, OSError) as error:
        text = (
            str(error).encode(errors="backslashreplace").decode()
        )  # names in files may be anything
        print(f"jaxcompress: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jaxcompress: interrupted, nothing was written", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("jaxcompress", description="Compresses JAX models.")
    parser.add_argument("--version", action="version", version=f"jaxcompress {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        new = commands.add_parser(name, help=text, description=text)
        new.set_defaults(run=run)
        return new

    new = command("compress", _compress, "Train a model, compress it, measure both.")
    _add_task(new)
    new.add_argument("--recipe", default="w8a8", metavar="NAME|FILE", help="default: w8a8")
    new.add_argument(
        "--method",
        default=QAT,
        metavar="NAME[+NAME]",
        help="qat (default): train with the recipe in the loop; or methods of jc.quantize, "
        "after the float training: rtn, mse, gptq, awq+gptq, gptq+bias_correction, ...",
    )
    new.add_argument(
        "--skip", action="append", default=[], metavar="PATTERN", help="sites to leave in float"
    )
    new.add_argument(
        "--out", type=pathlib.Path, metavar="DIR", help="default: compressed/TASK-RECIPE[-METHOD]"
    )
    new.add_argument(
        "--export", action="append", default=[], choices=EXPORTS, help="also write the program"
    )
    new.add_argument("--seed", type=_count, metavar="N", help="default: that of the task")
    new.add_argument("--steps", type=_count, metavar="N", help="training steps with the recipe")
    new.add_argument("--float-steps", type=_count, metavar="N", help="training steps before them")
    new.add_argument("--quiet", action="store_true", help="no progress")
    _add_task(command("sites", _sites, "List the matmuls, convolutions and embeddings of a model."))
    new = command("report", _report, "Show an earlier result.")
    new.add_argument("dir", type=pathlib.Path, metavar="DIR", help="written by `compress`")
    new = command("verify", _verify, "Run an exported program and compare it with its function.")
    new.add_argument("dir", type=pathlib.Path, metavar="DIR", help="of `compress --export`")
    command("recipes", _recipes, "List the named recipes.")
    return parser


def _add_task(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", metavar="TASK", help="path/to/file.py or package.module, [:name]")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _compress(arguments: argparse.Namespace) -> None:
    if arguments.method != QAT:
        methods.chain(arguments.method.split("+"))  # an unknown one is an error before any work
    recipe = _recipe(arguments.recipe).skip(*arguments.skip)
    task = _override(load_task(arguments.task), arguments)
    seed = arguments.seed
    if seed is None:
        seed = 0 if task.train is None else task.train.seed
    parts = [task.name, recipe.name, *([arguments.method] if arguments.method != QAT else [])]
    name = re.sub(r"[^\w.+-]", "_", "-".join(parts))
    out = arguments.out or pathlib.Path("compressed", name)
    result = compress(
        task, recipe, out,
        seed=seed, method=arguments.method, quiet=arguments.quiet, exports=arguments.export,
    )  # fmt: skip
    _show(result, out)


def _recipe(name: str) -> Recipe:
    path = pathlib.Path(name)
    if path.suffix != ".json" and not path.is_file():
        return recipes.get(name)
    try:
        return Recipe.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise RecipeError(f"The recipe {path} is wrong: {error}") from None


def _override(task: Task, arguments: argparse.Namespace) -> Task:
    changes = {
        field: getattr(arguments, field)
        for field in ("steps", "float_steps")
        if getattr(arguments, field) is not None
    }
    if not changes:
        return task
    if task.train is None:
        raise JaxCompressError(
            f"--steps and --float-steps need a task that is trained, and `{task.name}` has no "
            "`train=jc.Train(...)`."
        )
    return dataclasses.replace(task, train=dataclasses.replace(task.train, **changes))


def _sites(arguments: argparse.Namespace) -> None:
    task = load_task(arguments.task)
    params, x = initial(task, 0 if task.train is None else task.train.seed)
    with user_code(f"apply of task `{task.name}`"):
        found = sites(task.apply)(params, x)
    table = Table("site", "op", "operands", "layers", "source", title=f"Sites of {task.name}")
    for site in found:
        operands = (f"{o.role} {o.dtype}{list(o.shape)}" for o in site.operands)
        layers = " x ".join(map(str, site.stack))
        table.add_row(site.name, site.op, "\n".join(operands), layers, site.source)
    _console().print(table)


def _report(arguments: argparse.Namespace) -> None:
    result = read_report(arguments.dir)
    try:
        _show(result, arguments.dir)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{arguments.dir}/report.json is damaged: {type(error).__name__}: {error}."
        ) from None


def _verify(arguments: argparse.Namespace) -> int:
    programs = [arguments.dir]
    if (arguments.dir / REPORT).is_file():
        files = [arguments.dir / name / "model.onnx" for name in (ONNX, QONNX)]
        programs = [arguments.dir / STABLEHLO, *files]
        programs = [path for path in programs if path.exists()]
        if not programs:
            raise ArtifactError(
                f"{arguments.dir} holds no program. Compress again with --export {STABLEHLO}."
            )
    good = True
    for path in programs:
        found = verify(load(path))
        _console().print(found.table())
        # Another runtime sums in another order, and a rounded value may then be its neighbour.
        good &= found.close(_CLOSE) if path.suffix == ".onnx" else found.equal
    return 0 if good else 1


def _recipes(arguments: argparse.Namespace) -> None:
    table = Table("recipe", "sites", "weights", "activations")
    for recipe in recipes.RECIPES.values():
        for i, rule in enumerate(recipe.rules):
            what = rule.pattern if rule.op is None else f"{rule.pattern} ({rule.op})"
            formats = describe(rule.weight), describe(rule.activation)
            table.add_row("" if i else recipe.name, what, *formats)
    _console().print(table)


def _show(result: Mapping[str, Any], folder: pathlib.Path) -> None:
    """The table of sites, and below it what they cost and bring together."""
    console = _console()
    console.print(report_of(result).table())
    table = Table(*COLUMNS)
    for row in summary(result):
        table.add_row(*row)
    console.print(table)
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    console.print(f"{folder}: {names}", highlight=False)


def _console() -> Console:
    """Of stdout; wide enough for the tables where that is a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=160)
