"""One job of a sweep: its config, number of ranks, command and folder, and whether an earlier start completed it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tpresearch.config.comparable import comparable_config, with_defaults
from tpresearch.config.schema import (
    Config,
    DataConfig,
    DataSource,
    DeviceKind,
    TokenizerConfig,
    TokenizerKind,
)
from tpresearch.data.hub import local_folder, open_hub
from tpresearch.data.sources import open_files
from tpresearch.launch.claim import EARLIER_SUFFIX
from tpresearch.launch.command import override_key, values_by_key
from tpresearch.launch.hydra_app import launch_dir
from tpresearch.track.record import read_record
from tpresearch.track.wandb_host import MAX_NAME_CHARS

CONSOLE_LOG = "console.log"
"""In a job's folder: the output of all its processes."""
STOPPED_CODE = -signal.SIGTERM
"""The exit code of a job that was ended by the sweep."""
SWEEP_SETTINGS = ("hydra.mode", "hydra.run.", "hydra.sweep.", "hydra.launcher", "hydra.sweeper")
"""Hydra's settings for the sweep itself, which its jobs must not repeat."""
NO_RECORD = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""What reading raises where a folder has no record of a run, or what is not one."""


@dataclass(frozen=True)
class Job:
    number: int
    overrides: list[str]
    """What was typed and swept, without Hydra's own settings."""
    folder: Path
    ranks: int
    slots: int
    """GPUs or CPU slots that it takes."""
    gpus: bool
    """Whether its slots are GPUs."""
    signature: str
    group: str
    """The signature without the seed: jobs that share it are repetitions of one experiment."""
    arguments: list[str]
    """The program and its overrides, as they follow `python` or torchrun."""
    composed: DictConfig
    nodes: int = 1
    """Hosts that its ranks are spread over, as many on each."""
    steps: int = 0
    """Optimizer steps that it will do."""
    notes: tuple[str, ...] = ()
    """Warnings about its config, such as unused axes."""
    completed: bool = False
    """Whether an earlier start of the sweep has completed it, in `folder`."""

    @property
    def simulates(self) -> bool:
        """Whether it predicts one step, on one core: nothing beside it changes the result. (A planner takes all cores.)"""
        cluster, gpus = (OmegaConf.select(self.composed, key) for key in ("cluster", "gpus"))
        return bool(cluster) and gpus is None

    @property
    def settings(self) -> dict[str, str]:
        return values_by_key(typed for typed in self.overrides if "=" in typed)


def slots_of(cfg: Config, wanted: int, gpu_count: int) -> tuple[int, bool]:
    """How many slots a job takes, and whether they are GPUs; its ranks will choose their device in the same way. What is predicted
    runs on no GPU."""
    if cfg.cluster:
        return wanted, False
    if cfg.device is DeviceKind.cuda:
        return min(wanted, gpu_count), True
    on_gpus = cfg.device is DeviceKind.auto and 0 < wanted <= gpu_count
    return wanted, on_gpus


def signature(config: dict[str, Any], ranks: int, without_seed: bool = False) -> str:
    """A hash of what a run computes: its resolved config and its ranks, without names, paths and loggers."""
    compared = comparable_config(with_defaults(config), without_seed)
    text = json.dumps([compared, ranks], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def recorded_signature(folder: Path, ranks: int) -> str:
    """The signature of the run in this folder, as of a job that is started here: if the folder that it was started in is gone, that
    has been moved here, with the files in it. Raises NO_RECORD.
    """
    config = read_record(folder / "config.yaml")
    with suppress(*NO_RECORD):
        there = read_record(folder / ".hydra" / "hydra.yaml")["hydra"]["runtime"]["cwd"]
        if not os.path.exists(there):
            text = json.dumps(config, ensure_ascii=False)
            config = json.loads(text.replace(f'"{there}/', f'"{launch_dir()}/'))
    return signature(config, ranks)


CONTENTS = {"corpus_hash": "text", "tokenizer_hash": "tokenizer", "initial_weights": "init_from"}
"""What summary.json tells of the files that a run has read, and the names of these."""


@dataclass(frozen=True)
class CompletedRun:
    folder: Path
    summary: dict[str, Any]

    def changed(self, now: dict[str, str]) -> list[str]:
        """Which files that it has read have other contents `now`, as far as both are known."""
        then = {key: self.summary.get(key) for key in now}
        return [CONTENTS[key] for key in now if then[key] not in (None, now[key])]


def completed_runs(sweep_dir: Path) -> dict[str, list[CompletedRun]]:
    """The completed runs below a sweep's folder, by signature."""
    found: dict[str, list[CompletedRun]] = {}
    for path in sorted(sweep_dir.rglob("summary.json")):
        try:
            summary = read_record(path)
            if summary["status"] == "completed":
                ranks = 1 if summary.get("predicted") else summary["world_size"]  # one process simulates all
                run = CompletedRun(path.parent, summary)
                found.setdefault(recorded_signature(path.parent, ranks), []).append(run)
        except NO_RECORD:
            continue
    return found


def begun_runs(sweep_dir: Path) -> dict[str, list[Path]]:
    """The folders below a sweep's in which a run has left a checkpoint, by signature; none that was set aside."""
    manifests = sweep_dir.rglob("checkpoints/step-*/checkpoint.json")
    own = (path for path in sorted(manifests) if EARLIER_SUFFIX not in str(path.relative_to(sweep_dir)))
    begun = {path.parents[2]: path for path in own}
    found: dict[str, list[Path]] = {}
    for folder, manifest in begun.items():
        with suppress(*NO_RECORD):
            ranks = read_record(manifest)["world_size"]
            found.setdefault(recorded_signature(folder, ranks), []).append(folder)
    return found


def contents_of(job: Job) -> dict[str, str]:
    """Hashes of the local files that a job will read, as its summary will have them."""
    # Late: Hydra imports this file at the start of every command.
    from tpresearch.data.tokenizer import load_hf
    from tpresearch.hf.files import weights_hash

    data, tokenizer = (OmegaConf.to_object(job.composed[key]) for key in ("data", "tokenizer"))
    assert isinstance(data, DataConfig)
    assert isinstance(tokenizer, TokenizerConfig)
    found = {}
    if data.source is DataSource.hf:
        if local_folder(data):
            found["corpus_hash"] = open_hub(data).content_hash
    elif not data.is_synthetic:
        found["corpus_hash"] = open_files(data).content_hash
    if tokenizer.kind is TokenizerKind.hf and _is_local(tokenizer.path) and not data.is_synthetic:
        found["tokenizer_hash"] = load_hf(tokenizer.path).hash
    if _is_local(init_from := job.composed.init_from):
        found["initial_weights"] = weights_hash(init_from)
    return found


def _is_local(path: str | None) -> bool:
    return path is not None and os.path.exists(os.path.expanduser(path))


def is_usable_folder(folder: Path) -> bool:
    """Whether a job may use this folder: it is left from an earlier start of a job, or does not exist, or is empty."""
    if not os.path.lexists(folder):
        return True
    ours = any(folder.glob("console*.log*")) or (folder / ".hydra").is_dir()
    return folder.is_dir() and (ours or not any(folder.iterdir()))


def will_resume(job: Job) -> bool:
    """Whether an earlier start of this job has left a checkpoint, from which it will resume in its folder."""
    with suppress(*NO_RECORD):
        same = recorded_signature(job.folder, job.ranks) == job.signature
        return same and any(job.folder.glob("checkpoints/step-*/checkpoint.json"))
    return False


def inherited_overrides(hydra_overrides: Iterable[str]) -> list[str]:
    """Hydra's settings that a job needs too, such as hydra.searchpath."""
    keys = {typed: override_key(typed).replace("/", ".") for typed in hydra_overrides}
    return [typed for typed, key in keys.items() if not key.startswith(SWEEP_SETTINGS)]


def wandb_group(sweep_dir: Path) -> str:
    """The W&B group of a sweep's jobs, unless logger.group is set: its folder below outputs."""
    below = [part for part in sweep_dir.parts if part not in ("/", "outputs")]
    parts = below or [sweep_dir.resolve().name]  # of `.`, which has none
    return "/".join(parts)[-MAX_NAME_CHARS:].strip()
