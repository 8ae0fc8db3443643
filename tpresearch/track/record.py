"""The record of a run on disk: config.yaml, plan.txt, metrics.jsonl and summary.json, written and read back.

Every tool here works from these files, with no account and no network.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from reprlib import repr as short
from statistics import median
from typing import Any

import yaml

from tpresearch.config.errors import one_line
from tpresearch.track.names import NAMES, Row, finite_or_none, step_of
from tpresearch.track.text import bytes_text

SUMMARY_FILE, LEDGER_FILE = "summary.json", "ledger.json"
MAX_BYTES, MAX_VALUES, MAX_DEPTH = 4 << 20, 100_000, 50
"""Limits of a file of a run that is read whole: far more than any run writes."""
TOO_DEEP = f"nested more than {MAX_DEPTH} deep"
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_metrics(folder: Path) -> list[Row]:
    """The rows of a run by step, without any that was half written or is damaged.

    A row replaces all before it that are not of earlier steps: where a run resumed from a checkpoint, rows that it
    had logged after that checkpoint do not count.

    Raises:
        OSError: as opening a file does.
        ValueError: for a row without a number as its step.
    """
    path = folder / "metrics.jsonl"
    rows: list[Row] = []
    if not path.is_file():
        return rows
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        for line in iter(partial(file.readline, MAX_BYTES), ""):  # in pieces if longer than any row
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError):  # the process was killed while it wrote this one
                continue
            step = row.get("train/step") if isinstance(row, dict) else None
            if not isinstance(step, int):
                raise ValueError(f"it has the row {short(row)}, whose train/step is no number of steps")
            while rows and step_of(rows[-1]) >= step:
                rows.pop()
            rows.append(row)
    return rows


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a run: a FileNotFoundError when it has not ended, or was killed before it could write it."""
    summary: dict[str, Any] = read_record(folder / SUMMARY_FILE)
    return summary


def read_record(path: Path) -> Any:
    """The content of a run's JSON or YAML file, which may be damaged, or not a run's: an OSError as opening it raises, a ValueError for
    what cannot be read, or is larger or deeper than what any run writes.
    """
    if path.exists() and not path.is_file():
        raise ValueError("not a file")
    with path.open("rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"larger than {bytes_text(MAX_BYTES)}")
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.load(text, YAML_LOADER)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from None
    _check_size(content)
    return content


def _check_size(content: Any) -> None:
    """Count values as often as they would be printed: in YAML, ten lines of aliases make a billion of them."""
    level, left = [content], MAX_VALUES
    for _ in range(MAX_DEPTH):
        inside = (
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        )
        level = list(itertools.islice(inside, left + 1))
        if not level:
            return
        if (left := left - len(level)) < 0:
            raise ValueError(f"more than {MAX_VALUES:,} values")
    raise ValueError(TOO_DEEP)


def summary_figures(rows: Sequence[Row], warmup_steps: int, start_step: int = 0) -> Row:
    """The headline figures of a run: last losses, all skipped updates, medians of `perf/*` and `time/*`, peak memory.

    Args:
        rows: of the run, in order.
        warmup_steps: rows that cover any of the first `warmup_steps` steps are left out of the medians.
        start_step: where the last process of the run started. Only its rows count for speed and memory, since
            an earlier process may have run on another mesh.
    """
    mine = [row for row in rows if step_of(row) > start_step] or rows
    covered_from = [start_step, *map(step_of, mine)]
    warm = [row for row, since in zip(mine, covered_from, strict=False) if since >= start_step + warmup_steps]
    timed = {name: _defined(warm, name) for name in NAMES if name.startswith(("perf/", "time/"))}
    skipped = _defined(rows, "train/skipped_updates")
    loss = rows[-1]["train/loss"] if rows else None
    # Where a run ends in NaN, an earlier evaluation is not its result.
    evaluated = rows if loss is not None else rows[-1:]
    return {
        "train/loss": loss,
        "train/skipped_updates": sum(skipped) if skipped else None,
        "val/loss": next(reversed(_defined(evaluated, "val/loss")), None),
        **{name: median(values) if values else None for name, values in timed.items()},
        "memory/peak_bytes": max(_defined(mine, "memory/peak_bytes"), default=None),
        "comm/bytes_per_step": next(reversed(_defined(mine, "comm/bytes_per_step")), None),
    }


def _defined(rows: Sequence[Row], name: str) -> list[int | float]:
    return [value for row in rows if (value := row.get(name)) is not None]


def _write_keeping_earlier(step: int, path: Path, content: str) -> None:
    """When a run resumes with another `config.yaml` or `plan.txt`, keep the one up to this step: config.step-00000100.yaml. Those up to
    later steps, which are taken again, are removed.
    """
    kept = _kept_name(path, step)
    later = sorted(each for each in path.parent.glob(f"{path.stem}.step-*") if each.name > kept.name)
    until = next(iter(later), path)
    # If there is one of this step, no checkpoint followed what `path` holds.
    if step and until.exists() and not kept.exists() and until.read_bytes() != _bytes_of(content):
        until.rename(kept)
    for each in later:
        each.unlink(missing_ok=True)
    write_atomically(path, content)


def _kept_name(path: Path, step: int) -> Path:
    return path.with_name(f"{path.stem}.step-{step:08d}{path.suffix}")


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    write_json(folder / SUMMARY_FILE, summary)


def without_nonfinite(value: Any) -> Any:
    """Plain data with null for each number that is not finite."""
    if isinstance(value, Mapping):
        return {key: without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nonfinite(item) for item in value]
    return finite_or_none(value) if isinstance(value, float) else value


def write_config(folder: Path, config: Mapping[str, Any], step: int = 0) -> None:
    """config.yaml: the resolved config, as plain data, from `step` on."""
    content = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    _write_keeping_earlier(step, folder / "config.yaml", content)


def write_plan(folder: Path, plan: str, step: int) -> None:
    """plan.txt: the compiled plan as it was printed, from `step` on."""
    _write_keeping_earlier(step, folder / "plan.txt", plan.rstrip("\n") + "\n")


def record_resumption(folder: Path, entry: Mapping[str, Any]) -> None:
    """resumed.json: one entry per resumption, with the step, the ranks and the mesh."""
    write_json(folder / "resumed.json", [*read_resumptions(folder), dict(entry)])


def read_resumptions(folder: Path) -> list[dict[str, Any]]:
    """resumed.json, without what is damaged: it is a record, and no run depends on it."""
    try:
        found = read_record(folder / "resumed.json")
        return [each for each in found if isinstance(each["step"], int)]
    except (FileNotFoundError, ValueError, TypeError, LookupError):
        return []


def was_begun(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the last start in this folder had this config, whose `resume` is a checkpoint, and went on from there until something
    other than Ctrl-C ended it: a scheduler that starts it again means what it has saved since, not that checkpoint.
    """
    try:
        ended = (folder / SUMMARY_FILE).exists() and read_summary(folder)["status"]
        if ended in ("completed", "interrupted"):
            return False
        named = Path(os.path.expanduser(config["resume"])).resolve().name
        same = read_record(folder / "config.yaml") == config
        return same and named == f"step-{read_resumptions(folder)[-1]['step']:08d}"
    except (OSError, ValueError, LookupError, TypeError):  # no start has left a record
        return False


def measured_from(folder: Path, step: int, total_steps: int) -> int:
    """The step from which the steps were taken that tell a run's speed: `step`, at which this process started, or, where none was left
    for it and the plan is the same, that of the process that took the last.
    """
    if step < total_steps or _kept_name(folder / "plan.txt", step).exists():
        return step
    return max((each["step"] for each in read_resumptions(folder) if each["step"] < step), default=0)


def write_ledger(folder: Path, ledger: Mapping[str, Any]) -> None:
    """ledger.json: what one step sent and held, and what formulas expect."""
    write_json(folder / LEDGER_FILE, ledger)


def write_json(path: Path, content: object) -> None:
    """Write plain data as a JSON file, complete or absent, with null for each number that is not finite."""
    write_atomically(path, json.dumps(without_nonfinite(content), indent=2, allow_nan=False) + "\n")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically: complete or absent."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("wb") as file:
            file.write(_bytes_of(content) if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _bytes_of(text: str) -> bytes:
    """A text as it is written: a path in it need not be UTF-8, whose bytes stay what they are."""
    return text.encode(errors="surrogateescape")
