"""The command line of `python -m tpresearch.compare`: words that name runs, and options."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tpresearch.launch.options import read_options

USAGE = """\
python -m tpresearch.compare RUN_OR_SWEEP_OR_GLOB... [out=FOLDER] [baseline=RUN] [overlay=anyway] [seeds=apart]

  prints a table of these runs and writes compare.html, compare.md and compare/*.png; needs no network
  out        folder to write to; by default the sweep's own if one sweep is given, else outputs/compare/<date>/<time>
  baseline   the run that losses are compared with: its label in the table, its plan or its folder; by default the one with
             parallel=none among those of the same seed, learning rate and data
  overlay    anyway: even if corpus, tokenizer, row length, global batch, loss or seed differ
  seeds      where runs differ in train.seed alone, those of one experiment are one curve, with its standard deviation;
             apart: each run by itself (with overlay=anyway, since seeds differ); mean: even where no experiment is repeated
"""


class Overlay(StrEnum):
    refuse = "refuse"
    anyway = "anyway"


class Seeds(StrEnum):
    auto = "auto"
    apart = "apart"
    mean = "mean"


@dataclass
class Options:
    out: str | None = None
    baseline: str | None = None
    overlay: Overlay = Overlay.refuse
    seeds: Seeds = Seeds.auto


def parse(words: Sequence[str]) -> tuple[list[str], Options]:
    """The words that name runs, and the options.

    Raises:
        ConfigError: for an unknown option, or a value it does not take.
    """
    options = [word for word in words if _is_option(word)]
    return [word for word in words if word not in options], read_options(Options, options)


def _is_option(word: str) -> bool:
    """Whether it is `key=value` and not a path, which may hold `=` too, as the folders of some sweepers do."""
    key, equals, _ = word.partition("=")
    if not equals or key in {field.name for field in dataclasses.fields(Options)}:
        return bool(equals)
    return key.isidentifier() and not Path(word).exists() and not glob.has_magic(word)
