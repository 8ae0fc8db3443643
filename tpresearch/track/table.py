"""A table of runs, for a terminal and for a Markdown file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable
from rich.text import Text


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[Cell]]

    def markdown(self) -> str:
        """Its lines, the best in bold."""
        body = [[f"**{cell.text}**" if cell.best else cell.text for cell in row] for row in self.rows]
        return "".join(map(_line, [self.header, ["---"] * len(self.header), *body]))

    def rich(self, title: str | None = None) -> RichTable:
        """As it is printed: nothing in it is read as markup."""
        table = RichTable(title=title, title_justify="left")
        for name in self.header:
            table.add_column(Text(name), overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(cell.text, style="bold" if cell.best else "") for cell in row))
        return table


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
