"""Tables of runs, for a terminal and for a Markdown file, and the figures of summary.json in them: their order, their text, and
which value is best. Text is data in both: neither interprets any of it."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from tpresearch.track.shown import (
    UNDEFINED,
    bytes_text,
    count_text,
    duration_text,
    loss_text,
    printable,
    share_text,
)

BY_AXIS = "comm/bytes_per_step_by_axis"
Summary = Mapping[str, Any]
"""The content of a run's summary.json; empty for a run without one."""


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
    """Text on one line of a Markdown file, escaped so that it is not HTML, a link, code or a cell border."""
    return re.sub(r"[\\|`]|\](?=[(\[])", r"\\\g<0>", html.escape(printable(text), quote=False))


@dataclass(frozen=True)
class Figure:
    """A figure of summary.json that is compared between runs."""

    key: str
    title: str
    text: Callable[[float | None], str]
    best: Callable[[Sequence[float]], float]


FIGURES = (
    Figure("train/loss", "loss", loss_text, min),
    Figure("val/loss", "held-out loss", loss_text, min),
    Figure("perf/tokens_per_second_per_device", "tok/s/device", count_text, max),
    Figure("perf/mfu", "MFU", share_text, max),
    Figure("memory/peak_bytes", "peak memory", bytes_text, min),
    Figure("comm/bytes_per_step", "communication per step (rank 0)", bytes_text, min),
    Figure("wall_time_s", "time", duration_text, min),
)


def comparable(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary with the peak of tensors as its peak of memory, where that is the resident size of the process: on a
    CPU most of it is the interpreter and torch.
    """
    if summary.get("device") != "cpu":
        return summary
    held = summary.get("memory/at_peak_bytes")
    return {**summary, "memory/peak_bytes": sum(held.values()) if isinstance(held, dict) else None}


def figures_of(summaries: Sequence[Summary]) -> list[Figure]:
    """The figures that any of the runs has."""
    return [figure for figure in FIGURES if any(each.get(figure.key) is not None for each in summaries)]


def figure_cells(summaries: Sequence[Summary], figures: Sequence[Figure]) -> list[list[Cell]]:
    """One row per run; the best of each figure is marked where the texts of completed runs differ."""
    best = {figure.key: _best(summaries, figure) for figure in figures}
    return [
        [Cell(_text(each, figure), _is_best(each, figure, best[figure.key])) for figure in figures]
        for each in summaries
    ]


def mean_cells(summaries: Sequence[Summary], figures: Sequence[Figure]) -> list[Cell]:
    """Mean and standard deviation of each figure over runs that differ only in their seed."""
    return [Cell(_mean([each.get(figure.key) for each in summaries], figure)) for figure in figures]


def _mean(values: Sequence[float | None], figure: Figure) -> str:
    defined = [value for value in values if value is not None]
    if not defined:
        return UNDEFINED
    middle = figure.text(mean(defined))
    return f"{middle} ± {figure.text(stdev(defined))}" if len(defined) > 1 else middle


def _is_best(summary: Summary, figure: Figure, best: str | None) -> bool:
    return _counts(summary, figure) and figure.text(summary[figure.key]) == best


def _counts(summary: Summary, figure: Figure) -> bool:
    return summary.get("status") == "completed" and summary.get(figure.key) is not None


def _text(summary: Summary, figure: Figure) -> str:
    value = summary.get(figure.key)
    text = figure.text(value)
    if figure.key == "comm/bytes_per_step" and value and (parts := summary.get(BY_AXIS)):
        text += f" ({', '.join(f'{axis} {bytes_text(sent)}' for axis, sent in parts.items())})"
    return text


def _best(summaries: Sequence[Summary], figure: Figure) -> str | None:
    values = [each[figure.key] for each in summaries if _counts(each, figure)]
    return figure.text(figure.best(values)) if len({figure.text(value) for value in values}) > 1 else None
