"""A published measurement: a line of a CSV in the columns of rows.csv, with its cells as numbers."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import MAX_RANKS

NUMBER = re.compile(r"[~≈]?\s*(\d{1,3}(?:[, _]\d{3})+|\d+)((?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([A-Za-z/]*)")
"""A number, perhaps with separators of thousands and a unit behind it: 80GB, 1,914, 400 Gbps."""
UNITS = {
    "ms": 1e-3,
    "us": 1e-6,
    "min": 60,
    "k": 1024,
    "K": 1024,
    "GB/s": 8,
    "GiB/s": 8,
    "Tbps": 1000,
    "Tbit/s": 1000,
    "Tb/s": 1000,
}
"""What is not in the column's own unit: seconds, tokens, Gbit/s."""
NOT_STATED = ("na", "n/a", "nan", "none", "null", "unknown", "-", "?")
GPUS = ("A100", "A800", "H100", "H200", "H800", "B200", "GB200", "GB300", "L40S")
TRUE_VALUES = ("1", "true", "yes")
MAX_COUNTS = {"gpus": 2**17, "layers": 2**10, "dim": 2**17}
"""Beyond what anyone has published; a million ranks would take minutes and 3 GiB."""
FLOAT8 = re.compile("fp8|float8")
YEAR = re.compile(r"\b20(2\d)\b|arxiv\W*(2\d)(?:0[1-9]|1[0-2])\.\d", re.IGNORECASE)
"""Of a date, or of a paper's number."""


@dataclass(frozen=True)
class Row:
    """One published measurement."""

    values: dict[str, str]

    def __getitem__(self, name: str) -> str:
        """What a column states; empty where it states nothing or is not there."""
        value = (self.values.get(name) or "").strip()
        return "" if value.lower() in NOT_STATED and name not in ("ac", "pos") else value

    def number(self, name: str, default: float = 0) -> float:
        """Raises: ConfigError: for what is no number."""
        if not self[name]:
            return default
        found = NUMBER.fullmatch(self[name])
        value = float(re.sub("[, _]", "", found[1]) + found[2]) if found else math.inf
        if found is None or math.isinf(value):
            raise ConfigError(name, self[name], "not a number", "a number of 0 or more", {})
        return value * self._unit(name, found[3])

    @staticmethod
    def _unit(name: str, unit: str) -> float:
        return 1000 if unit.lower() == "k" and name == "tok_s_gpu" else UNITS.get(unit, 1)

    def count(self, name: str, default: int | None = None) -> int:
        """Raises: ConfigError: for what is no whole number of 1 or more; for an empty cell without a default."""
        value, largest = self.number(name, default or 0), MAX_COUNTS.get(name, MAX_RANKS)
        if not 1 <= value <= largest or value != int(value):
            why = "a row needs it" if not self[name] else "out of bounds, or no whole number"
            raise ConfigError(name, self[name] or None, why, f"a whole number from 1 to {largest:,}", {})
        return int(value)

    def is_true(self, name: str) -> bool:
        return self[name].lower() in TRUE_VALUES

    @property
    def engine(self) -> str:
        """torchtitan of torchtitan/fsdp2."""
        return self["engine"].partition("/")[0].strip().lower()

    @property
    def gpu(self) -> str:
        """A100 of `NVIDIA A100-SXM4-80GB`."""
        words = self["gpu"].upper()
        return next((name for name in GPUS if re.search(f"(?<!G){name}(?![0-9])", words)), words)

    @property
    def is_float8(self) -> bool:
        return bool(FLOAT8.search(self["compute_dtype"].lower()))

    @property
    def year(self) -> int | None:
        """The latest that its source or its notes name."""
        found = YEAR.findall(f"{self['source_file']} {self['notes']}")
        return max((2000 + int(date or paper) for date, paper in found), default=None)

    @property
    def world(self) -> int:
        return self.count("gpus")

    @property
    def tp(self) -> int:
        return self.count("tp", 1)

    @property
    def replicas(self) -> int:
        return self.count("dp_replicate", 1)

    @property
    def shards(self) -> int:
        """Ranks over which weights are sharded: those that are left, where it is not stated.

        Raises:
            ConfigError: if the row's parallel sizes do not make its world.
        """
        shards = self.count("dp_shard", max(1, self.world // (self.tp * self.replicas)))
        product = self.replicas * shards * self.tp
        if product != self.world:
            why = f"dp_replicate={self.replicas} x dp_shard={shards} x tp={self.tp} is {product}"
            raise ConfigError("gpus", self["gpus"], why, str(product), {})
        return shards

    @property
    def batch(self) -> tuple[int, int]:
        """Rows per micro-batch of a rank, and micro-batches; what is not stated follows from gbs.

        Raises:
            ConfigError: if gbs is another one than these make.
        """
        ranks = self.replicas * self.shards
        rows = self.count("gbs") if self["gbs"] else ranks * self.count("mb", 1) * self.count("ga", 1)
        micro = self.count("mb", max(1, rows // (ranks * self.count("ga", 1))))
        batches = self.count("ga", max(1, rows // (ranks * micro)))
        if rows != ranks * micro * batches:
            why = f"mb={micro} x ga={batches} x {ranks} data-parallel ranks is {ranks * micro * batches}"
            raise ConfigError("gbs", self["gbs"], why, "the rows of a step", {})
        return micro, batches

    @property
    def measured_s(self) -> float | None:
        """From the tokens per second where no step is stated."""
        step, rate = self.number("step_s"), self.number("tok_s_gpu")
        if step or not rate:
            return step or None
        return math.prod(self.batch) * self.replicas * self.shards * self.count("seq") / (rate * self.world)


def read(path: Path) -> list[Row]:
    """The rows of a CSV, by whichever of comma, semicolon and tab its first line is separated. One without an id is
    called by its number.

    Raises:
        ConfigError: for what is no CSV.
    """
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    heading = text.partition("\n")[0]
    separator = max(",;\t", key=heading.count)
    try:
        names, *lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    except (csv.Error, ValueError) as error:
        raise ConfigError(
            "ROWS.csv", path, f"not a CSV: {error}", "a line of names, then a row per line", {}
        ) from None
    names = [name.strip().lower() for name in names]
    rows = [dict(zip(names, line, strict=False)) for line in lines if any(cell.strip() for cell in line)]
    return [
        Row({**row, "id": row.get("id", "").strip() or f"row {count}"}) for count, row in enumerate(rows, 1)
    ]
