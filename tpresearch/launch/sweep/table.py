"""What a sweep leaves: summary.csv, summary.md, and a table on the terminal, a row a job."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tpresearch.launch.sweep.outcome import Outcome
from tpresearch.track.shown import (
    UNDEFINED,
    bytes_text,
    count_text,
    duration_text,
    loss_text,
    path_text,
    share_text,
)

SEED = "train.seed"


@dataclass(frozen=True)
class Figure:
    """A figure of summary.json that is compared between jobs."""

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
    Figure("comm/bytes_per_step", "sent a step", bytes_text, min),
    Figure("wall_time_s", "time", duration_text, min),
)
BY_AXIS = "comm/bytes_per_step_by_axis"


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False


def rows_of(outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[Cell]]]:
    """The table: its header, and a row a job, the best of each figure marked where jobs differ in it."""
    keys = differing(outcomes)
    shown = [figure for figure in FIGURES if any(_value(o, figure) is not None for o in outcomes)]
    failed = any(outcome.error for outcome in outcomes)
    header = [
        *("job", *keys, "ranks"),
        *(figure.title for figure in shown),
        *("status", *(["error"] if failed else [])),
    ]
    best = {figure.key: _best(outcomes, figure) for figure in shown}
    rows = []
    for outcome in outcomes:
        cells = [Cell(str(outcome.job.number))]
        cells += [Cell(outcome.job.settings.get(key, UNDEFINED)) for key in keys]
        cells.append(Cell(str(outcome.job.ranks)))
        for figure in shown:
            value = _value(outcome, figure)
            text = figure.text(value)
            if figure.key == "comm/bytes_per_step" and value:
                text += _axes(outcome.summary.get(BY_AXIS))
            cells.append(Cell(text, value is not None and value == best[figure.key]))
        status = f"{outcome.status} earlier" if outcome.job.completed else outcome.status
        cells.append(Cell(status))
        if failed:
            cells.append(Cell(outcome.error or ""))
        rows.append(cells)
    return header, rows


def differing(outcomes: Sequence[Outcome]) -> list[str]:
    """The keys of overrides in which jobs differ; all of them where there is one job."""
    settings = [outcome.job.settings for outcome in outcomes]
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if len(outcomes) == 1 or len({each.get(key) for each in settings}) > 1]


def over_seeds(outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[Cell]]] | None:
    """Mean and standard deviation over the completed jobs that differ in train.seed alone, if there are any."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.status == "completed" and outcome.summary:
            groups.setdefault(outcome.job.group, []).append(outcome)
    groups = {
        group: each for group, each in groups.items() if len({outcome.job.signature for outcome in each}) > 1
    }
    if not groups:
        return None
    keys = [key for key in differing(outcomes) if key != SEED]
    shown = [figure for figure in FIGURES if any(_value(o, figure) is not None for o in outcomes)]
    rows = []
    for each in groups.values():
        first = each[0].job
        cells = [Cell(first.settings.get(key, UNDEFINED)) for key in keys]
        cells += [Cell(str(first.ranks)), Cell(str(len(each)))]
        for figure in shown:
            values = [value for o in each if (value := _value(o, figure)) is not None]
            cells.append(Cell(_mean(values, figure)))
        rows.append(cells)
    return [*keys, "ranks", "seeds", *(figure.title for figure in shown)], rows


def _mean(values: Sequence[float], figure: Figure) -> str:
    if not values:
        return UNDEFINED
    middle = figure.text(mean(values))
    return f"{middle} ± {figure.text(stdev(values))}" if len(values) > 1 else middle


def _value(outcome: Outcome, figure: Figure) -> float | None:
    value = outcome.summary.get(figure.key)
    if value is None and figure.key == "wall_time_s":
        return outcome.seconds
    return value


def _best(outcomes: Sequence[Outcome], figure: Figure) -> float | None:
    values = [value for o in outcomes if o.status == "completed" and (value := _value(o, figure)) is not None]
    return figure.best(values) if len(set(values)) > 1 else None


def _axes(parts: Mapping[str, float] | None) -> str:
    return f" ({', '.join(f'{axis} {bytes_text(sent)}' for axis, sent in parts.items())})" if parts else ""


def write_files(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """summary.csv: overrides, then all that the summaries hold, then the folder. summary.md: the table."""
    records = [_record(outcome) for outcome in outcomes]
    last = ("error", "folder")
    columns = list(dict.fromkeys(key for record in records for key in record if key not in last))
    with (folder / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *last])
        writer.writeheader()
        writer.writerows(records)
    text = _markdown(*rows_of(outcomes))
    if seeds := over_seeds(outcomes):
        text += f"\nOver `{SEED}`, mean ± standard deviation:\n\n{_markdown(*seeds)}"
    (folder / "summary.md").write_text(text, encoding="utf-8")


def _record(outcome: Outcome) -> dict[str, Any]:
    """A row of summary.csv; overrides come first, and what is nested is flat: `mesh/tp`."""
    record: dict[str, Any] = dict(outcome.job.settings)
    own = {"status": outcome.status, "error": outcome.error or "", "seconds": outcome.seconds}
    for key, value in {**own, **outcome.summary, **own}.items():
        flat = (
            {f"{key}/{name}": part for name, part in value.items()}
            if isinstance(value, dict)
            else {key: value}
        )
        record |= {name: part for name, part in flat.items() if name not in outcome.job.settings}
    return {**record, "folder": str(outcome.job.folder)}


def _markdown(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    body = [[f"**{cell.text}**" if cell.best else cell.text for cell in row] for row in rows]
    return line(header) + line(["---"] * len(header)) + "".join(map(line, body))


def print_table(console: Console, folder: Path, outcomes: Sequence[Outcome]) -> None:
    """The sweep on the terminal: the table, what is the same in all jobs, and where everything lies."""
    console.print(_rich(*rows_of(outcomes)))
    if seeds := over_seeds(outcomes):
        console.print(_rich(*seeds, title=f"over {SEED}: mean ± standard deviation"))
    for outcome in outcomes:
        if outcome.status == "failed":
            where = path_text(outcome.job.folder / "console.log")
            console.print(
                Text(f"job {outcome.job.number} failed: {outcome.error}\n  {where}"), soft_wrap=True
            )
    wandb = folder / "wandb"
    if any(wandb.glob("offline-run-*")):
        console.print(Text(f"wandb  wandb sync {path_text(wandb)}/offline-run-*"), soft_wrap=True)
    console.print(Text(f"sweep  {path_text(folder)}/summary.md"), soft_wrap=True)


def _rich(header: Sequence[str], rows: Sequence[Sequence[Cell]], title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell.text, style="bold" if cell.best else "") for cell in row))
    return table
