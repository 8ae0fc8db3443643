"""The Python API: compose, compile, build and read records, in a notebook or under torchrun, with the code of the commands."""

from __future__ import annotations

import atexit
import copy
import dataclasses
import logging
import shlex
import sys
from contextlib import AbstractContextManager, suppress
from html import escape
from os import PathLike, fspath
from typing import TYPE_CHECKING

from hydra import compose

from tpresearch.checkpoint.resume import not_resuming
from tpresearch.config import Config, ConfigError
from tpresearch.config.axes import AXIS_NAMES, DATA_AXES
from tpresearch.config.compose import register_schema
from tpresearch.config.validate import DEFAULT_PLAN_RANKS, ranks_needed
from tpresearch.config.values import check_bounds
from tpresearch.config.world import World
from tpresearch.launch.composition import Composition, initialize_conf, typed_config
from tpresearch.launch.explain import explain_errors
from tpresearch.launch.home import check_home
from tpresearch.launch.hydra_app import own_hydra
from tpresearch.launch.resolvers import register_resolvers
from tpresearch.track.names import NAMES
from tpresearch.train.modes import modes_of_a_run
from tpresearch.train.preflight import Preflight, preflight, refuse_single_process

if TYPE_CHECKING:  # torch and pandas take seconds, and a config needs neither
    import pandas as pd
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from tpresearch.compare.runs import Run
    from tpresearch.data.batches import Batch
    from tpresearch.parallel.device import Device
    from tpresearch.train.loop import Loop
    from tpresearch.train.state import TrainState

log = logging.getLogger(__name__)

LOADED = 'load("model=llama2_7b", "mesh.tp=8")'


def load(*overrides: str, config_name: str = "train") -> Config:
    """The typed config for these command-line overrides: `load("model=llama2_7b", "mesh.tp=8")`.

    Args:
        overrides: as on the command line, including `hydra.searchpath=[file://mine/conf]` for your own config folder.
        config_name: the file of conf/ to compose: `train`, or `verify`.

    Raises:
        ConfigError: naming the invalid override and what would be legal.
    """
    for given in (*overrides, config_name):
        if not isinstance(given, str):
            raise TypeError(f"load({given!r}): each override is a string of its own, as in {LOADED}")
    check_home(World())
    register_schema()
    register_resolvers()
    composition = Composition(config_name, list(overrides))
    try:
        with own_hydra():
            composition.refuse_unusable()
            with explain_errors(composition), initialize_conf():
                return not_resuming(typed_config(compose(config_name, composition.overrides, True)))
    except ConfigError as error:
        raise error from None  # its sentence says what Hydra's traceback does


@dataclasses.dataclass(frozen=True, repr=False)
class CompiledPlan:
    """A plan compiled against the model on the meta device, shown as a table in a terminal or notebook."""

    job: Preflight
    """The validated job: `job.plan` by module, `job.model` on the meta device, `job.sizes` of the mesh."""

    def __repr__(self) -> str:
        from tpresearch.plan.describe import plan_text

        return f"{self.job.about}\n\n{plan_text(self.job.model, self.job.plan)}"

    def _repr_html_(self) -> str:
        from tpresearch.plan.describe import plan_html

        return f"<p>{escape(self.job.about)}</p>\n{plan_html(self.job.model, self.job.plan)}"


@modes_of_a_run()
def compile_plan(cfg: Config, world_size: int | None = None) -> CompiledPlan:
    """The table that `plan_only=true` prints; needs no ranks, memory or GPU.

    Args:
        world_size: ranks to compile for; None for `cfg.world_size`, or as many as the mesh needs.

    Raises:
        ConfigError: for whatever a run with this config would be refused for.
    """
    return CompiledPlan(preflight(_copy(cfg, world_size, plan_only=True), World()))


def _copy(cfg: Config, world_size: int | None, plan_only: bool) -> Config:
    """The config as it is now: the caller may change it for the next job."""
    if not isinstance(cfg, Config):
        raise TypeError(f"{cfg!r}: not a config, which load returns, as in {LOADED}")
    asked = cfg.world_size if world_size is None else world_size
    check_bounds(own := dataclasses.replace(copy.deepcopy(cfg), plan_only=plan_only, world_size=asked))
    return own


@dataclasses.dataclass(frozen=True)
class Job:
    """A config ready to train on this rank, between two steps; or rank 0 on the meta device, for inspection."""

    state: TrainState
    mesh: DeviceMesh
    """The mesh of all axes, including those of size 1: `mesh["tp"]`."""
    steps: Loop | ConfigError = dataclasses.field(repr=False)
    """What takes the steps; without the ranks, it raises an error that says so."""

    @property
    def model(self) -> nn.Module:
        """The model, sharded by its plan, with initial weights; on the meta device if it is for inspection only."""
        return self.state.model

    @property
    def optimizer(self) -> Optimizer:
        return self.state.optimizer

    @property
    def loop(self) -> Loop:
        """The training loop of every run: `loop.state`, `loop.setup`, `loop.corpus`.

        Raises:
            ConfigError: with the torchrun command to use, if the ranks have not been started.
        """
        if isinstance(self.steps, ConfigError):
            raise self.steps
        return self.steps

    @modes_of_a_run()
    def batch(self) -> Batch:
        """This rank's rows of the global batch that the next step will read, on its device."""
        return self.loop.read()

    @modes_of_a_run()
    def step(self) -> dict[str, float]:
        """One optimizer step on the next global batch; the result is the same on every rank and under every plan.

        Returns: `train/step`, and, for the global batch before the update, `train/loss` and `train/grad_norm`.

        Raises:
            ConfigError: in the first steps, for a parameter whose gradient differs between ranks that each hold all of it.
        """
        from tpresearch.parallel.mesh import sum_over

        share, norm = self.loop.step()
        loss = sum_over(self.mesh, share.clone(), DATA_AXES)
        step = self.loop.state.step
        return {"train/step": step, "train/loss": loss.item(), "train/grad_norm": norm.item()}

    @modes_of_a_run()
    def evaluate(self) -> float | None:
        """The loss on `train.eval_rows` held-out rows; None if there are none. Collective."""
        return self.loop.evaluate()


@modes_of_a_run()
def build(cfg: Config, world_size: int | None = None) -> Job:
    """Build the config's data, mesh, sharded model and optimizer: in one process, or on each rank that torchrun started.

    In one process, a plan for several ranks is for inspection only: what rank 0 would hold, on the meta device,
    with mesh, placements and local shapes, and to compute with it is refused. `world_size` is as in `compile_plan`.

    The process group is joined once per process, unless there is one already, and left when the process ends, or when
    the next build is for other ranks: earlier jobs that communicate must then be built again.

    Raises:
        ConfigError: for whatever a run with this config would be refused for.
    """
    from tpresearch.data.pipeline import prepare
    from tpresearch.parallel.mesh import build_mesh
    from tpresearch.train.agreement import AgreedGradients
    from tpresearch.train.assemble import assemble
    from tpresearch.train.main import check_rows, log_notes
    from tpresearch.train.same_job import check_same_job

    world = World.from_environment()
    cfg = _copy(cfg, world_size, plan_only=False)
    alone = world.size == 1 and not world.elastic
    if alone and (ranks := world_size or ranks_needed(cfg, DEFAULT_PLAN_RANKS)) > 1:
        return _to_look_at(cfg, ranks)
    job = preflight(cfg, world)
    assert job.device
    corpus = prepare(cfg.data, cfg.tokenizer, world)
    check_rows(corpus, job)
    log_notes(job, corpus, is_new=True)
    _join(job.device, world, cfg)
    check_same_job(job, corpus)
    mesh = build_mesh(job.sizes, job.device.type)
    loop = assemble(job, mesh, job.device, corpus, [AgreedGradients(job.cfg, job.plan, mesh)])
    return Job(loop.state, mesh, loop)


def _to_look_at(cfg: Config, ranks: int) -> Job:
    from tpresearch.parallel.apply import parallelize
    from tpresearch.parallel.device import FAKE
    from tpresearch.parallel.mesh import build_mesh
    from tpresearch.train.assemble import build_state

    job = compile_plan(cfg, ranks).job
    _join(FAKE, World(size=ranks, local_size=ranks), cfg)
    mesh = build_mesh(job.sizes, FAKE.type)
    eager = dataclasses.replace(cfg.parallel, compile=False, async_tp=False)
    model = parallelize(job.model, job.plan, eager, mesh, cfg.train.dtype)
    in_script = sys.argv[0].endswith(".py") and "ipykernel" not in sys.argv[0]
    script = shlex.join(sys.argv) if in_script else "SCRIPT.py"
    why = f"this process holds what rank 0 of {ranks} would hold, for inspection only"
    legal = f"to compute with it, torchrun --nproc-per-node={ranks} {script}; or parallel=none"
    missing = ConfigError("parallel", cfg.parallel.name, why, legal, fix={}, nproc=ranks)
    return Job(build_state(model, cfg, job.plan, mesh), mesh, missing)


_groups: dict[tuple[str, int], AbstractContextManager[None]] = {}
"""The process group of this process, if it is ours, by its backend and size."""


def _join(device: Device, world: World, cfg: Config) -> None:
    import torch.distributed as dist

    from tpresearch.parallel.group import process_group

    key = device.backend, world.size
    if dist.is_initialized():
        if key in _groups or (not _groups and device.backend != "fake"):
            return
        if not _groups:
            refuse_single_process(cfg, world.size)
    _leave()  # also one that the caller has destroyed: its context would end the next when it is collected
    _groups[key] = process_group(device, world)
    _groups[key].__enter__()
    atexit.register(_leave)


def _leave() -> None:
    error = getattr(sys, "last_value", None)
    while _groups:
        _, group = _groups.popitem()
        with suppress(BaseException):
            group.__exit__(type(error) if error else None, error, None)


def runs(*paths: str | PathLike[str]) -> pd.DataFrame:
    """Finished runs, one row per run folder: the figures of its summary.json, then its settings by dotted key.

    Args:
        paths: folders of runs or sweeps, or globs of them. Unreadable ones are skipped with a warning.

    Raises:
        ConfigError: if there is no run.
    """
    import pandas as pd

    found = _found(paths)
    alone = dict.fromkeys(AXIS_NAMES, 1)
    settings = pd.json_normalize([{**run.config, "mesh": alone | run.summary["mesh"]} for run in found])
    figures = pd.json_normalize([{**run.summary, "mesh": None} for run in found]).drop(columns="mesh")
    index = pd.Index([str(run.folder) for run in found], name="run")
    typed = settings.drop(columns=figures.columns.intersection(settings.columns))  # device: what it ran on
    return pd.concat([figures, typed], axis=1).set_index(index)


def metrics(*paths: str | PathLike[str]) -> pd.DataFrame:
    """All logged rows of these runs (metrics.jsonl), by folder and `train/step`, one column per metric.

    Args:
        paths: as for `runs`.

    Raises:
        ConfigError: if there is no run.
    """
    import pandas as pd

    rows = [{"run": str(run.folder), **row} for run in _found(paths) for row in run.rows]
    return pd.DataFrame(rows, columns=None if rows else ["run", *NAMES]).set_index(["run", "train/step"])


def _found(paths: tuple[str | PathLike[str], ...]) -> list[Run]:
    from tpresearch.compare.runs import find_runs

    found = find_runs([fspath(path) for path in paths or ("outputs",)])
    for sentence in found.left_out:
        log.warning("left out: %s", sentence)
    return found.runs
