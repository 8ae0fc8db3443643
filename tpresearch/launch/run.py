"""What main is told about this run, besides its config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tpresearch.config.world import World


@dataclass(frozen=True)
class Run:
    folder: Path
    """The run folder, absolute, the same on every rank, and there already."""
    world: World
    overrides: list[str]
    """What was typed, without Hydra's own settings: `["parallel=tp", "train.steps=10"]`."""
    choices: dict[str, str]
    """The option chosen in each config group: `{"model": "llama2_tiny", "parallel": "tp", ...}`."""
