"""What `python -m tpresearch.compare` can be told besides the runs."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tpresearch.launch.options import read_options


class Overlay(StrEnum):
    refuse = "refuse"
    anyway = "anyway"


class Seeds(StrEnum):
    apart = "apart"
    mean = "mean"


@dataclass
class Options:
    out: str | None = None
    """Folder for compare.html, compare.md and compare/*.png; null for the sweep's own, else a dated one."""
    baseline: str | None = None
    """The run that differences are taken from: its name in the table, its plan or its folder; null for parallel=none."""
    overlay: Overlay = Overlay.refuse
    """anyway: draw runs over each other that differ in corpus, tokenizer, row length, global batch, loss or seed."""
    seeds: Seeds = Seeds.apart
    """mean: draw runs that differ in train.seed alone as one, their mean with its standard deviation."""


USAGE = """\
python -m tpresearch.compare RUN_OR_SWEEP_OR_GLOB... [out=FOLDER] [baseline=RUN] [overlay=anyway] [seeds=mean]

  prints the table of these runs, and writes compare.html, compare.md and compare/*.png; no network
  out        folder for them; the sweep's own where one sweep is given, else outputs/compare/<date>/<time>
  baseline   the run that differences of loss are taken from: its name in the table, its plan or its folder
  overlay    anyway: though corpus, tokenizer, row length, global batch, loss or seed differ
  seeds      mean: one curve for runs that differ in train.seed alone, with its standard deviation
"""


def parse(words: Sequence[str]) -> tuple[list[str], Options]:
    """The words that name runs, and the options.

    Raises:
        ConfigError: for an option that is none, or a value it does not take.
    """
    typed = [word for word in words if _is_option(word)]
    return [word for word in words if word not in typed], read_options(Options, typed)


def _is_option(word: str) -> bool:
    """A path may hold `=` too, as the folders of some sweepers do."""
    key, equals, _ = word.partition("=")
    if key in {field.name for field in dataclasses.fields(Options)}:
        return bool(equals)
    return bool(equals) and key.isidentifier() and not Path(word).exists() and not glob.has_magic(word)
