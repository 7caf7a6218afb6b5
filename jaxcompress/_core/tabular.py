# SPDX-License-Identifier: Apache-2.0
"""Results that a person looks at: text in a terminal, HTML in a notebook or a file."""

from __future__ import annotations

import html
import io
import os
import pathlib
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


_STYLE = (
    "<style>body { font-family: sans-serif; margin: 2em } h1 { font-size: 1.3em } "
    "h2 { font-size: 1.1em; margin-top: 2em }"
    "table { border-collapse: collapse; font-size: 0.9em } caption { text-align: left; "
    "font-weight: bold; padding-bottom: 0.6em } td, th { padding: 0.2em 0.8em; text-align: left; "
    "border-bottom: 1px solid #ddd } tr:hover { background: #f4f6fa }</style>"
)


class Tabular:
    """A titled table. Subclasses give its title, columns and cells."""

    @property
    def title(self) -> str:
        """What the table is about, in a line."""
        raise NotImplementedError

    @property
    def columns(self) -> Sequence[tuple[str, bool]]:
        """(heading, whether it holds numbers) of each column."""
        raise NotImplementedError

    @property
    def cells(self) -> Sequence[Sequence[str]]:
        """The rows as text."""
        raise NotImplementedError

    def table(self) -> Table:
        """As a `rich` table."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.title))
        for heading, number in self.columns:
            table.add_column(heading, overflow="fold", justify="right" if number else "left")
        for row in self.cells:
            table.add_row(*map(Text, row))  # names are no markup: `['a/b']`
        return table

    @property
    def figures(self) -> Sequence[str]:
        """Figures that stand below the table in a page, as HTML."""
        return ()

    def to_html(self, path: str | os.PathLike) -> None:
        """Writes a page of HTML that needs no other file: the table, and figures below it.

        The file is there whole or not at all.
        """
        write_page(path, self.title, self._repr_html_() + "".join(self.figures))

    def _repr_html_(self) -> str:
        """The table as HTML, which notebooks show."""

        return html_table(self.title, [heading for heading, _ in self.columns], self.cells)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160, file=io.StringIO())
        with console.capture() as text:
            console.print(self.table())
        return text.get()


def html_table(caption: str, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table as HTML."""

    def line(tag: str, texts: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(t)}</{tag}>' for t in texts)}</tr>"

    body = "".join(line("td", row) for row in cells)
    return f"<table><caption>{html.escape(caption)}</caption>{line('th', columns)}{body}</table>"


def write_page(path: str | os.PathLike, title: str, body: str) -> None:
    """Writes a page of HTML, whole or not at all."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title>{_STYLE}'
    page = f"<!DOCTYPE html><html><head>{head}</head><body>{body}</body></html>"
    target = pathlib.Path(path)
    temporary = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
