"""All jobs of a sweep, composed and judged before the first one starts."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Collection, Iterator, Sequence
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
from tpresearch.config.world import World
from tpresearch.launch.command import WrongCommand, mended, override_key, program, python_command
from tpresearch.launch.composition import COMPOSITION_ERRORS, Composition, conf_dir
from tpresearch.launch.explain import explain
from tpresearch.launch.start import typed_config
from tpresearch.sweep.job import (
    Job,
    as_written,
    completed_runs,
    override,
    passed_on,
    ranks_needed,
    signature,
    slots_of,
    wandb_group,
)

LONGEST_TAG = 64
"""Characters, by W&B's own rule."""


def plan_jobs(
    loader: ConfigLoader,
    master: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    first_number: int,
    gpu_count: int,
    ranks_per_node: int | None = None,
) -> list[Job]:
    """Compose and judge each job; find those that an earlier start of this sweep has completed.

    Args:
        gpu_count: GPUs of this machine that jobs may use.
        ranks_per_node: most ranks on a host of the cluster that jobs run on; None where that is this machine.

    Raises:
        ConfigError: for the first job that cannot run; none has been started then.
    """
    sweep_dir = Path(master.hydra.sweep.dir)
    in_all = set.intersection(*map(set, job_overrides))
    try:
        jobs = [
            _job(loader, master, list(overrides), number, gpu_count, ranks_per_node, in_all)
            for number, overrides in enumerate(job_overrides, first_number)
        ]
    finally:
        HydraConfig.instance().set_config(master)
    return list(_with_folders(jobs, completed_runs(sweep_dir)))


def _job(
    loader: ConfigLoader,
    master: DictConfig,
    overrides: list[str],
    number: int,
    gpu_count: int,
    ranks_per_node: int | None,
    in_all: Collection[str],
) -> Job:
    hydra_overrides = list(master.hydra.overrides.hydra)
    try:
        composed = loader.load_sweep_config(master, overrides)
        with open_dict(composed):
            composed.hydra.job.id, composed.hydra.job.num = str(number), number
        cfg = typed_config(composed)
        settings = composed.hydra.launcher
        ranks = ranks_needed(cfg, settings.nproc or ranks_per_node or gpu_count or SHOWN_WORLD)
        nodes = _nodes(ranks, ranks_per_node)
        wanted = settings.slots or ranks
        slots, gpus = (wanted, False) if ranks_per_node else slots_of(cfg, wanted, gpu_count)
        _check(
            composed, cfg, World(0, ranks, 0, ranks // nodes, ranks > 1, here=not ranks_per_node), overrides
        )
        folder = Path(master.hydra.sweep.dir) / composed.hydra.sweep.subdir
    except COMPOSITION_ERRORS as error:
        flags = get_args_parser().parse_known_args()[0]
        of_job = Composition(
            conf_dir(), str(master.hydra.job.config_name), [*hydra_overrides, *overrides], flags.config_dir
        )
        raise _refused(explain(error, of_job), number, overrides) from None
    except ConfigError as error:
        raise _refused(error, number, overrides) from None
    for_wandb = _for_wandb(cfg, master, [word for word in overrides if word not in in_all])
    return Job(
        number,
        overrides,
        folder,
        ranks,
        slots,
        gpus,
        signature(as_written(cfg), ranks),
        signature(as_written(cfg), ranks, without_seed=True),
        [*program(), *overrides, *for_wandb, *passed_on(hydra_overrides), *_flags()],
        composed,
        nodes,
    )


def _nodes(ranks: int, ranks_per_node: int | None) -> int:
    """Hosts for so many ranks, with as many on each.

    Raises:
        ConfigError: where that is not possible.
    """
    nodes = -(-ranks // ranks_per_node) if ranks_per_node else 1
    if ranks % nodes:
        legal = " ".join(str(each) for each in range(1, (ranks_per_node or ranks) + 1) if ranks % each == 0)
        why = f"{ranks} ranks cannot be spread over {nodes} nodes with as many on each"
        fix = {"hydra.launcher.ranks_per_node": legal.split()[-1]}
        raise ConfigError("hydra.launcher.ranks_per_node", ranks_per_node, why, legal, fix=fix)
    return nodes


def _check(composed: DictConfig, cfg: Config, world: World, overrides: list[str]) -> None:
    """The entrypoint's own check, in the world that the job's first rank will be in."""
    if path := (composed.hydra.callbacks.get("start") or {}).get("check"):
        with _typed(overrides):
            get_method(path)(cfg, world)


@contextmanager
def _typed(overrides: list[str]) -> Iterator[None]:
    """The command line as the job will have it: a check may read it."""
    before = sys.argv
    sys.argv = [before[0], *overrides]
    try:
        yield
    finally:
        sys.argv = before


def _for_wandb(cfg: Config, master: DictConfig, own: Sequence[str]) -> list[str]:
    """One group for the sweep, one wandb/ folder to sync, and what is the job's own among its tags."""
    if not cfg.logger.wandb:
        return []
    sweep_dir = Path(master.hydra.sweep.dir)
    tags = [word for word in own if len(word) <= LONGEST_TAG and not word.startswith(("model=", "parallel="))]
    return [
        *([override("logger.tags", [*cfg.logger.tags, *tags])] if tags else []),
        *([] if cfg.logger.group else [override("logger.group", wandb_group(sweep_dir))]),
        *([] if cfg.logger.dir else [override("logger.dir", sweep_dir)]),
    ]


def _flags() -> list[str]:
    flags = get_args_parser().parse_known_args()[0]
    return [
        *(["--config-path", flags.config_path] if flags.config_path else []),
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
        flags_at = next((i for i, word in enumerate(job.arguments) if word.startswith("--config-")), None)
        arguments = [*job.arguments[:flags_at], *last, *(job.arguments[flags_at:] if flags_at else [])]
        yield dataclasses.replace(job, folder=folder, arguments=arguments)


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
