"""Results as JSON lines, written immediately, so that an interrupted run keeps what it had."""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Stage:
    """One stage's share of results.jsonl."""

    name: str
    out: Path
    device: torch.device
    tiny: bool
    until: float
    """Seconds of time.monotonic() after which it should begin nothing more."""
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def from_arguments(cls, name: str) -> tuple[Stage, list[str]]:
        """The stage that measure.py has started, and further words of its command."""
        parser = argparse.ArgumentParser()
        parser.add_argument("--out", type=Path, required=True)
        parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
        parser.add_argument("--tiny", action="store_true")
        parser.add_argument("--limit", type=float, required=True)
        given, words = parser.parse_known_args()
        stage = cls(name, given.out, torch.device(given.device), given.tiny, time.monotonic() + given.limit)
        return stage, words

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        return self.until - time.monotonic()

    def add(self, **row: Any) -> None:
        append(self.out, stage=self.name, at_s=round(time.monotonic() - self.began, 2), **row)

    def wait(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()


def card_now() -> str:
    """SM clock in MHz, power in W, temperature in degrees: as nvidia-smi has them; empty where there is none."""
    query = [
        "nvidia-smi",
        "--query-gpu=clocks.sm,power.draw,temperature.gpu",
        "--format=csv,noheader,nounits",
    ]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def append(out: Path, **row: Any) -> None:
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
