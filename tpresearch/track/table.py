"""A table of runs, for a terminal and for a Markdown file. Its text is data in both: neither interprets any of it."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable
from rich.text import Text

from tpresearch.track.shown import printable


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[Cell]]

    @classmethod
    def of_columns(cls, columns: Mapping[str, Sequence[str | Cell]]) -> Table:
        """The table with these columns, all of one length."""
        rows = zip(*columns.values(), strict=True)
        cells = [[each if isinstance(each, Cell) else Cell(each) for each in row] for row in rows]
        return cls(list(columns), cells)

    def markdown(self) -> str:
        """The table in Markdown, the best of each figure in bold."""
        header = list(map(markdown, self.header))
        body = [
            [f"**{markdown(cell.text)}**" if cell.best else markdown(cell.text) for cell in row]
            for row in self.rows
        ]
        return "".join(f"| {' | '.join(line)} |\n" for line in (header, ["---"] * len(header), *body))

    def rich(self, title: str | None = None) -> RichTable:
        """The table as rich prints it."""
        table = RichTable(title=title, title_justify="left")
        for name in self.header:
            table.add_column(Text(printable(name)), overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(printable(cell.text), style="bold" if cell.best else "") for cell in row))
        return table


def markdown(text: str) -> str:
    """Text on one line of a Markdown file, in which it is no HTML, link, code or border of a cell."""
    return re.sub(r"[\\|`]|\](?=[(\[])", r"\\\g<0>", html.escape(printable(text), quote=False))
