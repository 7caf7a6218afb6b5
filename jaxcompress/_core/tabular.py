# SPDX-License-Identifier: Apache-2.0
"""Results that a person looks at: text in a terminal, HTML in a notebook or a file."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


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

    def to_html(self, path: str) -> None:
        """Writes the table as a page of HTML."""
        head = f'<meta charset="utf-8"><title>{html.escape(self.title)}</title>'
        page = f"<!DOCTYPE html><html><head>{head}</head><body>{self._repr_html_()}</body></html>"
        with open(path, "w", encoding="utf-8") as file:
            file.write(page)

    def _repr_html_(self) -> str:
        """The table as HTML, which notebooks show."""

        def line(tag: str, cells: Sequence[str]) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(c)}</{tag}>' for c in cells)}</tr>"

        body = "".join(line("td", row) for row in self.cells)
        head = line("th", [heading for heading, _ in self.columns])
        return f"<table><caption>{html.escape(self.title)}</caption>{head}{body}</table>"

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160, file=io.StringIO())
        with console.capture() as text:
            console.print(self.table())
        return text.get()
