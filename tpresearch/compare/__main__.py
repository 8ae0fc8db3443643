"""`python -m tpresearch.compare RUN_OR_SWEEP_OR_GLOB...`: runs beside each other, with no network."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from rich.console import Console

from tpresearch.compare.groups import baseline_of, one_by_one, over_seeds
from tpresearch.compare.labels import labels, telling
from tpresearch.compare.options import USAGE, Seeds, parse
from tpresearch.compare.overlay import check
from tpresearch.compare.runs import LEGAL, find
from tpresearch.config.errors import ConfigError
from tpresearch.launch.command import WrongCommand, python_command
from tpresearch.launch.options import command
from tpresearch.launch.run_dir import dated_folder
from tpresearch.track.shown import path_text

DRAWS_WITH = ("altair", "vl_convert", "jinja2")
WIDTH = 200
"""Of the tables where there is no terminal to ask."""


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        sys.exit(0 if arguments else 2)
    words, options = parse(arguments)
    if not words:
        raise WrongCommand("runs", "", "none is named", LEGAL, python_command(["outputs/train", *arguments]))
    _refuse_without_plots()
    found = find(words)
    runs, left_out = found.runs, found.left_out
    if options.seeds is Seeds.mean:
        runs = [run for run in found.runs if run.completed]
        left_out += [
            f"{path_text(run.folder)}: it is {run.summary['status']}, and no mean is taken over it"
            for run in found.runs
            if not run.completed
        ]
    names = labels(runs, telling(runs))
    warnings = check(runs, names, options)
    groups = over_seeds(runs) if options.seeds is Seeds.mean else one_by_one(runs, names)
    baseline = baseline_of(groups, options.baseline)

    from tpresearch.compare.report import (
        Report,
    )  # late: what it draws with may not be installed, and takes a second

    report = Report(runs, names, groups, baseline, warnings, left_out)
    out = Path(options.out or found.sweep or dated_folder("compare")).expanduser()
    try:
        report.write(out, arguments)
    except OSError as error:
        raise ConfigError(
            "out",
            out,
            f"cannot be written: {error.strerror}",
            "a folder that this user can write, with room on its disk",
            fix={"out": dated_folder("compare")},
        ) from None
    report.print(Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH), out)


def _refuse_without_plots() -> None:
    missing = [name for name in DRAWS_WITH if importlib.util.find_spec(name) is None]
    if missing:
        raise WrongCommand(
            "plots",
            " ".join(missing),
            "not installed",
            "the extra `plots`",
            "pip install 'tpresearch[plots]'",
        )


if __name__ == "__main__":
    command(main)
