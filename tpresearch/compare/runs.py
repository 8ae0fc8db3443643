"""Find and read runs: from their folders, from sweeps, and from globs of either."""

from __future__ import annotations

import difflib
import glob
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from reprlib import repr as short
from typing import Any

import pandas as pd

from tpresearch.config.comparable import comparable_config, with_defaults
from tpresearch.config.errors import ConfigError, one_line
from tpresearch.launch.claim import EARLIER_SUFFIX
from tpresearch.launch.command import WrongCommand, python_command
from tpresearch.track.names import SUMMARY_PARTS, Row, step_of
from tpresearch.track.record import read_metrics, read_record, without_nonfinite
from tpresearch.track.table import with_comparable_memory
from tpresearch.track.text import UNDEFINED, loss_text, path_text, setting_text

MARKERS = ("config.yaml", "summary.json", "metrics.jsonl", "console.log")
"""A folder with any of these is a run's; a sweep's job that failed early has only the last."""
SUMMARY_TYPES = {"status": str, "world_size": int, "mesh": dict, "model": str, "parallel": str}
CONFIG_TYPES = dict.fromkeys(("model", "data", "tokenizer", "optimizer", "schedule", "train"), dict)
"""What summary.json and config.yaml must have for a comparison."""
OPTIONAL_TYPES = {
    "error": str,
    "run_name": str,
    "device": str,
    "corpus_hash": str,
    "initial_weights": str,
    "unigram_entropy": float,
    "logger": dict,
    "cluster": dict,
    "resumed": list,
    "measured": list,
    "expected": list,
    **dict.fromkeys(SUMMARY_PARTS, dict),
}
LEDGER_ENTRY_TYPES = {"axis": str, "collective": str, "sent_bytes": int}
"""What entries of ledger.json must have."""
MAX_FIGURE = 1e300
"""Larger than any figure; comparison with it also excludes NaN."""
LEGAL = "folders of runs or sweeps, or globs of them"


class UnreadableRun(Exception):
    """A run whose record is missing or damaged; the message names the file and the reason."""


@dataclass(frozen=True)
class Run:
    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    rows: list[Row] = field(repr=False)
    """Its metrics by step."""
    ledger: dict[str, Any]
    """Communication and memory of one step; empty where the run ended before it was counted."""

    @property
    def completed(self) -> bool:
        return self.summary["status"] == "completed"

    @property
    def is_predicted(self) -> bool:
        """Whether it is a simulated step: speed, memory and communication without losses."""
        return bool(self.summary.get("predicted"))

    @cached_property
    def settings(self) -> dict[str, str]:
        """The comparable config by dotted key, as text; ranks, mesh, device, corpus and initial weights are those of the run, and the
        entropy of its tokens, which tells other held-out rows and a changed tokenizer."""
        facts = "mesh", "device", "corpus_hash", "initial_weights"
        ran_on = {key: self.summary.get(key) for key in facts}
        ran_on["unigram_entropy"] = loss_text(self.summary.get("unigram_entropy"))
        nested = {"ranks": self.summary["world_size"], **comparable_config(self.config), **ran_on}
        (flat,) = pd.json_normalize(nested).to_dict("records")
        texts = {str(key): setting_text(value) for key, value in flat.items()}
        if self.earlier_budgets:
            texts["train.steps"] = ", then ".join([*self.earlier_budgets, str(budget_of(self.config))])
        return texts

    @cached_property
    def earlier_budgets(self) -> list[str]:
        """Of a run that was resumed with more steps: `6 up to step 4`, for each earlier number of them by which the learning rate had
        begun to fall, so that it is another training than one of as many steps from the start."""
        found = []
        for path in sorted(self.folder.glob("config.step-*.yaml")):
            until = int(path.stem.rpartition("-")[2])
            try:
                config = with_defaults(read_record(path))
                budget, warmup = budget_of(config), config["schedule"]["warmup_steps"]
                rates = [row.get("train/lr") for row in self.rows if warmup < step_of(row) <= until]
                fell = any(rate is not None and rate < config["optimizer"]["lr"] for rate in rates)
            except (OSError, ValueError, LookupError, TypeError):  # damaged
                continue
            if fell and budget != budget_of(self.config):
                found.append(f"{budget} up to step {until}")
        return found

    def setting(self, key: str) -> str:
        """A dash where the run has no such setting."""
        return self.settings.get(key, UNDEFINED)


def budget_of(config: Mapping[str, Any]) -> object:
    """The run's steps, also where the config gives its tokens instead."""
    train = config["train"]
    sizes = tokens, rows, length = train["tokens"], train["global_batch_size"], config["data"]["seq_len"]
    if train["steps"] is None and all(isinstance(size, int) and size > 0 for size in sizes):
        return -(-tokens // (rows * length))
    return train["steps"]


@dataclass(frozen=True)
class FoundRuns:
    runs: list[Run]
    left_out: list[str]
    """One sentence per run that could not be read."""
    sweep: Path | None
    """The sweep's folder, where a single sweep was named."""


def find_runs(words: Sequence[str]) -> FoundRuns:
    """The runs that these words name, in order, each once; in natural order if the words are in alphabetical order, as those of
    a glob that the shell expanded.

    A run that is named directly must be readable; one found in a sweep or by a glob is left out if it is not. Refuses an argument
    that names no run, and the lack of any that can be read.
    """
    runs: dict[Path, Run] = {}
    left_out: dict[Path, str] = {}
    for word in sorted(words, key=_natural_order) if list(words) == sorted(words) else words:
        folders = _folders(word)
        for folder in folders:
            where = folder.resolve()
            try:
                runs[where] = runs.get(where) or read_run(folder)
            except UnreadableRun as problem:
                if folders == [Path(os.path.expanduser(word))]:
                    raise _argument_error(word, str(problem), "runs that have ended") from None
                left_out[where] = f"{path_text(folder)}: {problem}"
    if not runs:
        why = f"no readable run: {next(iter(left_out.values()))}"
        raise _argument_error(" ".join(words), why, "runs that have ended")
    path = Path(os.path.expanduser(words[0]))
    is_sweep = len(words) == 1 and path.is_dir() and path.resolve() not in runs
    return FoundRuns(list(runs.values()), list(left_out.values()), path if is_sweep else None)


def _folders(word: str) -> list[Path]:
    """The run folders that an argument names; it is a glob only if no file has exactly that name."""
    path = Path(os.path.expanduser(word))
    paths = [path]
    if not path.exists():
        if not glob.has_magic(word):
            raise _argument_error(word, "no such folder", instead=_closest_sibling(path))
        if not (matching := glob.glob(str(path), recursive=True)):
            raise _argument_error(word, "this glob matches nothing")
        kept = (each for each in matching if EARLIER_SUFFIX in word or EARLIER_SUFFIX not in each)
        paths = sorted(map(Path, kept), key=_natural_order)
    if not (folders := [folder for each in paths for folder in run_folders(each)]):
        raise _argument_error(word, "no run in it")
    return folders


def _closest_sibling(path: Path) -> list[str]:
    beside = [each.name for each in path.parent.glob("*/")]
    return [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, beside, 1)]


def _argument_error(word: str, why: str, legal: str = LEGAL, instead: Sequence[str] = ()) -> ConfigError:
    """The refusal of an argument, with the same command to try without it or with `instead` in its place."""
    typed = [new for old in sys.argv[1:] for new in (instead if old == word else [old])]
    named = [word for word in typed if "=" not in word]
    return WrongCommand("run", word, why, legal, python_command(typed if named else ["outputs", *typed]))


def run_folders(path: Path) -> list[Path]:
    """The folder itself if it is a run's, else the runs below it, and behind links, in natural order: job 2 before job 10.

    Skipped below it: what Hydra and W&B keep under the same file names, and a sweep's earlier attempts at a job.
    """
    if any((path / name).is_file() for name in MARKERS):
        return [path]
    found, seen = [], set()
    for where, folders, files in os.walk(path, followlinks=True):
        if (real := os.path.realpath(where)) in seen:  # a link back to a folder above, say
            folders.clear()
            continue
        seen.add(real)
        kept = (name for name in folders if name != "wandb" and not name.startswith("."))
        folders[:] = sorted(name for name in kept if EARLIER_SUFFIX not in name)
        if not set(MARKERS).isdisjoint(files):
            found.append(Path(where))
    return sorted(found, key=_natural_order)


def _natural_order(path: str | Path) -> list[list[str | int]]:
    """A sort key by which n2 comes before n10: in each part of the path, text and numbers in turn."""
    parts = (re.split(r"(\d+)", part) for part in Path(path).parts)
    return [[int(piece) if at % 2 else piece for at, piece in enumerate(pieces)] for pieces in parts]


def read_run(folder: Path) -> Run:
    """A run from its record: an UnreadableRun for one that has not ended, and for a file that no run writes."""
    summary = _load(folder / "summary.json", SUMMARY_TYPES)
    config = with_defaults(_load(folder / "config.yaml", CONFIG_TYPES))
    ledger = _load(folder / "ledger.json", {}) if (folder / "ledger.json").exists() else {}
    for key, value in summary.items():
        if key in SUMMARY_PARTS:
            is_valid = all(part is not None and _is_figure(part) for part in (value or {}).values())
        else:
            is_valid = _is_figure(value) or not ("/" in key or key == "wall_time_s")
        if not is_valid:
            raise UnreadableRun(f"summary.json is not a valid run summary: {key} is {short(value)}")
    for entry in chain.from_iterable(ledger.get(side) or () for side in ("measured", "expected")):
        found = entry if isinstance(entry, dict) else {}
        if not all(isinstance(found.get(key), kind) for key, kind in LEDGER_ENTRY_TYPES.items()):
            raise UnreadableRun(f"ledger.json is not a valid run ledger: it has the entry {short(entry)}")
    try:
        rows = [without_nonfinite(row) for row in read_metrics(folder)]
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableRun(f"metrics.jsonl cannot be read: {one_line(error)}") from None
    for row in rows:
        if not all(map(_is_figure, row.values())):
            raise UnreadableRun(f"metrics.jsonl cannot be read: it has the row {short(row)}")
    if not rows and summary["status"] == "completed":
        raise UnreadableRun("metrics.jsonl has no rows, though the run completed")
    return Run(folder, config, with_comparable_memory(summary), rows, ledger)


def _load(path: Path, needed: Mapping[str, type]) -> dict[str, Any]:
    try:
        content = read_record(path)
    except FileNotFoundError:
        why = " (still running, refused, or killed)" if path.name == "summary.json" else ""
        raise UnreadableRun(f"{path.name} is missing{why}") from None
    except (OSError, ValueError) as error:
        raise UnreadableRun(f"{path.name} cannot be read: {error}") from None
    wrong = f"{path.name} is not a valid run {path.stem}"
    if not isinstance(content, dict):
        raise UnreadableRun(f"{wrong}: it is a {type(content).__name__}")
    optional = {key: kind for key, kind in OPTIONAL_TYPES.items() if content.get(key) is not None}
    for key, kind in {**needed, **optional}.items():
        if not isinstance(content.get(key), kind):
            raise UnreadableRun(f"{wrong}: {key} is {short(content[key]) if key in content else 'missing'}")
    return content


def _is_figure(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and abs(value) < MAX_FIGURE)
