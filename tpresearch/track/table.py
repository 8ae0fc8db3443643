"""Tables of runs, for a terminal and for a Markdown file, and the figures of summary.json in them: their order, their text, and
which value is best. Text is escaped in both."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from statistics import mean, stdev
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from tpresearch.track.text import (
    UNDEFINED,
    bytes_text,
    count_text,
    duration_text,
    loss_text,
    printable,
    share_text,
)

BYTES_BY_AXIS = "comm/bytes_per_step_by_axis"
Summary = Mapping[str, Any]
"""The content of a run's summary.json; empty for a run without one."""


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False


Column = Sequence[str | Cell]


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[Cell]]

    @classmethod
    def of_columns(cls, columns: Mapping[str, Column]) -> Table:
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
        table = RichTable(title=title, title_justify="left")
        for name in self.header:
            table.add_column(Text(printable(name)), overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(printable(cell.text), style="bold" if cell.best else "") for cell in row))
        return table


def markdown(text: str) -> str:
    """Text on one line of a Markdown file, escaped so that it is not HTML, a link, code, emphasis or a cell border.

    An underscore within a word, as in `llama2_tiny`, is none.
    """
    special = r"[\\|`*~]|\](?=[(\[])|(?<!\w)_|_(?!\w)"
    return re.sub(special, r"\\\g<0>", html.escape(printable(text), quote=False))


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
LOSSES = ("train/loss", "val/loss")
SEED = "train.seed"
"""The setting in which the runs of a mean differ."""


def with_comparable_memory(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary with the tensors' peak as its peak memory, where the recorded peak is the process's resident size: on a
    CPU most of that is the interpreter and torch.
    """
    if summary.get("device") != "cpu":
        return summary
    held = summary.get("memory/at_peak_bytes")
    return {**summary, "memory/peak_bytes": sum(held.values()) if isinstance(held, dict) else None}


def figure_columns(summaries: Sequence[Summary]) -> dict[str, Column]:
    """The figures that any of the runs has, by their titles, one cell per run."""
    return {figure.title: _cells(summaries, figure) for figure in _figures_of(summaries)}


def mean_columns(groups: Sequence[Sequence[Summary]]) -> dict[str, Column]:
    """The figures by their titles, one cell per group of runs that differ only in their seed: mean and standard deviation, and of how
    many runs where some have no such figure, such as a loss that is not finite."""
    figures = _figures_of(list(chain(*groups)))
    return {figure.title: [Cell(_mean(group, figure)) for group in groups] for figure in figures}


def _figures_of(summaries: Sequence[Summary]) -> list[Figure]:
    return [figure for figure in FIGURES if any(each.get(figure.key) is not None for each in summaries)]


def _value(summary: Summary, figure: Figure) -> float | None:
    """What is compared between runs; the time of a resumed run is that of its last process alone, and is not."""
    return None if figure.key == "wall_time_s" and summary.get("resumed") else summary.get(figure.key)


def _cells(summaries: Sequence[Summary], figure: Figure) -> list[Cell]:
    """One cell per run; the best is marked where the texts of completed runs differ, and losses are of the same tokens, those
    held out of as many."""
    completed = [each.get("status") == "completed" for each in summaries]
    compared = [each for each in compress(summaries, completed) if _value(each, figure) is not None]
    values = [value for each in compared if (value := _value(each, figure)) is not None]
    alike = figure.key not in LOSSES or len({_tokens_of(each, figure) for each in compared}) < 2
    best = figure.text(figure.best(values)) if alike and len(set(map(figure.text, values))) > 1 else None
    return [
        Cell(_text(each, figure), counts and figure.text(_value(each, figure)) == best)
        for each, counts in zip(summaries, completed, strict=True)
    ]


def _tokens_of(summary: Summary, figure: Figure) -> tuple[object, ...]:
    """What tells the tokens that a loss is of from others: their text, the entropy that depends on the tokenizer, the rows held out."""
    tokens = summary.get("corpus_hash"), loss_text(summary.get("unigram_entropy"))
    return (*tokens, summary.get("held_out_rows")) if figure.key == "val/loss" else tokens


def _text(summary: Summary, figure: Figure) -> str:
    value = summary.get(figure.key)
    text = figure.text(value)
    if figure.key == "comm/bytes_per_step" and value and (parts := summary.get(BYTES_BY_AXIS)):
        text += f" ({', '.join(f'{axis} {bytes_text(sent)}' for axis, sent in parts.items())})"
    if value is not None and _value(summary, figure) is None:
        text += " since it resumed"
    return text


def _mean(summaries: Sequence[Summary], figure: Figure) -> str:
    values = [value for each in summaries if (value := _value(each, figure)) is not None]
    if not values:
        return UNDEFINED
    spread = f" ± {figure.text(stdev(values))}" if len(values) > 1 else ""
    lacking = f" ({len(values)} of {len(summaries)} runs)" if len(values) < len(summaries) else ""
    return f"{figure.text(mean(values))}{spread}{lacking}"
