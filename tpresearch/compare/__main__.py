"""`python -m tpresearch.compare RUN_OR_SWEEP_OR_GLOB... [KEY=VALUE ...]`: compare runs from their records, without a network.

Prints a table of these runs and writes compare.html, compare.md and compare/*.png.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rich.console import Console

from tpresearch.compare.groups import (
    check_comparable,
    comparisons_of,
    group_each_run,
    group_over_seeds,
    has_repeats,
    last_of_each_seed,
)
from tpresearch.compare.runs import LEGAL, find_runs
from tpresearch.config.errors import ConfigError, refuse_unwritable
from tpresearch.launch.command import WrongCommand, python_command
from tpresearch.launch.options import command, words_and_options
from tpresearch.launch.run_dir import dated_folder, writable_folder
from tpresearch.track.text import path_text

PLOT_PACKAGES = ("altair", "jinja2", "vl_convert")
WIDTH = 200
"""Of the tables if the output is not a terminal."""


Overlay = StrEnum("Overlay", "refuse anyway")
Seeds = StrEnum("Seeds", "auto apart mean")


@dataclass
class Options:
    out: str | None = None
    """Folder to write to; by default the sweep's own if one sweep is given, else outputs/compare/<date>/<time>."""
    baseline: str | None = None
    """The run that losses are compared with: its label in the table, its plan or its folder; by default the one with
    parallel=none among those of the same seed, learning rate and data."""
    overlay: Overlay = Overlay.refuse
    """anyway: overlay runs even if corpus, tokenizer, row length, global batch, loss or seed differ."""
    seeds: Seeds = Seeds.auto
    """auto: runs that differ only in train.seed are one curve, with its standard deviation;
    apart: each run by itself (with overlay=anyway, since seeds differ); mean: even where no experiment is repeated."""


def main() -> None:
    arguments = sys.argv[1:]
    words, options = words_and_options(Options, arguments)
    missing = [name for name in PLOT_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        install = "pip install 'tpresearch[plots]'"
        raise WrongCommand("plots", " ".join(missing), "not installed", "the extra `plots`", install)

    from tpresearch.compare.report import Report  # only now, since what it draws with may be missing

    if not words:
        raise WrongCommand("runs", "", "none given", LEGAL, python_command(["outputs/train", *arguments]))
    found = find_runs(words)
    runs, left_out = found.runs, found.left_out
    asks = options.seeds is Seeds.auto and options.overlay is Overlay.refuse
    if mean := options.seeds is Seeds.mean or (asks and has_repeats(runs)):
        runs = [run for run in found.runs if run.completed]
        left_out += [
            f"{path_text(run.folder)}: {run.summary['status']}, and a mean over seeds takes completed runs only"
            for run in found.runs
            if not run.completed
        ]
        if not runs:
            legal = "apart, or runs that completed"
            raise ConfigError("seeds", "mean", "no run completed", legal, fix={"seeds": None})
        runs, repeated = last_of_each_seed(runs)
        left_out += repeated
    warnings = check_comparable(runs, anyway=options.overlay is Overlay.anyway, any_seed=mean)
    groups = group_over_seeds(runs) if mean else group_each_run(runs)
    report = Report(runs, groups, comparisons_of(groups, options.baseline), warnings, left_out)
    out = Path(os.path.expanduser(options.out or found.sweep or dated_folder("compare")))
    with refuse_unwritable("out", out, {"out": writable_folder(dated_folder("compare"))}):
        report.write(out, arguments)
    report.print(Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH), out)


if __name__ == "__main__":
    command(main, Options)
