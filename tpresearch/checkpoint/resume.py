"""Which checkpoint a run resumes from, and whether this config may resume from it."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tpresearch.checkpoint.disk import (
    CHECKPOINTS_FOLDER,
    STEP_FOLDER,
    BrokenCheckpoint,
    Checkpoint,
    Manifest,
    NewerFormat,
    read_checkpoint,
    step_folders,
)
from tpresearch.config.choices import DataSource
from tpresearch.config.comparable import experiment_config, with_defaults
from tpresearch.config.compose import PATHS, as_dict
from tpresearch.config.errors import ConfigError, format_value
from tpresearch.config.schema import Config
from tpresearch.config.validate import total_steps

log = logging.getLogger(__name__)

AUTO, NEVER = "auto", "never"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def run_of(path: Path) -> Path:
    """The run folder of a path to a run or to one of its checkpoints."""
    path = Path(os.path.abspath(os.path.expanduser(path)))
    if STEP_FOLDER.fullmatch(path.name):
        return path.parents[1].resolve()  # its checkpoints may be linked to from there
    resolved = path.resolve()
    return resolved.parent.parent if STEP_FOLDER.fullmatch(resolved.name) else resolved


def find_checkpoint(path: Path, field: str = "checkpoint") -> Checkpoint:
    """The checkpoint at a path, or the newest complete one of the run at a path.

    Args:
        field: the option that gave the path, for the message.

    Raises:
        ConfigError: if there is none, or it is not complete.
    """
    return _candidates(path, field)[0]


def checkpoints_to_resume(cfg: Config, run: Path, restarted: bool = False) -> list[Checkpoint]:
    """The complete checkpoints that `resume` selects for a run in this folder, newest first; none for a new run.

    Args:
        restarted: whether this job had begun to train here before torchrun or a scheduler started it again: it resumes from its
            own checkpoints, if there are any yet.

    Raises:
        ConfigError: if a checkpoint is requested and there is none, or if all existing ones are broken or are
            of another experiment than this config.
    """
    resume = AUTO if restarted and _step_folders(run, "resume", AUTO) else cfg.resume
    if resume == NEVER or (resume == AUTO and not _step_folders(run, "resume", AUTO)):
        return []
    found = _candidates(run if resume == AUTO else Path(resume), "resume", shown_as=resume)
    for checkpoint in found:
        check_started(checkpoint)
        check_experiment(checkpoint, cfg)
    return found


def not_resuming(cfg: Config) -> Config:
    """The config, for what builds from initial weights.

    Raises:
        ConfigError: if it names a run to resume.
    """
    if cfg.resume not in (AUTO, NEVER):
        why = "what is built here starts from initial weights, and no run is continued"
        raise ConfigError("resume", cfg.resume, why, "init_from, for the weights; train.py resumes a run")
    return cfg


def _candidates(path: Path, field: str, shown_as: object = None) -> list[Checkpoint]:
    value = shown_as or path
    resolved = Path(os.path.expanduser(path)).resolve()
    if STEP_FOLDER.fullmatch(resolved.name):
        try:
            return [read_checkpoint(resolved)]
        except BrokenCheckpoint as error:
            why, run = f"not a complete checkpoint: {error}", run_of(resolved)
            fix = {field: run} if _step_folders(run, field, value) else None
            raise ConfigError(field, value, why, "another one, or its run", fix) from None
    folders = _step_folders(resolved, field, value)
    if not folders:
        why = "there is no such folder" if not resolved.exists() else f"it has no {CHECKPOINTS_FOLDER}/step-*"
        raise ConfigError(field, value, why, "the folder of a run that has a checkpoint, or of a checkpoint")
    found: list[Checkpoint] = []
    why = ""
    for folder in folders[::-1]:
        try:
            found.append(read_checkpoint(folder))
        except NewerFormat as error:
            why, legal = f"{folder.name}: {error}", "a newer tpresearch, or another run"
            raise ConfigError(field, value, why, legal) from None
        except BrokenCheckpoint as error:
            why = f"none of its {len(folders)} checkpoints is complete; {folder.name}: {error}"
            if not found:
                log.warning("%s is not complete: %s", folder, error)
    if not found:
        raise unusable_error(field, value, why)
    return found


def unusable_error(field: str, value: object, why: str) -> ConfigError:
    """The refusal of a run none of whose checkpoints can be read."""
    legal, fix = "a run that has one", {}
    if field == "resume":
        legal, fix = f"{legal}; resume=never starts over and sets these aside", {field: NEVER}
    return ConfigError(field, value, why, legal, fix=fix or None)


def _step_folders(run: Path, field: str, value: object) -> list[Path]:
    try:
        return step_folders(run)
    except OSError as error:
        legal = "a folder that this user can read"
        raise ConfigError(field, value, f"{error.filename}: {error.strerror}", legal) from None


def check_started(checkpoint: Checkpoint) -> None:
    """Refuse to resume from the output of `tpresearch.import_hf`: it has weights, but no run to resume."""
    if checkpoint.step == 0:
        run = run_of(checkpoint.folder)
        why, legal = "no step was taken there: it holds only initial weights", "init_from, for a new run"
        fix = {"model": "hf", "init_from": run, "resume": None, "hydra.run.dir": None}
        raise ConfigError("resume", run, why, legal, fix=fix)


def check_experiment(checkpoint: Checkpoint, cfg: Config) -> None:
    """Refuse to resume a different experiment: only plan, mesh, logging and the like may change, files may have moved, and the
    budget may grow.
    """
    manifest = checkpoint.manifest
    fix = {"init_from": checkpoint.folder, "resume": None, "hydra.run.dir": None}
    legal = "the same, or a new run from these weights"
    started = experiment_config(with_defaults(manifest.experiment))
    for key, before, now in differences(started, experiment_config(as_dict(cfg))):
        if not (key in PATHS and _is_gone(key, before, cfg.data.source)):
            raise ConfigError(key, now, f"this run was started with {format_value(before)}", legal, fix=fix)
    if cfg.defects.keep_gradients:
        why = "its gradients accumulated since the first step are not in any checkpoint"
        raise ConfigError("defects.keep_gradients", True, why, "resume=never", fix={"resume": NEVER})
    if (steps := total_steps(cfg)) < manifest.steps:
        key, value = ("train.steps", steps) if cfg.train.steps else ("train.tokens", cfg.train.tokens)
        why = f"this run ends at step {manifest.steps}, on which its learning rates depend"
        raise ConfigError(key, value, why, "as many steps or more, or a new run from these weights", fix=fix)


def differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value before, value now) of each that differs in two configs as plain data."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        if before != now:
            yield key, before, now
        return
    for name in [*now, *(name for name in before if name not in now)]:
        yield from differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)


def _is_gone(key: str, paths: Any, source: DataSource) -> bool:
    """Whether these are files, and no names on the hub, that are no longer where they were: moved, perhaps, which
    `check_corpus` tells from what is in them."""
    may_be_names = key != "data.path" or source is DataSource.hf
    return all(
        isinstance(path, str)
        and not (may_be_names and HUB_NAME.fullmatch(path))
        and not glob.glob(path, recursive=True)
        for path in (paths if isinstance(paths, list) else [paths])
    )


def check_corpus(manifest: Manifest, corpus_hash: str, tokenizer_hash: str, rows: int) -> None:
    """Refuse to resume with rows other than those the run was trained on."""
    if (manifest.corpus_hash, manifest.tokenizer_hash, manifest.rows) != (corpus_hash, tokenizer_hash, rows):
        differ = {
            "the text": manifest.corpus_hash != corpus_hash,
            "the tokenizer": manifest.tokenizer_hash != tokenizer_hash,
        }
        what = " or ".join(name for name, differs in differ.items() if differs) or "the text"
        why = f"{what} is not what this run was trained on: {manifest.rows:,} rows then, {rows:,} now"
        legal = "the same files, tokenizer and Python; resume=never"
        raise ConfigError("data.source", corpus_hash, why, legal, {"resume": NEVER})
