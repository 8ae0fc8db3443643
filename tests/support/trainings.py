"""What a run of `train.py` leaves, read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.commands import ROOT, Done

TRAIN = ROOT / "train.py"
ROWS = ("parallel=fsdp", "train.steps=null", "train.tokens=600", "train.log_every=2", "train.eval_every=3")
"""A run of 600 tokens whose rows are not one per step."""

TINY = (
    *("model=toy_mlp", "parallel=none", "data=random_tokens", "tokenizer.vocab_size=300", "data.seq_len=16"),
    *("train.steps=2", "train.global_batch_size=4", "train.eval_rows=0", "logger=none"),
)
"""A run that reads nothing and takes no time."""


def cases(text: str, lines: int = 2) -> list[tuple[str, ...]]:
    """The cases of a table, of so many lines each; a line that begins with # is a comment."""
    kept = [line.strip() for line in text.splitlines() if line and not line.startswith("#")]
    return list(zip(*[iter(kept)] * lines, strict=True))


@dataclass(frozen=True)
class Trained:
    """A run that came to its end, and its folder."""

    done: Done
    folder: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in self.rows]


Start = Callable[..., Done]
"""Starts `train.py`, which may be refused or fail."""
Train = Callable[..., Trained]
"""Starts a run that has to complete."""
