# SPDX-License-Identifier: Apache-2.0
"""The repository keeps its own rules: licence lines, import directions, a light import, one CI."""

import ast
import collections
import os
import pathlib
import re
import subprocess
import sys

import pytest
from covers import left_out

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "jaxcompress"
FOLDERS = ("jaxcompress", "tests", "examples", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MODULES = sorted(PACKAGE.rglob("*.py"))

# A file imports from its own part and from parts with a smaller number; two with the same number
# never import each other, except the last, which are one part.
LAST = 6
ROWS = {
    "_errors": 0,
    "formats": 1,
    "_core": 2,
    "_files": 3,
    "_calibration": 3,
    "_solvers": 3,
    "_quantize": 4,
    "prune": 4,
    "distill": 4,
    "export": 5,
    "_task": LAST,
    "_train": LAST,
    "_result": LAST,
    "_page": LAST,
    "_compress": LAST,
    "_deploy": LAST,
    "_cli": LAST,
    "__main__": LAST,
}
OPTIONAL = (
    "chex equinox flatbuffers flax haiku hls4ml onnx onnx_ir onnxruntime orbax qonnx rich "
    "safetensors sklearn torch"
).split()


def relative(path):
    return path.relative_to(ROOT).as_posix()


def imports(path):
    """Full dotted names of what a file imports, `from` imports with the name behind."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = path.relative_to(ROOT).with_suffix("").parts
                base = ".".join([*parts[: len(parts) - node.level], *filter(None, [base])])
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


def part(name):
    """The part of the package that a dotted name lies in; None for the package itself."""
    words = name.split(".")
    return words[1] if words[0] == "jaxcompress" and len(words) > 1 and words[1] in ROWS else None


def wrong_directions(path):
    words = path.relative_to(PACKAGE).with_suffix("").parts
    own = words[0]
    if own == "__init__":
        return []
    wrong = []
    for name in imports(path):
        if name.split(".")[0] != "jaxcompress":
            continue
        other = part(name)
        if other is None:  # jaxcompress itself, such as its version
            allowed = ROWS[own] == LAST
        else:
            allowed = own == other or ROWS[other] < ROWS[own] or ROWS[other] == ROWS[own] == LAST
        if not allowed:
            wrong.append(f"{relative(path)} imports {name}")
    return wrong


def test_every_file_of_the_package_has_a_row():
    parts = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in MODULES}
    assert parts - {"__init__"} <= ROWS.keys()


def test_imports_point_downward():
    assert [wrong for path in MODULES for wrong in wrong_directions(path)] == []


@pytest.mark.parametrize(
    ("file", "line", "allowed"),
    [
        ("_core/sites.py", "from .._errors import SiteError", True),
        ("_core/sites.py", "from .._quantize.recipe import Recipe", False),
        ("_core/sites.py", "from . import patterns", True),
        ("_core/sites.py", "import jaxcompress", False),
        ("_quantize/aware.py", "from ..prune import masks", False),
        ("_quantize/aware.py", "from .. import formats", True),
        ("_cli.py", "from ._task import Task", True),
        ("_task.py", "from . import __version__", True),
        ("_errors.py", "from . import formats", False),
    ],
)
def test_the_check_of_directions_sees_what_it_should(monkeypatch, file, line, allowed):
    monkeypatch.setattr(pathlib.Path, "read_text", lambda *_, **__: line)
    assert (wrong_directions(PACKAGE / file) == []) == allowed


def test_private_names_of_jax_are_in_one_file():
    private = re.compile(r"jax\._src|jax\.interpreters")
    files = [relative(p) for p in MODULES if any(private.match(n) for n in imports(p))]
    assert files == ["jaxcompress/_core/_compat.py"]


def test_optional_packages_are_imported_in_one_file_each():
    """Except rich, which draws tables wherever there are some, and onnx in the room for it."""
    packages = {relative(p): {name.split(".")[0] for name in imports(p)} for p in MODULES}
    room = "jaxcompress/export/_onnx/"
    assert all(file.startswith(room) for file, names in packages.items() if "onnx" in names)
    for package in set(OPTIONAL) - {"rich", "onnx"}:
        files = [file for file, imported in packages.items() if package in imported]
        assert len(files) <= 1, (package, files)


def test_every_source_file_says_its_licence():
    line = "# SPDX-License-Identifier: Apache-2.0"
    assert [relative(p) for p in SOURCES if not p.read_text("utf-8").startswith(line)] == []
    assert line in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()[1]
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def run(code, **environment):
    """What a fresh process of this Python prints."""
    words = [sys.executable, "-W", "error", "-c", code]
    env = {**os.environ, **environment}
    found = subprocess.run(words, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    return found.stdout


def test_importing_loads_no_optional_package():
    """Except flatbuffers, which JAX loads itself where it is installed."""
    names = set(OPTIONAL) - {"flatbuffers"}
    code = f"import jaxcompress, sys; print(*({names!r} & sys.modules.keys()))"
    assert run(code).strip() == ""


def test_importing_costs_less_than_half_of_importing_jax_and_optax(tmp_path):
    """A ratio of CPU times in one process, about 0.25: how busy the machine is cancels.

    Of bytecode, as an installed package has it: compiling the sources at each import costs more
    than running them. The first run writes it, of jax too.
    """
    code = """
import time
begin = time.process_time()
import jax, optax
middle = time.process_time()
import jaxcompress
print((time.process_time() - middle) / (middle - begin))
"""
    bytecode = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    run(code, **bytecode)
    assert min(float(run(code, **bytecode)) for _ in range(3)) < 0.5


def test_rooms_are_imported_when_they_are_used():
    rooms = ("distill", "export", "prune")
    code = f"""
import sys, jaxcompress as jc
loaded = [r for r in {rooms} if "jaxcompress." + r in sys.modules]
assert not loaded, loaded
assert {{*{rooms}, "load_params", "save_params"}} <= set(dir(jc))
assert jc.save_params is jc.export.save_params and jc.prune.masked and jc.distill.kl
try:
    jc.quantise
except AttributeError as e:
    print(e)
"""
    assert "no attribute 'quantise'" in run(code)


def test_importing_starts_no_backend():
    code = """
import jax, jaxcompress
jax.config.update("jax_platforms", "none such")  # refused once there is a backend
try:
    jax.devices()
except RuntimeError:
    print("not started")
"""
    assert run(code).strip() == "not started"


def test_ci_runs_the_test_command_of_the_readme():
    """`.ci/run` reads the command from the README; CONTRIBUTING says the same one."""
    pattern = re.compile(r"^python -m venv .* -m pytest.*$", re.MULTILINE)
    commands = pattern.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert commands == [
        "python -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest"
    ]
    assert pattern.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")) == commands
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "grep -E '^python -m venv .* -m pytest' README.md" in script
    assert 'bash -c "$tests"' in script


def test_ci_names_no_machine():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert script.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in script
    assert not re.search(r"/root|/home/|/work/|://", script)
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them by name alone, and stops at the second of two."""
    paths = (ROOT / "tests").rglob("*.py")
    names = [path.name for path in paths if path.name != "conftest.py"]
    assert len(names) == len(set(names)), sorted(n for n in set(names) if names.count(n) > 1)


@pytest.mark.parametrize("times", [1, 2])
def test_a_cover_has_every_value_so_often(times):
    pairs = [("p", 1), ("q", 2), ("r", 3)]
    params = [{"a": a, "b": b, "c": c} for a in "vwxyz" for b, c in pairs]
    marks = [
        pytest.mark.parametrize("a", "vwxyz").mark,
        pytest.mark.parametrize("b, c", pairs).mark,
    ]

    class Case:
        def __init__(self, params):
            self.callspec, self.params = self, params

        def get_closest_marker(self, _):
            return pytest.mark.cover(times=times).mark

        def iter_markers(self, _):
            return marks

    cases = [Case(case) for case in params]
    rest = left_out(cases)
    kept = [case.params for case in cases if case not in rest]
    assert len(kept) == 5 * times  # no fewer have every letter so often
    for name in "abc":
        found = collections.Counter(case[name] for case in kept)
        assert found.keys() == {case[name] for case in params} and min(found.values()) >= times
