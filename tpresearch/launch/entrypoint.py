"""`@entrypoint`: the way from a command line to main, for train.py and each `python -m tpresearch.*`."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from tpresearch import interrupt
from tpresearch.config.compose import register_schema
from tpresearch.config.errors import ConfigError, JobFailed, RunFailed
from tpresearch.config.schema import Config
from tpresearch.config.secrets import refuse_secrets
from tpresearch.config.world import SlurmStep, World
from tpresearch.launch import hydra_app
from tpresearch.launch.command import (
    Command,
    Objection,
    WrongCommand,
    override,
    override_key,
    python_command,
    refuse_typed_secrets,
    type_again,
    typed_then,
)
from tpresearch.launch.composition import Composition, typed_config
from tpresearch.launch.explain import explaining
from tpresearch.launch.garbage import uncollected
from tpresearch.launch.help import help_text
from tpresearch.launch.logs import IN_FILES_ONLY, print_without_fail, start_logging
from tpresearch.launch.refuse import fail, objection_to, refuse
from tpresearch.launch.run_dir import agreed, may_resume, register_resolvers, sweep_folder, tell_other_hosts
from tpresearch.launch.stop import end_with_parent

log = logging.getLogger(__name__)

# Read when torch is imported: with most of a card in a few sizes of tensors, fragmentation decides what fits.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

Judged = TypeVar("Judged")


@dataclass(frozen=True)
class Run:
    """Facts about this run for main, besides its config."""

    folder: Path
    """The run folder, absolute, the same on every rank, and there already."""
    world: World
    restarted: bool = False
    """Whether torchrun has started this job's ranks before; rank 0 knows."""
    command: Command = field(default_factory=Command)
    """The command line that started it, or would have started it if it resumes an earlier run."""
    objection: Objection = lambda command: None
    """What the program would say to another command."""


@dataclass(frozen=True)
class Program(Generic[Judged]):
    """`main(judged, run)` as a command, called without arguments. It is also Hydra's task function, which a sweep's launcher
    receives.

    Errors that the user can fix (a `ConfigError`, or anything Hydra refuses) end in one line on stderr for the
    whole job and exit code 2; other exceptions are bugs and keep their traceback.
    """

    main: Callable[[Judged, Run], None]
    config_name: str
    """The file of conf/ to compose."""
    judge: Callable[[Config, World], Judged]
    """Called once with the typed config, before a folder or a process group exists; raises ConfigError, and returns what
    main works with."""
    judge_folder: Callable[[Judged, Path, bool], object] | None = None
    """Called with that, the run folder and whether torchrun has started this job before; raises ConfigError while nothing in
    the folder is touched. Such a program can resume an earlier run (`resume`)."""
    glance: Callable[[Config, World], object] | None = None
    """The part of the judge that costs less than a second; it validates proposed commands, unless the judge itself has
    already done so."""
    judge_resumed: Callable[[Config, World], Judged] | None = None
    """Replaces judge if there are checkpoints to resume from, so that the source of the initial weights is not
    checked."""

    def judged(self, cfg: Config, world: World, resumes: bool) -> Judged:
        """The result of validating a config; raises a ConfigError for the first error."""
        judge = self.judge_resumed if resumes and self.judge_resumed else self.judge
        return judge(cfg, world)

    def __call__(self, composed: DictConfig | None = None) -> None:
        """The whole command; or, for a launcher that runs jobs in this process, one that Hydra has composed."""
        if composed is not None:
            world = World.from_environment()
            return _call_main(self, self.judged(typed_config(composed), world, resumes=False), world)
        print_without_fail()
        register_schema()  # before anything is refused: what is proposed is composed
        register_resolvers()
        world, refused = World(), None
        try:
            world = World.from_environment()
            if world.elastic:
                end_with_parent()
            refuse_typed_secrets(world)
            _start(self, world)
        except ConfigError as error:
            refused = error
        except KeyboardInterrupt:
            interrupt.say()
            sys.exit(interrupt.INTERRUPTED)
        except Exception:
            if world.elastic and world.rank:
                sys.exit(1)  # its traceback is in torchrun's report and in the rank's log
            raise
        if refused:  # outside of the handler, or each later error would have this one as its context
            try:
                refuse(refused, world, self.objection)
            finally:
                tell_other_hosts(world)
        return None

    def objection(self, command: Command) -> ConfigError | None:
        """The reason for which it would refuse another command; None if it would run."""
        judge = self.glance if self.glance and "torch" not in sys.modules else self.judge
        script, resumes = inspect.getfile(self.main), self.judge_folder is not None
        return objection_to(command, script, self.config_name, judge, resumes)


def entrypoint(
    config_name: str, judge: Callable[[Config, World], Judged], **judges: Any
) -> Callable[[Callable[[Judged, Run], None]], Program[Judged]]:
    """Decorates a main as a `Program` of these settings."""
    return lambda main: Program(main, config_name, judge, **judges)


def _start(program: Program[Judged], world: World) -> None:
    arguments = _arguments(world)
    earlier = type_again(arguments) if program.judge_folder else None
    composition = Composition.of(arguments, program.config_name)
    if hydra_app.only_shows(arguments):
        if world.rank == 0 and arguments.help:
            print(help_text(composition, program.main))
        elif world.rank == 0:
            with explaining(composition):
                hydra_app.show(program.main, program.config_name)
        return None
    composition.refuse_unset()
    name, overrides = composition.config_name, composition.overrides
    with explaining(composition):
        app = hydra_app.application(inspect.getfile(program.main), arguments)
        sweeps = arguments.multirun or "hydra.mode=MULTIRUN" in overrides
        config = None if sweeps else hydra_app.compose_run(app, name, overrides)
    if config is None:
        return _sweep(app, program, composition, world)
    with explaining(composition):
        HydraConfig.instance().set_config(config)  # for ${hydra:...}
        cfg = typed_config(config)
    refuse_secrets(OmegaConf.to_container(config.hydra.job, resolve=False))
    with uncollected():  # most judges import torch
        judged = program.judged(cfg, world, may_resume(config, Path(config.hydra.run.dir)))
    interrupt.begun()
    with ExitStack() as held:
        with explaining(composition):
            folder, restarted = held.enter_context(agreed(config, world))
        with read_write(config.hydra.run):
            config.hydra.run.dir = str(folder)
        if program.judge_folder:
            with _typing_again(earlier):
                program.judge_folder(judged, folder, restarted)
        hydra_app.run(app, config, name, lambda: _call_main(program, judged, world, restarted))
    return None


@contextmanager
def _typing_again(earlier: Path | None) -> Iterator[None]:
    """A proposed command that starts a new run instead of resuming one repeats all overrides of that one."""
    try:
        yield
    except ConfigError as error:
        if earlier and "init_from" in error.fix:
            then = {override_key(word): word.partition("=")[2] for word in typed_then(earlier)}
            now = {override_key(word) for word in sys.argv[1:]}
            error.fix = {key: value for key, value in then.items() if key not in now} | error.fix
        raise


def _sweep(app: Hydra, program: Program[Judged], composition: Composition, world: World) -> None:
    """Run the jobs of `-m`; exit code 1 if one of them failed."""
    if world.elastic:
        why = "one failing rank would hang a sweep inside torchrun"
        legal = "a sweep without torchrun, which starts one for each job"
        raise WrongCommand("hydra.mode", "MULTIRUN", why, legal, Command(tuple(sys.argv[1:])))
    interrupt.begun()
    name, overrides = composition.config_name, composition.overrides
    with explaining(composition):
        composed = hydra_app.composed(app, name, overrides, RunMode.MULTIRUN)
    try:
        with (
            explaining(composition, (HydraException, OmegaConfBaseException)),
            sweep_folder(composed) as folder,
        ):
            settled = [override("hydra.sweep.dir", folder), "hydra.mode=MULTIRUN"]
            app.multirun(name, program, [*overrides, *settled])
    except JobFailed:
        sys.exit(1)  # the sweep's table has said what and why


def _arguments(world: World) -> Namespace:
    """Hydra's command line, parsed.

    Raises:
        ConfigError: for unknown flags, a sweep under torchrun, and srun without torchrun.
    """
    arguments, unknown = hydra_app.parse_command_line()
    if unknown:
        legal = "key=value overrides, then flags; see --hydra-help"
        moved = [word for word in unknown if not word.startswith("-")]
        rest = [word for word in sys.argv[1:] if word not in unknown]
        command = dataclasses.replace(Command.typed(world), arguments=(*moved, *rest))
        raise WrongCommand("flags", " ".join(unknown), "not understood", legal, command)
    if (slurm := SlurmStep.from_environment()).tasks > 1:
        raise _srun_alone(slurm)
    return arguments


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


def _call_main(program: Program[Judged], judged: Judged, world: World, restarted: bool = False) -> None:
    """Call main with the validated config and its run; an exception goes to the logs and to torchrun's report."""
    settings, command = HydraConfig.get(), Command.typed(world)
    if any(override_key(word) == "resume" for word in command.arguments):
        command = dataclasses.replace(command, arguments=tuple(settings.overrides.task))
    run = Run(Path(settings.runtime.output_dir), world, restarted, command, program.objection)
    with uncollected():
        start_logging(run.folder, world)
    main = program.main
    if world.elastic:
        from torch.distributed.elastic.multiprocessing.errors import record  # late: it imports torch

        main = record(main)
    try:
        main(judged, run)
    except ConfigError:
        raise
    except RunFailed as failed:
        fail(failed)
    except Exception:
        log.exception("stopped by an exception", extra=IN_FILES_ONLY)
        raise
