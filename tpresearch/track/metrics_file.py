"""Writing metrics.jsonl: a row is on disk as soon as it is logged; a full disk delays rows but does not end the run."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import SupportsFloat

from tpresearch.track.names import Row, complete_row
from tpresearch.track.record import read_metrics, write_atomically

log = logging.getLogger(__name__)


class MetricsFile:
    """metrics.jsonl, open for appending: one object per logged step."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"
        self._file = self._open()
        self._pending = bytearray()
        self._problem: str | None = None
        if _ends_mid_line(self._file):
            self._write("\n")

    def _open(self) -> FileIO:
        return FileIO(self._path, "a+")

    def append(self, values: Mapping[str, SupportsFloat | None]) -> Row:
        """Write one row and return it complete.

        Raises:
            KeyError: for a metric that is not declared.
            ValueError: for a row without its step.
        """
        row = complete_row(values)
        if row["train/step"] is None:
            raise ValueError("a row was logged without train/step, which identifies it; add it")
        self._write(json.dumps(row, allow_nan=False) + "\n")
        return row

    @property
    def waited(self) -> bool:
        """Whether rows have waited for room, and none does now."""
        return self._problem is not None and not self._pending

    def _write(self, line: str) -> None:
        """Write the line now, or with a later row where the disk is full."""
        self._pending += line.encode()
        try:
            while self._pending:
                del self._pending[: self._file.write(self._pending)]
        except OSError as problem:
            if self._problem is None:
                log.warning("metrics.jsonl cannot be written (%s): rows wait for room", problem.strerror)
            self._problem = problem.strerror

    def truncate_after(self, step: int) -> None:
        """Continue after this step: rows of later ones are moved to metrics.cut.jsonl, so that steps strictly increase."""
        self._file.close()
        truncate_rows(self._path.parent, step)
        self._file = self._open()

    def complete_last_row(self, values: Row) -> Row:
        """Add these metrics to the row that was logged last, of an earlier process; returns it."""
        *before, last = read_metrics(self._path.parent)
        row = last | values
        self._file.close()
        lines = [json.dumps(each, allow_nan=False) + "\n" for each in (*before, row)]
        write_atomically(self._path, "".join(lines))
        self._file = self._open()
        return row

    def close(self) -> str | None:
        """Close the file; returns why rows are missing, if any are. If it was removed during the run, they are written once more."""
        self._write("")
        try:
            if not self._path.exists():
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file.seek(0)
                self._path.write_bytes(self._file.readall())
                log.warning("%s was deleted during the run: its record is written again", self._path.parent)
            self._file.close()
        except OSError as problem:
            return problem.strerror
        return self._problem if self._pending else None


def _ends_mid_line(file: FileIO) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def truncate_rows(folder: Path, step: int) -> None:
    """Leave rows 1..step in metrics.jsonl, once each, and append what else is there to metrics.cut.jsonl."""
    path = folder / "metrics.jsonl"
    kept: list[str] = []
    cut: list[str] = []
    last = 0
    damaged = "surrogateescape"  # bytes that are no text stay what they are
    for line in path.read_text(encoding="utf-8", errors=damaged).splitlines() if path.exists() else ():
        of = _step_of(line)
        if of is not None and last < of <= step:
            kept.append(f"{line}\n")
            last = of
        else:
            cut.append(f"{line}\n")
    if cut:
        with (folder / "metrics.cut.jsonl").open("a", encoding="utf-8", errors=damaged) as file:
            file.writelines(cut)
            file.flush()
            os.fsync(file.fileno())
        write_atomically(path, "".join(kept))


def _step_of(line: str) -> int | None:
    """The step of a row; None if it was half written."""
    try:
        return int(json.loads(line)["train/step"])
    except (ValueError, TypeError, KeyError):
        return None
