"""`@entrypoint`: the way from a command line to main, for train.py and each `python -m tpresearch.*`."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from tpresearch import interrupt
from tpresearch.config.compose import register_schema
from tpresearch.config.errors import ConfigError, JobFailed, RunFailed
from tpresearch.config.schema import Config
from tpresearch.config.secrets import refuse_secrets
from tpresearch.config.world import SlurmStep, World
from tpresearch.launch import hydra_app
from tpresearch.launch.address import check_address
from tpresearch.launch.agents_store import tell_other_hosts
from tpresearch.launch.command import (
    Command,
    CommandCheck,
    WrongCommand,
    override,
    override_key,
    python_command,
    refuse_typed_secrets,
)
from tpresearch.launch.composition import Composition, typed_config
from tpresearch.launch.earlier_run import keeping_overrides, repeat_or_start_again, repeating_overrides
from tpresearch.launch.explain import explain_errors
from tpresearch.launch.garbage import gc_paused
from tpresearch.launch.help import help_text
from tpresearch.launch.home import check_home
from tpresearch.launch.logs import IN_FILES_ONLY, start_logging, tolerate_print_errors
from tpresearch.launch.proposal import error_of_command
from tpresearch.launch.refuse import exit_failed, refuse
from tpresearch.launch.resolvers import register_resolvers
from tpresearch.launch.run_dir import agree_on_folder, may_resume, sweep_folder, typed_folder
from tpresearch.launch.stop import Stopped, end_with_parent

log = logging.getLogger(__name__)

# Read when torch is imported: with most of a card in a few sizes of tensors, fragmentation decides what fits.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

Checked = TypeVar("Checked")


@dataclass(frozen=True)
class Run:
    """Facts about this run for main, besides its config."""

    folder: Path
    """The run folder, absolute, the same on every rank, and there already."""
    world: World
    restarted: bool = False
    """Whether this job had begun to train here before torchrun started its ranks again."""
    command: Command = field(default_factory=Command)
    """The command line that started it, or would have started it if it resumes an earlier run."""
    check_command: CommandCheck = lambda command: None
    """Why the program would refuse another command; None if it would run."""


@dataclass(frozen=True)
class Program(Generic[Checked]):
    """`main(job, run)` as a command, called without arguments. It is also Hydra's task function, which a sweep's launcher
    receives.

    Errors that the user can fix (a `ConfigError`, or anything Hydra refuses) end in one line on stderr for the
    whole job and exit code 2; other exceptions are bugs and keep their traceback.
    """

    main: Callable[[Checked, Run], None]
    config_name: str
    """The file of conf/ to compose."""
    preflight: Callable[[Config, World], Checked]
    """Called once with the typed config, before a folder or a process group exists; raises ConfigError, and returns the
    first argument of main."""
    check_folder: Callable[[Checked, Path, bool], object] | None = None
    """Called with that, the run folder and `Run.restarted`; raises ConfigError while nothing in the folder is touched. Such a
    program can resume an earlier run (`resume`)."""
    quick_check: Callable[[Config, World], object] | None = None
    """The part of preflight that takes less than a second; it validates proposed commands, unless preflight itself has
    already imported torch."""
    preflight_resumed: Callable[[Config, World], Checked] | None = None
    """Replaces preflight if there are checkpoints to resume from, so that the source of the initial weights is not
    checked."""

    def run_preflight(self, cfg: Config, world: World, resumes: bool) -> Checked:
        """The result of validating a config; raises a ConfigError for the first error."""
        preflight = self.preflight_resumed if resumes and self.preflight_resumed else self.preflight
        return preflight(cfg, world)

    def __call__(self, composed: DictConfig | None = None) -> None:
        """Run the command; or, for a launcher that runs jobs in this process, a config that Hydra has composed."""
        if composed is not None:
            world = World.from_environment()
            return _call_main(self, self.run_preflight(typed_config(composed), world, resumes=False), world)
        tolerate_print_errors()
        register_schema()  # before anything is refused: proposed commands are composed
        register_resolvers()
        world, refused = World(), None
        try:
            world = World.from_environment()
            if world.elastic:
                end_with_parent()
            refuse_typed_secrets(world)
            check_home(world)
            check_address(world)
            _start(self, world)
        except ConfigError as error:
            refused = error
        except KeyboardInterrupt:
            interrupt.print_stopped()
            sys.exit(interrupt.INTERRUPTED)
        except Stopped as stopped:
            tell_other_hosts(stopped, world)
            raise
        except Exception as error:
            if world.elastic:
                from torch.distributed.elastic.multiprocessing.errors import get_error_handler  # late: torch

                get_error_handler().record_exception(error)
            tell_other_hosts(error, world)
            if world.elastic and world.rank:
                sys.exit(1)  # its traceback is in torchrun's report
            raise
        if refused:  # outside of the handler, or each later error would have this one as its context
            try:
                refuse(refused, world, self.check_command)
            finally:
                tell_other_hosts(refused, world)
        return None

    def check_command(self, command: Command) -> ConfigError | None:
        preflight = self.quick_check if self.quick_check and "torch" not in sys.modules else self.preflight
        script, resumes = inspect.getfile(self.main), self.check_folder is not None
        return error_of_command(command, script, self.config_name, preflight, resumes)


def entrypoint(
    config_name: str, preflight: Callable[[Config, World], Checked], **options: Any
) -> Callable[[Callable[[Checked, Run], None]], Program[Checked]]:
    """Decorator that makes a main a `Program` with these settings."""
    return lambda main: Program(main, config_name, preflight, **options)


def _start(program: Program[Checked], world: World) -> None:
    arguments = hydra_app.parse(Command.from_argv(world))
    if (slurm := SlurmStep.from_environment()).tasks > 1:
        raise _srun_alone(slurm)
    earlier = repeat_or_start_again(arguments) if program.check_folder else None
    composition = Composition.of(arguments, program.config_name)
    if hydra_app.is_query(arguments):
        if world.rank == 0 and arguments.help:
            print(help_text(composition, program.main))
        elif world.rank == 0:
            with explain_errors(composition):
                hydra_app.answer_query(program.main, program.config_name)
        return None
    composition.refuse_unusable()
    name, overrides = composition.config_name, composition.overrides
    with explain_errors(composition):
        app = hydra_app.application(inspect.getfile(program.main), arguments)
        sweeps = arguments.multirun or "hydra.mode=MULTIRUN" in overrides
        config = None if sweeps else hydra_app.compose_run(app, name, overrides)
    if config is None:
        return _sweep(app, program, composition, world)
    with explain_errors(composition):
        HydraConfig.instance().set_config(config)  # for ${hydra:...}
        cfg, wanted = typed_config(config), typed_folder(config.hydra.run)
        OmegaConf.to_container(config.hydra.job.env_set, resolve=True)  # or Hydra does, where it is late
    refuse_secrets(OmegaConf.to_container(config.hydra.job, resolve=False))
    with gc_paused():  # most preflights import torch
        job = program.run_preflight(cfg, world, may_resume(config, wanted))
    interrupt.restore_interrupt()
    if cfg.plan_only and program.check_folder:  # the plan is printed, also where nothing can be written
        return program.main(job, Run(Path.cwd(), world))
    with ExitStack() as held:
        with explain_errors(composition), repeating_overrides(earlier):
            folder, restarted = held.enter_context(agree_on_folder(config, world))
        with read_write(config.hydra):
            config.hydra.run.dir = str(folder)
            if world.rank:  # one rank records it for all, and takes it back
                config.hydra.output_subdir = None
        with repeating_overrides(earlier):
            if program.check_folder:
                program.check_folder(job, folder, restarted)
            with nullcontext() if world.rank else keeping_overrides(folder):
                hydra_app.run(app, config, name, lambda: _call_main(program, job, world, restarted))
    return None


def _sweep(app: Hydra, program: Program[Checked], composition: Composition, world: World) -> None:
    """Run the jobs of `-m`; exit code 1 if one of them failed."""
    if world.elastic:
        why = "one failing rank would hang a sweep inside torchrun"
        legal = "a sweep without torchrun, which starts one for each job"
        raise WrongCommand("hydra.mode", "MULTIRUN", why, legal, Command(tuple(sys.argv[1:])))
    interrupt.restore_interrupt()
    name = composition.config_name
    with explain_errors(composition):
        overrides, composed = hydra_app.compose_sweep(app, name, composition.overrides)
    most = OmegaConf.select(composed, key := "hydra.sweeper.max_batch_size")
    if most is not None and most < 1:
        raise ConfigError(key, most, "no job would be in a batch", "a number above 0, or null")
    try:
        errors = HydraException, OmegaConfBaseException
        with explain_errors(composition, errors), sweep_folder(composed) as folder:
            settled = [override("hydra.sweep.dir", folder), "hydra.mode=MULTIRUN"]
            app.multirun(name, program, [*overrides, *settled])
    except JobFailed:
        sys.exit(1)  # the sweep's table has said what and why


def _srun_alone(slurm: SlurmStep) -> WrongCommand:
    per_node = max(1, slurm.tasks // max(1, slurm.nodes))
    first_host = "$(scontrol show hostnames $SLURM_JOB_NODELIST | head -1)"
    command = [
        f"srun --ntasks-per-node=1 torchrun --nnodes={slurm.nodes} --nproc-per-node={per_node}",
        f"--rdzv-backend=c10d --rdzv-endpoint={first_host}:29500 --rdzv-id=$SLURM_JOB_ID",
        python_command(sys.argv[1:]).removeprefix("python "),
    ]
    why, legal = "srun started this many jobs of one process each", "one task per node, which runs torchrun"
    return WrongCommand("SLURM_STEP_NUM_TASKS", slurm.tasks, why, legal, " ".join(command))


def _call_main(program: Program[Checked], job: Checked, world: World, restarted: bool = False) -> None:
    """Call main with the validated config and its run; an exception goes to the logs."""
    settings, command = HydraConfig.get(), Command.from_argv(world)
    if any(override_key(word) == "resume" for word in command.arguments):
        command = command.typed(hydra_app.typed_words(settings.overrides.task))
    run = Run(Path(settings.runtime.output_dir), world, restarted, command, program.check_command)
    with gc_paused():
        start_logging(run.folder, world)
    try:
        program.main(job, run)
    except ConfigError:
        raise
    except RunFailed as failed:
        log.error("%s: %s", type(failed).__name__, failed, extra=IN_FILES_ONLY)
        exit_failed(failed, world)
    except Exception:
        log.exception("stopped by an exception", extra=IN_FILES_ONLY)
        raise
