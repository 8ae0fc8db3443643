"""What of a run's config.yaml says what it computes: by this, runs are told apart, repeated and compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOT_COMPARED = ("name", "logger", "world_size", "verify", "checkpoint", "resume")
"""Keys of a config that say where a run is kept, who hears of it or what another command does, not what it computes."""


def compared(config: Mapping[str, Any], without_seed: bool = False) -> dict[str, Any]:
    """The resolved config without names, paths and loggers."""
    kept = {key: value for key, value in config.items() if key not in NOT_COMPARED}
    kept["data"] = {key: value for key, value in kept.get("data", {}).items() if key != "cache_dir"}
    if without_seed:
        kept["train"] = {key: value for key, value in kept["train"].items() if key != "seed"}
    return kept
