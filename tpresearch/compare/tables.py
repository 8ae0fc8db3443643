"""The tables of a comparison, each by its title."""

from __future__ import annotations

from collections.abc import Sequence

from tpresearch.compare.groups import Group
from tpresearch.compare.labels import differing
from tpresearch.compare.numbers import max_differences
from tpresearch.compare.runs import Run
from tpresearch.track.figures import figure_cells, figures_of, mean_cells
from tpresearch.track.shown import UNDEFINED, path_text
from tpresearch.track.table import Cell, Table

RUNS, SEEDS, DIFFERENCES, FOLDERS = "Runs", "Mean ± std over train.seed", "Config differences", "Run folders"


def tables(
    runs: Sequence[Run], labels: Sequence[str], groups: Sequence[Group], baseline: Group
) -> dict[str, Table]:
    """The runs with their figures, these averaged over seeds, the settings that differ, and the runs' folders.

    Those averaged over seeds are there only where runs are drawn as one.
    """
    summaries = [run.summary for run in runs]
    figures = figures_of(summaries)
    titles = [figure.title for figure in figures]
    columns: dict[str, Sequence[str | Cell]] = {
        "run": labels,
        "ranks": [run.setting("ranks") for run in runs],
        "device": [run.setting("device") for run in runs],
        **dict(zip(titles, zip(*figure_cells(summaries, figures), strict=True), strict=True)),
        "max |loss difference|": _differences(runs, groups, baseline),
        "status": [run.summary["status"] for run in runs],
    }
    if len(set(columns["device"])) == 1:
        del columns["device"]
    if len(runs) == 1:
        del columns["max |loss difference|"]
    if all(run.completed for run in runs):
        del columns["status"]
    shown = {RUNS: Table.of_columns(columns)}
    if len(groups) < len(runs):
        rows = [
            [
                Cell(group.label),
                Cell(str(len(group.runs))),
                *mean_cells([run.summary for run in group.runs], figures),
            ]
            for group in groups
        ]
        shown[SEEDS] = Table(["runs", "seeds", *titles], rows)
    unlike = differing(runs)
    by_run = zip(labels, unlike.itertuples(index=False, name=None), strict=True)
    shown[DIFFERENCES] = Table.of_columns({"setting": list(unlike), **dict(by_run)})
    statuses = [": ".join(filter(None, (run.summary["status"], run.summary.get("error")))) for run in runs]
    folders = [path_text(run.folder) for run in runs]
    shown[FOLDERS] = Table.of_columns({"run": labels, "folder": folders, "status": statuses})
    return shown


def _differences(runs: Sequence[Run], groups: Sequence[Group], baseline: Group) -> list[str]:
    greatest = max_differences(groups, baseline)
    of_baseline = dict.fromkeys((run.folder for run in baseline.runs), "baseline")
    texts = {folder: f"{value:.1e}" if value else "0" for folder, value in greatest.items()} | of_baseline
    return [texts.get(run.folder, UNDEFINED) for run in runs]
