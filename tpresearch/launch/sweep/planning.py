"""All jobs of a sweep, composed and judged before the first one starts."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.main import get_args_parser
from hydra.utils import get_method
from omegaconf import DictConfig, open_dict

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config
from tpresearch.config.validate import SHOWN_WORLD
from tpresearch.launch.command import WrongCommand, mended, override_key, program, python_command
from tpresearch.launch.composition import COMPOSITION_ERRORS, Composition, conf_dir
from tpresearch.launch.explain import explain
from tpresearch.launch.start import typed_config
from tpresearch.launch.sweep.job import (
    Job,
    as_written,
    command_of,
    completed_runs,
    override,
    passed_on,
    ranks_needed,
    signature,
    slots_of,
)
from tpresearch.launch.world import World


def plan_jobs(
    loader: ConfigLoader,
    master: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    first_number: int,
    gpu_count: int,
) -> list[Job]:
    """Compose and judge each job; find those that an earlier start of this sweep has completed.

    Raises:
        ConfigError: for the first job that cannot run; none has been started then.
    """
    sweep_dir = Path(master.hydra.sweep.dir)
    try:
        jobs = [
            _job(loader, master, list(overrides), number, gpu_count)
            for number, overrides in enumerate(job_overrides, first_number)
        ]
    finally:
        HydraConfig.instance().set_config(master)
    return list(_with_folders(jobs, completed_runs(sweep_dir)))


def _job(loader: ConfigLoader, master: DictConfig, overrides: list[str], number: int, gpu_count: int) -> Job:
    composed = loader.load_sweep_config(master, overrides)
    with open_dict(composed):
        composed.hydra.job.id, composed.hydra.job.num = str(number), number
    hydra_overrides = list(master.hydra.overrides.hydra)
    try:
        cfg = typed_config(composed)
        settings = composed.hydra.launcher
        ranks = ranks_needed(cfg, settings.nproc or gpu_count or SHOWN_WORLD)
        slots, gpus = slots_of(cfg, settings.slots or ranks, gpu_count)
        _check(composed, cfg, ranks, overrides)
        folder = Path(master.hydra.sweep.dir) / composed.hydra.sweep.subdir
    except COMPOSITION_ERRORS as error:
        flags = get_args_parser().parse_known_args()[0]
        of_job = Composition(
            conf_dir(), str(master.hydra.job.config_name), [*hydra_overrides, *overrides], flags.config_dir
        )
        raise _refused(explain(error, of_job), number, overrides) from None
    except ConfigError as error:
        raise _refused(error, number, overrides) from None
    return Job(
        number,
        overrides,
        folder,
        ranks,
        slots,
        gpus,
        signature(as_written(cfg), ranks),
        signature(as_written(cfg), ranks, without_seed=True),
        command_of(
            program(), ranks, [*overrides, *_for_wandb(cfg, master), *passed_on(hydra_overrides), *_flags()]
        ),
        composed,
    )


def _check(composed: DictConfig, cfg: Config, ranks: int, overrides: list[str]) -> None:
    """The entrypoint's own check, in the world that the job's first rank will be in."""
    if path := (composed.hydra.callbacks.get("start") or {}).get("check"):
        with _typed(overrides):
            get_method(path)(cfg, World(0, ranks, 0, ranks, elastic=ranks > 1))


@contextmanager
def _typed(overrides: list[str]) -> Iterator[None]:
    """The command line as the job will have it: a check may read it."""
    before = sys.argv
    sys.argv = [before[0], *overrides]
    try:
        yield
    finally:
        sys.argv = before


def _for_wandb(cfg: Config, master: DictConfig) -> list[str]:
    """One group for the sweep, and one wandb/ folder to sync."""
    if not cfg.logger.wandb:
        return []
    sweep_dir = Path(master.hydra.sweep.dir)
    group = "/".join(part for part in sweep_dir.parts if part not in ("/", "outputs"))
    return [
        *([] if cfg.logger.group else [override("logger.group", group)]),
        *([] if cfg.logger.dir else [override("logger.dir", sweep_dir)]),
    ]


def _flags() -> list[str]:
    flags = get_args_parser().parse_known_args()[0]
    return [
        *(["--config-name", flags.config_name] if flags.config_name else []),
        *(["--config-dir", flags.config_dir] if flags.config_dir else []),
    ]


def _with_folders(jobs: list[Job], completed: dict[str, Path]) -> Iterator[Job]:
    """Each job in its folder: that of its completed run, else its own, which no completed run may be in."""
    taken = set(completed.values())
    for job in jobs:
        if job.signature in completed:
            yield dataclasses.replace(job, folder=completed[job.signature], completed=True)
            continue
        names = (
            job.folder if nth == 1 else job.folder.with_name(f"{job.folder.name}-{nth}")
            for nth in itertools.count(1)
        )
        folder = next(name for name in names if name not in taken)
        taken.add(folder)
        last = [override("hydra.run.dir", folder), "hydra.mode=RUN"]
        flags_at = next((i for i, word in enumerate(job.command) if word.startswith("--config-")), None)
        command = [*job.command[:flags_at], *last, *(job.command[flags_at:] if flags_at else [])]
        yield dataclasses.replace(job, folder=folder, command=command)


def _refused(error: ConfigError, number: int, overrides: list[str]) -> WrongCommand:
    """The error with the job that has it, and the sweep to type instead."""
    why = f"{error.why}, in job {number} of the sweep ({' '.join(overrides)})"
    return WrongCommand(error.field, error.value, why, error.legal, _sweep_to_try(error, overrides))


def _sweep_to_try(error: ConfigError, overrides: list[str]) -> str:
    """What was typed without the value at fault, where that is one of several; else with the error's fix."""
    if isinstance(error, WrongCommand):
        return error.command
    arguments = sys.argv[1:]
    swept = {override_key(word): word.partition("=")[2].split(",") for word in arguments if "," in word}
    of_job = {override_key(word): word.partition("=")[2] for word in overrides}
    for key in (error.field, *error.fix):
        values = swept.get(key, [])
        if of_job.get(key) in values:
            others = [value for value in values if value != of_job[key]]
            return python_command(mended(arguments, {key: ",".join(others) or None}))
    fix = {**error.fix, **({"world_size": error.nproc} if error.nproc else {})}
    return python_command(mended(arguments, fix))
