"""The tables of a comparison: runs with their figures, repetitions together, and where configs differ."""

from __future__ import annotations

from collections.abc import Sequence

from tpresearch.compare.groups import Group
from tpresearch.compare.labels import differing, shown
from tpresearch.compare.numbers import at_most
from tpresearch.compare.runs import Run
from tpresearch.track.figures import figure_cells, figures_of, mean_cells
from tpresearch.track.shown import UNDEFINED
from tpresearch.track.table import Cell, Table


def runs_table(runs: Sequence[Run], labels: Sequence[str], baseline: Group) -> Table:
    """A row a run: its figures with the best of each marked, and how far its loss ever was from the baseline's."""
    summaries = [run.summary for run in runs]
    figures = figures_of(summaries)
    several_devices = len({run.settings["device"] for run in runs}) > 1
    header = ["run", "ranks", *(["device"] if several_devices else []), *(figure.title for figure in figures)]
    rows = []
    for run, label, cells in zip(runs, labels, figure_cells(summaries, figures), strict=True):
        row = [Cell(label), Cell(shown(run.settings["ranks"]))]
        if several_devices:
            row.append(Cell(shown(run.settings["device"])))
        row += cells
        if len(runs) > 1:
            row.append(Cell(_difference(run, baseline)))
        if not all(run.completed for run in runs):
            row.append(Cell(run.summary["status"]))
        rows.append(row)
    header += ["difference at most"] if len(runs) > 1 else []
    header += [] if all(run.completed for run in runs) else ["status"]
    return Table(header, rows)


def _difference(run: Run, baseline: Group) -> str:
    if run in baseline.runs:
        return "baseline"
    most = at_most(run, baseline)
    return UNDEFINED if most is None else f"{most:.1e}" if most else "0"


def seeds_table(groups: Sequence[Group]) -> Table:
    """Mean and standard deviation of each figure over the runs that are drawn as one."""
    figures = figures_of([run.summary for group in groups for run in group.runs])
    rows = [
        [
            Cell(group.label),
            Cell(str(len(group.runs))),
            *mean_cells([run.summary for run in group.runs], figures),
        ]
        for group in groups
    ]
    return Table(["runs", "seeds", *(figure.title for figure in figures)], rows)


def differences_table(runs: Sequence[Run], labels: Sequence[str]) -> Table:
    """A row a setting that is not the same in every run, a column a run."""
    rows = [[Cell(key), *(Cell(shown(run.settings.get(key))) for run in runs)] for key in differing(runs)]
    return Table(["setting", *labels], rows)
