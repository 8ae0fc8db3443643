"""All jobs of a sweep, composed and validated before the first one starts."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from tpresearch.config.compose import as_dict
from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config
from tpresearch.config.validate import DEFAULT_PLAN_RANKS, ranks_needed, total_steps
from tpresearch.config.world import World
from tpresearch.launch.command import Command, WrongCommand, corrected, override, program_words, values_by_key
from tpresearch.launch.composition import Composition, typed_config
from tpresearch.launch.explain import explain_errors
from tpresearch.launch.hydra_app import flags_for_job, parse_command_line, typed_words
from tpresearch.launch.proposal import as_if_typed
from tpresearch.launch.run_dir import may_resume
from tpresearch.sweep.job import (
    Job,
    begun_runs,
    completed_runs,
    contents_of,
    inherited_overrides,
    is_usable_folder,
    signature,
    slots_of,
    wandb_group,
)
from tpresearch.track.wandb_host import MAX_TAG_CHARS


@dataclass(frozen=True)
class JobPlanner:
    """Turns the overrides of jobs into jobs: folder, number of ranks, and command."""

    loader: ConfigLoader
    master: DictConfig
    """The config of the sweep, with its `hydra.launcher`."""
    preflight: Callable[[Config, World, bool], object]
    """The entrypoint's own; its argument says whether the job may resume from checkpoints."""
    gpu_count: int
    """GPUs of this machine that jobs may use."""
    ranks_per_node: int | None = None
    """Maximum ranks per host of the cluster that jobs run on; None for this machine."""

    @property
    def sweep_dir(self) -> Path:
        return Path(self.master.hydra.sweep.dir)

    @property
    def hydra_overrides(self) -> list[str]:
        """Overrides of Hydra's own settings, as they were typed."""
        return typed_words(self.master.hydra.overrides.hydra)

    def plan(self, job_overrides: Sequence[Sequence[str]], first_number: int) -> list[Job]:
        """Compose and validate each job; refuses the first that cannot run."""
        if folder := values_by_key(self.hydra_overrides).get("hydra.run.dir"):
            why = "it is for a single run, and jobs of a sweep have theirs below hydra.sweep.dir"
            fix = {"hydra.run.dir": None, "hydra.sweep.dir": folder}
            raise ConfigError("hydra.run.dir", folder, why, "hydra.sweep.dir", fix)
        for key, value in self.master.hydra.launcher.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
                raise ConfigError(f"hydra.launcher.{key}", value, "too small", "a number above 0")
        _check_direction(self.master)
        if not job_overrides:
            word = next((word for word in sys.argv[1:] if "glob(" in word), "hydra.sweeper.params=")
            key, _, pattern = word.partition("=")
            raise ConfigError(key, pattern, "matches no option of its group", "a pattern that matches some")
        in_all = set.intersection(*map(set, job_overrides))
        try:
            numbered = enumerate(job_overrides, first_number)
            return [self._job(list(overrides), number, in_all) for number, overrides in numbered]
        finally:
            HydraConfig.instance().set_config(self.master)

    def _job(self, overrides: list[str], number: int, in_all: Collection[str]) -> Job:
        config_dir, config_name = parse_command_line()[0].config_dir, str(self.master.hydra.job.config_name)
        try:
            with explain_errors(Composition(config_name, [*self.hydra_overrides, *overrides], config_dir)):
                composed = self.loader.load_sweep_config(self.master, overrides)
                with open_dict(composed):
                    composed.hydra.job.id, composed.hydra.job.num = str(number), number
                HydraConfig.instance().set_config(composed)  # for ${hydra:...}
                self._check_launcher(composed)
                cfg = typed_config(composed)
                folder = self._folder(composed.hydra.sweep.subdir)
                settings = composed.hydra.launcher
            open_ranks = settings.nproc or self.ranks_per_node or self.gpu_count or DEFAULT_PLAN_RANKS
            ranks = ranks_needed(cfg, open_ranks)
            nodes = _nodes(ranks, self.ranks_per_node)
            here = self.ranks_per_node is None
            world = World(0, ranks, 0, ranks // nodes, elastic=ranks > 1, here=here)
            with as_if_typed(Command(tuple(overrides))):
                checked = self.preflight(cfg, world, may_resume(composed, folder))
        except ConfigError as error:
            raise _job_error(error, number, overrides) from None
        wanted = settings.slots or ranks
        slots, gpus = slots_of(cfg, wanted, self.gpu_count) if here else (wanted, False)
        for_wandb = self._wandb_overrides(cfg, [word for word in overrides if word not in in_all])
        return Job(
            number=number,
            overrides=overrides,
            folder=folder,
            ranks=ranks,
            slots=slots,
            gpus=gpus,
            signature=signature(as_dict(cfg), ranks),
            group=signature(as_dict(cfg), ranks, without_seed=True),
            arguments=[*program_words(), *overrides, *for_wandb, *inherited_overrides(self.hydra_overrides)],
            composed=composed,
            nodes=nodes,
            steps=total_steps(cfg),
            notes=getattr(checked, "notes", ()),  # which a `train.preflight.Preflight` has
        )

    def _check_launcher(self, composed: DictConfig) -> None:
        """Refuse a launcher that a swept file chooses: another has started the sweep by then."""
        key = "hydra/launcher"
        chosen, started = (config.hydra.runtime.choices[key] for config in (composed, self.master))
        if chosen != started:
            why = f"chosen by a file that is swept, when {started} has started the sweep"
            raise ConfigError(key, chosen, why, "typed with the sweep", fix={key: chosen})

    def _folder(self, subdir: object) -> Path:
        folder = self.sweep_dir / str(subdir)
        if self.sweep_dir.resolve() not in folder.resolve().parents:
            why, legal = "not below the sweep's own folder", "a name, such as ${hydra.job.num}"
            raise ConfigError("hydra.sweep.subdir", subdir, why, legal)
        return folder

    def _wandb_overrides(self, cfg: Config, own: Sequence[str]) -> list[str]:
        """W&B overrides of a job: one group and one wandb/ folder for the sweep, and the job's own overrides as tags."""
        if not cfg.logger.wandb:
            return []
        more = [word for word in own if not word.startswith(("model=", "parallel="))]
        tags = [word for word in more if len(word) <= MAX_TAG_CHARS]
        return [
            *([override("logger.tags", [*cfg.logger.tags, *tags])] if tags else []),
            *([] if cfg.logger.group else [override("logger.group", wandb_group(self.sweep_dir))]),
            *([] if cfg.logger.dir else [override("logger.dir", self.sweep_dir)]),
        ]


MORE_IS_BETTER = ("perf/tokens_per_second", "perf/mfu")
"""Beginnings of figures of which a search, by default for the least, is for the most."""


def _check_direction(master: DictConfig) -> None:
    """Refuse a sweeper that would search for the slowest job, and call it the best."""
    objective = str(OmegaConf.select(master, "hydra.launcher.objective"))
    direction = OmegaConf.select(master, key := "hydra.sweeper.direction")
    if objective.startswith(MORE_IS_BETTER) and "minimize" in str(direction):
        why = f"the best job would be that of least {objective}, the slowest"
        raise ConfigError(key, "minimize", why, "maximize", {key: "maximize"})


def _nodes(ranks: int, ranks_per_node: int | None) -> int:
    """Number of hosts for these ranks, with equally many on each; refused if that is not possible."""
    nodes = -(-ranks // ranks_per_node) if ranks_per_node else 1
    if ranks % nodes:
        legal = " ".join(str(each) for each in range(1, (ranks_per_node or ranks) + 1) if ranks % each == 0)
        why = f"{ranks} ranks cannot be divided evenly over {nodes} nodes"
        fix = {"hydra.launcher.ranks_per_node": legal.split()[-1]}
        raise ConfigError("hydra.launcher.ranks_per_node", ranks_per_node, why, legal, fix=fix)
    return nodes


def assign_folders(jobs: Sequence[Job], sweep_dir: Path) -> Iterator[Job]:
    """Each job with its folder: that of its completed run, if the files it read have the same contents still; otherwise the one in
    which it has left a checkpoint, whatever its number was then, or one of its own that has no run of another job, and nothing
    that is not a job's.
    """
    completed, begun = completed_runs(sweep_dir), begun_runs(sweep_dir)
    taken = {run.folder for runs in completed.values() for run in runs}
    resumed: dict[int, Path] = {}
    for job in jobs:
        there = [folder for folder in begun.get(job.signature, ()) if folder not in taken]
        if there:
            resumed[job.number] = job.folder if job.folder in there else there[0]
            taken.add(resumed[job.number])
    known: dict[str, dict[str, str]] = {}
    for job in jobs:
        if runs := completed.get(job.signature):
            files = str([job.composed[key] for key in ("data", "tokenizer", "init_from")])
            now = known[files] = known.get(files) or contents_of(job)
            if same := [run for run in runs if not run.changed(now)]:
                yield dataclasses.replace(job, folder=same[-1].folder, completed=True)
                continue
            what = " and ".join(runs[-1].changed(now))
            note = f"its {what} {'have' if ' and ' in what else 'has'} changed since {runs[-1].folder} was completed"
            job = dataclasses.replace(job, notes=(*job.notes, note))
        beside = (job.folder.with_name(f"{job.folder.name}-{nth}") for nth in itertools.count(2))
        usable = (name for name in itertools.chain([job.folder], beside) if is_usable_folder(name))
        folder = resumed.get(job.number) or next(name for name in usable if name not in taken)
        taken.add(folder)
        own = [override("hydra.run.dir", folder), "hydra.mode=RUN", *flags_for_job()]
        yield dataclasses.replace(job, folder=folder, arguments=[*job.arguments, *own])


def _job_error(error: ConfigError, number: int, overrides: list[str]) -> WrongCommand:
    """The error with the job that has it, and the sweep to type instead."""
    why = f"{error.why}, in job {number} of the sweep ({' '.join(overrides)})"
    return WrongCommand(error.field, error.value, why, error.legal, _sweep_to_try(error, overrides))


def _sweep_to_try(error: ConfigError, overrides: list[str]) -> Command | str:
    """The typed command without the invalid value, if it is one of several; else with the error's fix."""
    if isinstance(error, WrongCommand):
        return error.command
    arguments = sys.argv[1:]
    several = values_by_key(word for word in arguments if "," in word)
    of_job = values_by_key(overrides)
    for key in (error.field, *error.fix):
        values = several[key].split(",") if key in several else []
        if of_job.get(key) in values:
            others = [value for value in values if value != of_job[key]]
            return Command(tuple(corrected(arguments, {key: ",".join(others) or None})))
    fix = {**error.fix, **({"world_size": error.nproc} if error.nproc else {})}
    return Command(tuple(corrected(arguments, fix)))
