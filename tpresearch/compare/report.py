"""A comparison put together: from runs to tables, page and PNGs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tpresearch.compare import tables
from tpresearch.compare.charts import png, spec_of
from tpresearch.compare.groups import Group
from tpresearch.compare.labels import shown
from tpresearch.compare.look import Look
from tpresearch.compare.numbers import numbers, unpaired
from tpresearch.compare.page import Page, Section
from tpresearch.compare.runs import Run
from tpresearch.track.panels import SECTIONS
from tpresearch.track.record import write_atomically
from tpresearch.track.shown import path_text
from tpresearch.track.table import Cell, Table

IN_COMMON = (
    *("model.name", "corpus_hash", "tokenizer.vocab_size", "data.seq_len", "train.global_batch_size"),
    *("train.seed", "train.dtype", "device"),
)
MOST_DIFFERENCES = 14
"""Rows of config differences that a terminal is given."""


class Report:
    """Runs compared: their tables, their charts, and the sentences about what is not there or should not be.

    Args:
        groups: what is drawn as one: the same runs, or those that repeat one another together.
        warnings: in what the runs should not differ and do.
        left_out: a sentence for each run that could not be read.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        labels: Sequence[str],
        groups: Sequence[Group],
        baseline: Group,
        warnings: Sequence[str],
        left_out: Sequence[str],
    ) -> None:
        self._all, self._labels, self._groups, self._baseline = runs, labels, groups, baseline
        self.warnings = [f"Overlaid although {warning}" for warning in warnings]
        self.left_out = list(left_out)
        self.runs = tables.runs_table(runs, labels, baseline)
        self.seeds = tables.seeds_table(groups) if len(groups) < len(runs) else None
        self.notes = unpaired(groups, baseline)
        self.differences = tables.differences_table(runs, labels)

    def write(self, out: Path, arguments: Sequence[str]) -> None:
        """compare/*.png, compare.md and last compare.html, each whole or not at all.

        Raises:
            OSError: when the folder cannot be written.
        """
        pngs = out / "compare"
        pngs.mkdir(parents=True, exist_ok=True)
        look = Look([group.label for group in self._groups], self._baseline.label)
        sections = []
        for title, panels in SECTIONS.items():
            section = Section(title)
            for panel in panels:
                shown_here, path = numbers(panel, self._groups, self._baseline), pngs / f"{panel.name}.png"
                if shown_here.points:
                    spec = spec_of(panel, shown_here.points, look)
                    section.draw(panel, shown_here.notes, spec)
                    write_atomically(path, png(panel, shown_here, spec))
                else:
                    section.leave_out(panel, shown_here.notes)
                    path.unlink(missing_ok=True)  # of an earlier comparison
            sections.append(section)
        write_atomically(out / "compare.md", self.markdown())
        write_atomically(out / "compare.html", self._page(sections, look, arguments).html())

    def _page(self, sections: list[Section], look: Look, arguments: Sequence[str]) -> Page:
        colours = {id(run): look.colours[group.label] for group in self._groups for run in group.runs}
        models = dict.fromkeys(run.summary["model"] for run in self._all)
        count = f"{len(self._all)} run{'s' if len(self._all) > 1 else ''}"
        return Page(
            title=f"{count} of {', '.join(models)}",
            facts=self._in_common(),
            warnings=self.warnings,
            left_out=self.left_out,
            runs=self.runs,
            seeds=self.seeds,
            sections=sections,
            differences=self.differences,
            folders=self._folders(),
            swatches={label: colours[id(run)] for label, run in zip(self._labels, self._all, strict=True)},
            group_swatches={group.label: look.colours[group.label] for group in self._groups},
            when=f"{datetime.now():%Y-%m-%d %H:%M}",
            command=shlex.join(["python", "-m", "tpresearch.compare", *arguments]),
        )

    def _in_common(self) -> list[tuple[str, str]]:
        facts = []
        for name in IN_COMMON:
            values = {shown(run.settings.get(name, run.summary.get(name))) for run in self._all}
            if len(values) == 1:
                facts.append((name, values.pop()))
        return [(name, value) for name, value in facts if value != shown(None)]

    def _folders(self) -> Table:
        rows = []
        for run, label in zip(self._all, self._labels, strict=True):
            error = run.summary.get("error")
            rows.append(
                [
                    Cell(label),
                    Cell(path_text(run.folder)),
                    Cell(run.summary["status"] + (f": {error}" if error else "")),
                ]
            )
        return Table(["run", "folder", "status"], rows)

    def markdown(self) -> str:
        """compare.md: the tables, and what the page says besides its charts."""
        parts = [*(f"**{warning}.**\n" for warning in self.warnings), self.runs.markdown()]
        if self.seeds:
            parts.append(f"Over `train.seed`, mean ± standard deviation:\n\n{self.seeds.markdown()}")
        parts += [f"{note}\n" for note in self.notes]
        if self.differences.rows:
            parts.append(f"Config differences:\n\n{self.differences.markdown()}")
        parts.append(self._folders().markdown())
        parts += [f"Left out: {line}\n" for line in self.left_out]
        return "\n".join(parts)

    def print(self, console: Console, out: Path) -> None:
        """What the terminal shows, with the paths at the end."""
        for warning in self.warnings:
            console.print(Text(warning, style="yellow"), soft_wrap=True)
        console.print(self.runs.rich())
        if self.seeds:
            console.print(self.seeds.rich(title="over train.seed: mean ± standard deviation"))
        for note in self.notes:
            console.print(Text(note), soft_wrap=True)
        count = len(self.differences.rows)
        if 0 < count <= MOST_DIFFERENCES:
            console.print(self.differences.rich(title="config differences"))
        elif count:
            console.print(f"configs differ in {count} settings: see compare.md")
        for line in self.left_out:
            console.print(Text(f"left out  {line}"), soft_wrap=True)
        console.print(Text(f"page  {path_text(out / 'compare.html')}"), soft_wrap=True)
        console.print(Text(f"pngs  {path_text(out / 'compare')}/*.png"), soft_wrap=True)
