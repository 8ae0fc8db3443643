"""`@entrypoint`: the way from a command line to main, for train.py and each `python -m tpresearch.*`."""

from __future__ import annotations

import functools
import logging
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.main import get_args_parser
from omegaconf import DictConfig

from tpresearch.config.compose import register_schema, typed
from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config
from tpresearch.config.world import World, slurm_tasks
from tpresearch.launch.command import WrongCommand, program, python_command, starter
from tpresearch.launch.composition import COMPOSITION_ERRORS, Composition, conf_dir
from tpresearch.launch.explain import explain
from tpresearch.launch.logs import IN_FILES_ONLY, start_logging
from tpresearch.launch.refuse import refuse
from tpresearch.launch.run import Run
from tpresearch.launch.run_dir import leave_nothing, register_resolvers
from tpresearch.launch.start import Passing, Start, passing
from tpresearch.sweep import JobFailed, register_launchers

log = logging.getLogger(__name__)

Main = Callable[[Config, Run], None]
Check = Callable[[Config, World], object]


def entrypoint(
    config_name: str = "train", check: Check | None = None
) -> Callable[[Main], Callable[[], None]]:
    """Make `main(cfg, run)` a Hydra program, started by `python` or by torchrun.

    Whatever the user can mend (a `ConfigError`, or anything Hydra refuses) ends in one line on stderr for the
    whole job and exit code 2; other exceptions are bugs and keep their traceback.

    Args:
        config_name: the file of conf/ to compose.
        check: called with the typed config before a folder or a process group exists; raises ConfigError.
    """

    def decorate(main: Main) -> Callable[[], None]:
        @functools.wraps(main)
        def program_main() -> None:
            _run(main, config_name, check)

        return program_main

    return decorate


def _run(main: Main, config_name: str, check: Check | None) -> None:
    world = World.from_environment()
    try:
        config_dir = conf_dir()
        arguments = _arguments(world)
    except ConfigError as error:
        refuse(error, world)
    if world.rank and (arguments.cfg or arguments.info or arguments.help or arguments.hydra_help):
        return  # one rank shows it
    _prepare_hydra(check)

    @functools.wraps(main)  # Hydra names the job after the file of what it runs
    def task(composed: DictConfig) -> None:
        with passing(composing=False):
            _call(main, composed, world)

    failure, composing = _through_hydra(task, config_dir, config_name)
    if failure is not None:  # raised out here, a bug's traceback is its own and not also Hydra's
        _end(failure, composing, Composition.of(arguments, config_dir, config_name), world)


def _through_hydra(
    task: Callable[[DictConfig], None], config_dir: Path, config_name: str
) -> tuple[Exception | None, bool]:
    """What ended the run early, if anything did, and whether that was in composing its config."""
    try:
        hydra.main(version_base="1.3", config_path=str(config_dir), config_name=config_name)(task)()
    except COMPOSITION_ERRORS as error:
        return error, True
    except Passing as passed:
        return passed.error, passed.composing
    except JobFailed:
        sys.exit(1)  # the sweep's table has said what and why
    return None, False


def _prepare_hydra(check: Check | None) -> None:
    register_schema()
    register_resolvers()
    register_launchers()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints errors itself, over many lines, and exits with 1
    path = f"{check.__module__}.{check.__qualname__}" if check else None
    settings = HydraConf(callbacks={"start": {"_target_": "tpresearch.launch.start.Start", "check": path}})
    settings.defaults = [
        {**line, **({"job_logging": "none"} if "job_logging" in line else {})} for line in settings.defaults
    ]
    ConfigStore.instance().store("config", settings, group="hydra", provider="hydra")


def _end(error: Exception, composing: bool, composition: Composition, world: World) -> NoReturn:
    """One line and exit code 2 for what the user can mend; its traceback for a bug."""
    refused = isinstance(error, ConfigError) or (composing and isinstance(error, COMPOSITION_ERRORS))
    if refused and Start.swept and Start.swept.exists():
        leave_nothing(Start.swept)
    if isinstance(error, ConfigError):
        refuse(error, world)
    if composing and isinstance(error, COMPOSITION_ERRORS):
        refuse(explain(error, composition), world)
    if world.elastic and world.rank:
        sys.exit(1)  # its traceback is in torchrun's report and in the rank's log
    raise error


def _arguments(world: World) -> Namespace:
    """Hydra's command line, parsed.

    Raises:
        ConfigError: for flags it does not know, a sweep under torchrun, and srun in the place of torchrun.
    """
    arguments, unknown = get_args_parser().parse_known_args()
    if unknown:
        legal = "key=value overrides, then flags; see --hydra-help"
        moved = [word for word in unknown if not word.startswith("-")]
        rest = [word for word in sys.argv[1:] if word not in unknown]
        command = shlex.join([*starter(world), *program(), *moved, *rest])
        raise WrongCommand("flags", " ".join(unknown), "not understood", legal, command)
    sweep = arguments.multirun or "hydra.mode=MULTIRUN" in arguments.overrides
    if sweep and world.elastic:
        raise WrongCommand(
            "hydra.mode",
            "MULTIRUN",
            "one failing rank would hang a sweep inside torchrun",
            "a sweep without torchrun, which starts one for each job",
            python_command(sys.argv[1:]),
        )
    if (tasks := slurm_tasks()) > 1:
        raise _srun_alone(tasks)
    return arguments


def _srun_alone(tasks: int) -> WrongCommand:
    hosts = int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
    first_host = "$(scontrol show hostnames $SLURM_JOB_NODELIST | head -1)"
    command = [
        f"srun --ntasks-per-node=1 torchrun --nnodes={hosts} --nproc-per-node={max(1, tasks // hosts)}",
        f"--rdzv-backend=c10d --rdzv-endpoint={first_host}:29500 --rdzv-id=$SLURM_JOB_ID",
        python_command(sys.argv[1:]).removeprefix("python "),
    ]
    return WrongCommand(
        "SLURM_STEP_NUM_TASKS",
        tasks,
        "srun started this many jobs of one process each",
        "one task a node, which runs torchrun",
        " ".join(command),
    )


def _call(main: Main, composed: DictConfig, world: World) -> None:
    """main, with its typed config and its run; a bug in it is in the logs, and in torchrun's report."""
    settings = HydraConfig.get()
    run = Run(
        folder=Path(settings.runtime.output_dir),
        world=world,
        overrides=list(settings.overrides.task),
        choices={g: option for g, option in settings.runtime.choices.items() if not g.startswith("hydra/")},
    )
    start_logging(run.folder, world)
    try:
        _recorded(main, world)(typed(composed), run)
    except ConfigError:
        raise
    except Exception:
        log.exception("stopped by an exception", extra=IN_FILES_ONLY)
        raise


def _recorded(main: Main, world: World) -> Callable[[Config, Run], object]:
    """main under torchelastic's `record`: inside Hydra, which would leave it only a SystemExit to record."""
    if not world.elastic:
        return main
    from torch.distributed.elastic.multiprocessing.errors import record  # late: it imports torch

    return record(main)
