"""Output of a comparison: on the terminal, as Markdown, as an HTML page, and as PNGs."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.text import Text

from tpresearch.compare.charts import Spec, chart_spec, javascript, png
from tpresearch.compare.differences import max_differences, pooled_differences, unpaired
from tpresearch.compare.groups import Comparison, Group, differing, labels, settings_frame
from tpresearch.compare.panel_data import panel_data, unlike_rows
from tpresearch.compare.runs import Run
from tpresearch.compare.style import ChartStyle
from tpresearch.track.panels import SECTIONS, Panel
from tpresearch.track.record import write_atomically
from tpresearch.track.table import Column, Table, figure_columns, markdown, mean_columns
from tpresearch.track.text import UNDEFINED, path_text, printable

COMMON_SETTINGS = (
    *("model.name", "corpus_hash", "tokenizer.vocab_size", "data.seq_len", "train.global_batch_size"),
    *("train.seed", "train.dtype", "train.weights", "optimizer.moment_dtype", "train.float8", "device"),
)
RUNS, SEEDS, DIFFERENCES, FOLDERS = "Runs", "Mean ± std over train.seed", "Config differences", "Run folders"
ROUNDING = "Loss differences of each plan, over all experiments"
POOLED = {"most": "max |loss difference|", "rms": "rms |loss difference|"}
Sections = dict[str, list[tuple[Panel, list[str], Spec]]]
"""By title: panels, notes and charts."""
MAX_DIFFERENCES, RUN_WIDTH = 14, 12
"""Rows of config differences that are printed on a terminal, if it has at least so many columns for each run."""


@dataclass
class Report:
    """Runs compared: their tables and charts, and the sentences about what is left out or should not differ."""

    runs: Sequence[Run]
    groups: Sequence[Group]
    """What is drawn as one curve: single runs, or the repetitions of each over seeds."""
    comparisons: Sequence[Comparison]
    warnings: Sequence[str]
    """Settings in which the runs differ but should not."""
    left_out: Sequence[str]
    """One sentence per run that could not be read."""

    def __post_init__(self) -> None:
        self.warnings = [f"Overlaid although {warning}" for warning in self.warnings]
        self.notes = [*unlike_rows(self.groups), *unpaired(self.comparisons)]
        self.tables = tables(self.runs, self.groups, self.comparisons)

    def write(self, out: Path, arguments: Sequence[str]) -> None:
        """Write compare/*.png, compare.md and last compare.html, each whole or not at all; an OSError if the folder cannot be written."""
        pngs = out / "compare"
        pngs.mkdir(parents=True, exist_ok=True)
        baselines = [each.baseline.label for each in self.comparisons if each.others]
        style = ChartStyle([group.label for group in self.groups], baselines)
        sections: Sections = {}
        for title, panels in SECTIONS.items():
            sections[title] = []
            for panel in panels:
                found, path = panel_data(panel, self.groups, self.comparisons), pngs / f"{panel.name}.png"
                spec = chart_spec(panel, found.points, style) if len(found.points) else {}
                sections[title].append((panel, found.notes, spec))
                if spec:
                    write_atomically(path, png(spec, panel, found.notes))
                else:
                    path.unlink(missing_ok=True)  # of an earlier comparison
        write_atomically(out / "compare.md", self.markdown())
        command = shlex.join(["python", "-m", "tpresearch.compare", *arguments])
        write_atomically(out / "compare.html", self._page(sections, style, command))

    def _page(self, sections: Sections, style: ChartStyle, command: str) -> str:
        """compare.html: one file that needs no network. All text in it is escaped, and no script runs but its own."""
        files = FileSystemLoader(Path(__file__).parent)
        jinja = Environment(loader=files, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
        settings = settings_frame(self.runs).reindex(columns=COMMON_SETTINGS, fill_value=UNDEFINED)
        names = dict(zip([run.folder for run in self.runs], labels(self.runs), strict=True))
        colours = {names[run.folder]: style.colours[each.label] for each in self.groups for run in each.runs}
        return jinja.get_template("page.html").render(
            report=self,
            models=", ".join(dict.fromkeys(run.summary["model"] for run in self.runs)),
            facts={key: settings[key][0] for key in COMMON_SETTINGS if settings[key].nunique() == 1},
            sections=sections,
            library=javascript(),
            nonce=secrets.token_urlsafe(),
            colours=style.colours | colours,
            when=f"{datetime.now():%Y-%m-%d %H:%M}",
            command=command,
        )

    def markdown(self) -> str:
        """compare.md: the tables, and the page's text besides its charts."""
        parts = [f"**{markdown(warning)}.**\n" for warning in self.warnings]
        parts += [f"{title}:\n\n{table.markdown()}" for title, table in self.tables.items() if table.rows]
        parts += [f"{markdown(line)}\n" for line in self._lines()]
        return "\n".join(parts)

    def print(self, console: Console, out: Path) -> None:
        """Print what a terminal shows, with the paths of the files at the end."""
        for warning in self.warnings:
            console.print(Text(printable(warning), style="yellow"), soft_wrap=True)
        count = len(self.tables[DIFFERENCES].rows)
        too_many = count > MAX_DIFFERENCES or RUN_WIDTH * len(self.runs) > console.width
        apart = {FOLDERS, DIFFERENCES} if too_many or not count else {FOLDERS}
        for title in [title for title in self.tables if title not in apart]:
            console.print(self.tables[title].rich(title=None if title == RUNS else title))
        in_file = [f"The configs differ in {count} setting{'s' if count > 1 else ''}: see compare.md."]
        lines = [*(in_file if too_many and count else []), *self._lines()]
        lines += [f"page: {path_text(out / 'compare.html')}", f"PNGs: {path_text(out / 'compare')}/*.png"]
        for line in lines:
            console.print(Text(printable(line)), soft_wrap=True)

    def _lines(self) -> list[str]:
        return [*self.notes, *(f"Left out: {line}" for line in self.left_out)]


def tables(
    runs: Sequence[Run], groups: Sequence[Group], comparisons: Sequence[Comparison]
) -> dict[str, Table]:
    """The runs with their figures, means over seeds if runs are drawn as one, settings that differ, and folders."""
    summaries, names = [run.summary for run in runs], labels(runs)
    columns: dict[str, Column] = {"run": names, "ranks": [run.setting("ranks") for run in runs]}
    devices = [run.setting("device") for run in runs]
    if len(set(devices)) > 1:
        columns["device"] = devices
    columns |= figure_columns(summaries)
    compared = [one for one in comparisons if one.others and not one.baseline.first.is_predicted]
    if compared:
        columns["max |loss difference|"] = _differences(runs, compared)
    if not all(run.completed for run in runs):
        columns["status"] = [run.summary["status"] for run in runs]
    shown = {RUNS: Table.of_columns(columns)}
    if len(groups) < len(runs):
        means = mean_columns([[run.summary for run in group.runs] for group in groups])
        counts = [str(len(each.runs)) for each in groups]
        shown[SEEDS] = Table.of_columns({"runs": [each.label for each in groups], "seeds": counts, **means})
    if len(compared) > 1:
        pooled = pooled_differences(compared)
        texts = {key: pooled[key].map("{:.1e}".format if key in POOLED else str) for key in map(str, pooled)}
        shown[ROUNDING] = Table.of_columns({POOLED.get(key, key): list(texts[key]) for key in texts})
    unlike = differing(runs)
    by_run = {name: [unlike[key].iloc[at] for key in unlike] for at, name in enumerate(names)}
    shown[DIFFERENCES] = Table.of_columns({"setting": list(map(str, unlike)), **by_run})
    statuses = [": ".join(filter(None, (run.summary["status"], run.summary.get("error")))) for run in runs]
    folders = [path_text(run.folder) for run in runs]
    shown[FOLDERS] = Table.of_columns({"run": names, "folder": folders, "status": statuses})
    return shown


def _differences(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> list[str]:
    most = max_differences(comparisons)
    texts = {folder: f"{value:.1e}" if value else "0" for folder, value in most.items()}
    baselines = [run for one in comparisons for run in one.baseline.runs if not run.is_predicted]
    texts |= {run.folder: "baseline" for run in baselines}
    return [texts.get(run.folder, UNDEFINED) for run in runs]
