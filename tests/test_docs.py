# SPDX-License-Identifier: Apache-2.0
"""Everything that the documentation shows is run, and everything that it points at exists.

Conventions in README.md and docs/*.md:

- every ```python block runs; the blocks of one file share a namespace, in order;
- an ```output block directly behind a ```python block is exactly what that block prints (blanks
  at the ends of lines do not count);
- ```python file=NAME: the block is also written to NAME, in the folder where the file's blocks
  run;
- ```sh run: each line is a call of `jaxcompress` that must end with exit code 0, in that folder;
- other ```sh blocks and ```text blocks (output that differs between machines) are not run.
"""

import contextlib
import doctest
import importlib
import io
import pathlib
import pkgutil
import re
import shlex
import typing

import jax
import pytest

import jaxcompress as jc
from jaxcompress._cli import main
from jaxcompress._quantize.recipes import RECIPES

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
MODULES = sorted(m.name for m in pkgutil.walk_packages(jc.__path__, "jaxcompress."))


class Block(typing.NamedTuple):
    """A fenced block of a page: first line of its code, words behind the fence, code."""

    line: int
    info: list[str]
    code: str
    adjacent: bool  # nothing but empty lines between it and the block before

    @property
    def kind(self) -> str:
        return self.info[0] if self.info else ""


def blocks(page: pathlib.Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found, lines, adjacent = [], page.read_text(encoding="utf-8").splitlines(), False
    i = 0
    while i < len(lines):
        if lines[i].startswith("```"):
            end = lines.index("```", i + 1)
            code = "".join(line + "\n" for line in lines[i + 1 : end])
            found.append(Block(i + 2, lines[i][3:].split(), code, adjacent))
            adjacent, i = True, end
        elif lines[i].strip():
            adjacent = False
        i += 1
    return found


def stripped(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def run_python(page: pathlib.Path, block: Block, namespace: dict) -> str:
    """Runs a block in its page's namespace and returns what it prints."""
    for word in block.info[1:]:
        key, _, name = word.partition("=")
        assert key == "file", f"{page.name}:{block.line}: unknown mark {word!r}"
        pathlib.Path(name).write_text(block.code, encoding="utf-8")
    source = "\n" * (block.line - 1) + block.code  # so that an error names the line of the page
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, str(page), "exec"), namespace)
    return printed.getvalue()


@pages
def test_snippets(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace, printed = {"__name__": "__main__"}, ""
    with jax.numpy_rank_promotion("allow"):  # as it is for who runs them
        for block in blocks(page):
            if block.kind == "python":
                printed = run_python(page, block, namespace)
            elif block.kind == "output":
                where = f"{page.name}:{block.line} is not what the block above prints"
                assert stripped(printed) == stripped(block.code), where
            elif block.info == ["sh", "run"]:
                for line in block.code.splitlines():
                    program, *argv = shlex.split(line)
                    assert program == "jaxcompress" and main(argv) == 0, line


@pages
def test_blocks_are_of_a_known_kind(page):
    before = ""
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        assert block.kind in ("python", "output", "text", "sh", "json"), where
        if block.kind == "output":
            assert before == "python" and block.adjacent, f"{where}: no block prints this"
        before = block.kind


def headings(page: pathlib.Path) -> set[str]:
    """The anchors of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_links(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target} does not exist"
        if anchor:
            assert anchor in headings(file), f"{page.name}: {target} is no heading"


def test_index_links_every_page():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    missing = [p.name for p in PAGES[1:] if p.name != "index.md" and f"({p.name})" not in index]
    assert not missing


def table(page: pathlib.Path, first: str) -> list[list[str]]:
    """The rows of the table whose head starts with `first`."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return rows


@pytest.mark.parametrize("name", ["README.md", "docs/recipes.md"])
def test_table_of_named_recipes(name):
    def shown(quantizer):
        if quantizer is None:
            return "as it is"
        stored = f", {quantizer.range}" if quantizer.special else ""
        return f"{quantizer.format.name} per {quantizer.granularity}{stored}"

    wanted = [
        [name, *(shown(q) for q in (r.rules[0].weight, r.rules[1].weight, r.rules[1].activation))]
        for name, r in RECIPES.items()
    ]
    assert table(ROOT / name, "recipe") == wanted


def test_formats_that_the_readme_names_are_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    paragraph = text[text.index("\nFormats now:") :].partition("`jc.formats.TABLE`")[0]
    named = re.findall(r"`(\w+)`", paragraph)
    assert named and set(named) <= set(jc.formats.TABLE)


@pytest.mark.parametrize("name", [m for m in MODULES if not m.endswith("__main__")])
def test_doctests(name):
    module = importlib.import_module(name)
    with jax.numpy_rank_promotion("allow"):
        failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0
