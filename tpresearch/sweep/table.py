"""Results of a sweep: summary.csv, summary.md, and a table on the terminal, one row per job."""

from __future__ import annotations

import csv
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.text import Text

from tpresearch.config.schema import LoggerConfig
from tpresearch.launch.command import override_key, python_command
from tpresearch.sweep.job import CONSOLE_LOG, wandb_group
from tpresearch.sweep.outcome import Outcome
from tpresearch.track.table import (
    SEED,
    Column,
    Summary,
    Table,
    figure_columns,
    mean_columns,
    with_comparable_memory,
)
from tpresearch.track.text import UNDEFINED, path_text


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """One row per job: what was swept, its figures with the best of each marked, and how it ended."""
    columns: dict[str, Column] = {"job": [str(outcome.job.number) for outcome in outcomes]}
    columns |= _swept(outcomes, differing(outcomes))
    columns |= figure_columns([_summary(outcome) for outcome in outcomes])
    columns["status"] = [_status(outcome) for outcome in outcomes]
    if any(outcome.error for outcome in outcomes):
        columns["error"] = [outcome.error or "" for outcome in outcomes]
    return Table.of_columns(columns)


def _status(outcome: Outcome) -> str:
    is_predicted = outcome.status == "completed" and outcome.summary.get("predicted")
    status = "predicted" if is_predicted else outcome.status
    return f"{status} earlier" if outcome.job.completed else status


def _swept(outcomes: Sequence[Outcome], keys: Sequence[str]) -> dict[str, Column]:
    """Columns of what was swept, and of the ranks, predicted ones included."""
    settings = [outcome.job.settings for outcome in outcomes]
    swept = {key: [each.get(key, UNDEFINED) for each in settings] for key in keys}
    return {**swept, "ranks": [str(_ranks(each)) for each in outcomes]}


def _ranks(outcome: Outcome) -> int:
    """Those of the job, or those that its one process simulates, also where it failed."""
    composed = outcome.job.composed
    simulated: int | None = OmegaConf.select(composed, "cluster") and OmegaConf.select(composed, "world_size")
    return outcome.summary.get("world_size") or simulated or outcome.job.ranks


def _summary(outcome: Outcome) -> Summary:
    """The job's summary, and for one that left none at least how long it took. How long predicting took is no figure of the step."""
    figures = with_comparable_memory(outcome.summary)
    took = {} if figures.get("predicted") else {"wall_time_s": outcome.seconds}
    return {**took, **figures, "status": outcome.status}


def differing(outcomes: Sequence[Outcome]) -> list[str]:
    """The keys of overrides in which jobs differ; all of them where there is one job."""
    settings = [outcome.job.settings for outcome in outcomes]
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if len(outcomes) == 1 or len({each.get(key) for each in settings}) > 1]


def seed_table(outcomes: Sequence[Outcome]) -> Table | None:
    """Mean and standard deviation over the completed jobs that differ in train.seed alone, if there are any; of jobs of one seed that
    are the same, over the last."""
    groups: dict[str, dict[str, Outcome]] = {}
    for outcome in outcomes:
        if outcome.status == "completed" and outcome.summary:
            groups.setdefault(outcome.job.group, {})[outcome.job.signature] = outcome
    repeated = [[*each.values()] for each in groups.values() if len(each) > 1]
    if not repeated:
        return None
    keys = [key for key in differing(outcomes) if key != SEED]
    columns = _swept([each[0] for each in repeated], keys)
    columns["seeds"] = [str(len(each)) for each in repeated]
    columns |= mean_columns([[_summary(outcome) for outcome in each] for each in repeated])
    return Table.of_columns(columns)


def write_files(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """summary.csv: overrides, then all that the summaries hold, then the folder. summary.md: the table."""
    records = [_csv_row(outcome) for outcome in outcomes]
    last = ("error", "folder")
    columns = list(dict.fromkeys(key for record in records for key in record if key not in last))
    with (folder / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *last])
        writer.writeheader()
        writer.writerows(records)
    text = table_of(outcomes).markdown()
    if seeds := seed_table(outcomes):
        text += f"\nOver `{SEED}`, mean ± standard deviation:\n\n{seeds.markdown()}"
    (folder / "summary.md").write_text(text, encoding="utf-8")


def _csv_row(outcome: Outcome) -> dict[str, Any]:
    """A row of summary.csv; overrides come first, and what is nested is flat: `mesh/tp`."""
    record: dict[str, Any] = dict(outcome.job.settings)
    own = {"status": outcome.status, "error": outcome.error or "", "seconds": outcome.seconds}
    for key, value in {**own, **outcome.summary, **own}.items():
        nested = isinstance(value, dict)
        flat = {f"{key}/{name}": part for name, part in value.items()} if nested else {key: value}
        record |= {name: part for name, part in flat.items() if name not in outcome.job.settings}
    return {**record, "folder": str(outcome.job.folder)}


def print_table(console: Console, folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Print the sweep on the terminal: the tables, the failures, and commands to continue with."""
    console.print(table_of(outcomes).rich())
    if seeds := seed_table(outcomes):
        console.print(seeds.rich(title=f"over {SEED}: mean ± standard deviation"))
    for outcome in outcomes:
        if outcome.status == "failed":
            where = path_text(outcome.log or outcome.job.folder / CONSOLE_LOG)
            said = f"job {outcome.job.number} failed: {outcome.error}\n  {where}"
            console.print(Text(said), soft_wrap=True)
    for what, command in _next_commands(folder, outcomes).items():
        console.print(Text(f"{what:<10} {command}"), soft_wrap=True)


def _next_commands(folder: Path, outcomes: Sequence[Outcome]) -> dict[str, str]:
    """The sweep's folder, and commands to continue with it."""
    shown, wandb = path_text(folder), folder / "wandb"
    lines = {"sweep": f"{shown}/summary.md"}
    if any(outcome.status != "completed" for outcome in outcomes):
        typed = [word for word in sys.argv[1:] if override_key(word) != "hydra.sweep.dir"]
        lines["again"] = python_command([*typed, f"hydra.sweep.dir={shown}"]) + "  # what is not completed"
    if sum(bool(outcome.summary) for outcome in outcomes) > 1:
        lines["compare"] = f"python -m tpresearch.compare {shlex.quote(shown)}"
    if any(wandb.glob("offline-run-*")):
        lines["upload"] = f"wandb sync {shlex.quote(path_text(wandb))}/offline-run-*"
    if wandb.exists():
        logger = OmegaConf.select(outcomes[0].job.composed, "logger") or {}
        words = [f"group={logger.get('group') or wandb_group(folder)}"]
        if (project := logger.get("project")) not in (None, LoggerConfig().project):
            words.append(f"project={project}")
        if entity := logger.get("entity"):
            words.append(f"entity={entity}")
        lines["dashboard"] = shlex.join(["python", "-m", "tpresearch.dashboard", *words])
    return lines
