"""The Python API: compose, compile, build and read back, in a notebook or under torchrun, by the code of the commands."""

from __future__ import annotations

import atexit
import dataclasses
import logging
import sys
from contextlib import AbstractContextManager, suppress
from os import PathLike, fspath
from typing import TYPE_CHECKING

from hydra import compose, initialize_config_dir

from tpresearch.config import Config, ConfigError
from tpresearch.config.axes import AXIS_NAMES, DATA_AXES
from tpresearch.config.compose import register_schema
from tpresearch.config.world import World
from tpresearch.launch.composition import Composition, conf_dir, typed_config
from tpresearch.launch.explain import explaining
from tpresearch.launch.run_dir import register_resolvers
from tpresearch.train.preflight import Preflight, preflight

if TYPE_CHECKING:  # torch and pandas take seconds, and a config needs neither
    import pandas as pd
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from tpresearch.compare.runs import Run
    from tpresearch.data import Batch
    from tpresearch.train.loop import Loop

log = logging.getLogger(__name__)


def load(*overrides: str, config_name: str = "train") -> Config:
    """The typed config that a command line of these overrides composes: `load("model=llama2_7b", "mesh.tp=8")`.

    Args:
        overrides: as they are typed, `hydra.searchpath=[file://mine/conf]` for a folder of one's own among them.
        config_name: the file of conf/ to compose: `train`, or `verify`.

    Raises:
        ConfigError: naming the override that is wrong, and what would be legal.
    """
    register_schema()
    register_resolvers()
    composition = Composition(conf_dir(), config_name, list(overrides))
    try:
        with explaining(composition), initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return typed_config(compose(config_name, composition.overrides))
    except ConfigError as error:
        raise error from None  # its sentence says what Hydra's traceback does


@dataclasses.dataclass(frozen=True, repr=False)
class CompiledPlan:
    """A plan compiled against the model on the meta device: a table, as text or in a notebook."""

    job: Preflight
    """What was judged: `job.plan` by module, `job.model` on the meta device, `job.sizes` of the mesh."""

    def __repr__(self) -> str:
        from tpresearch.plan.describe import plan_text

        return f"{self.job.about}\n\n{plan_text(self.job.model, self.job.plan)}"

    def _repr_html_(self) -> str:
        from html import escape

        from tpresearch.plan.describe import plan_html

        return f"<p>{escape(self.job.about)}</p>\n{plan_html(self.job.model, self.job.plan)}"


def compile_plan(cfg: Config, world_size: int | None = None) -> CompiledPlan:
    """What `plan_only=true` prints: no ranks, no memory, no GPU.

    Args:
        world_size: ranks to compile for; None for `cfg.world_size`, or as many as the mesh sizes that are set make.

    Raises:
        ConfigError: for whatever a run with this config would be refused for.
    """
    asked = dataclasses.replace(cfg, plan_only=True, world_size=world_size or cfg.world_size)
    return CompiledPlan(preflight(asked, World()))


@dataclasses.dataclass(frozen=True)
class Job:
    """A config made ready to train on this rank, between two of its steps."""

    loop: Loop
    """The loop of every run, with all there is: `loop.state`, `loop.setup`, `loop.corpus`."""

    @property
    def model(self) -> nn.Module:
        """Sharded by its plan, with its first weights."""
        return self.loop.state.model

    @property
    def optimizer(self) -> Optimizer:
        return self.loop.state.optimizer

    @property
    def mesh(self) -> DeviceMesh:
        """Of all axes, those of size 1 too: `mesh["tp"]`."""
        return self.loop.setup.mesh

    def batch(self) -> Batch:
        """This rank's rows of the global batch that the next step will read, on its device."""
        return self.loop.read()

    def step(self) -> dict[str, float]:
        """One optimizer step on the next global batch: the same numbers on every rank and under every plan.

        Returns: `train/step`, and of the whole batch before the update, `train/loss` and `train/grad_norm`.
        """
        from tpresearch.parallel.mesh import sum_over

        share, norm = self.loop.step()
        loss = sum_over(self.mesh, share.clone(), DATA_AXES)
        step = self.loop.state.step
        return {"train/step": step, "train/loss": loss.item(), "train/grad_norm": norm.item()}

    def evaluate(self) -> float | None:
        """The loss on `train.eval_rows` held-out rows; None where the data holds none out. Collective."""
        return self.loop.evaluate()


def build(cfg: Config) -> Job:
    """The config's data, mesh, sharded model and optimizer: in one process, or on each rank that torchrun started.

    The process group is joined once per process, unless there is one already, and left when the process ends.

    Raises:
        ConfigError: for whatever a run with this config would be refused for.
    """
    from tpresearch.data import prepare
    from tpresearch.parallel.mesh import build_mesh
    from tpresearch.train.assemble import assemble
    from tpresearch.train.main import check_rows, check_same_corpus

    world = World.from_environment()
    job = preflight(dataclasses.replace(cfg, plan_only=False), world)
    assert job.device
    corpus = prepare(cfg.data, cfg.tokenizer, progress=world.rank == 0)
    check_rows(corpus, job)
    _join(job)
    check_same_corpus(corpus)
    return Job(assemble(job, build_mesh(job.sizes, job.device.type), job.device, corpus))


def _join(job: Preflight) -> None:
    import torch.distributed as dist

    from tpresearch.parallel.group import process_group

    assert job.device
    if not dist.is_initialized():
        group = process_group(job.device, job.world)
        group.__enter__()
        atexit.register(_leave, group)


def _leave(group: AbstractContextManager[None]) -> None:
    error = getattr(sys, "last_value", None)
    with suppress(BaseException):
        group.__exit__(type(error) if error else None, error, None)


def runs(*paths: str | PathLike[str]) -> pd.DataFrame:
    """Runs that have ended: one row each, by folder; what its summary.json says, then its settings by dotted key.

    Args:
        paths: folders of runs or sweeps, or globs of them. One that cannot be read is left out with a warning.

    Raises:
        ConfigError: where there is no run.
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
    """Every logged row of metrics.jsonl of these runs, by folder and `train/step`: a column per metric.

    Args:
        paths: as for `runs`.

    Raises:
        ConfigError: where there is no run.
    """
    import pandas as pd

    rows = [{"run": str(run.folder), **row} for run in _found(paths) for row in run.rows]
    return pd.DataFrame(rows).set_index(["run", "train/step"])


def _found(paths: tuple[str | PathLike[str], ...]) -> list[Run]:
    from tpresearch.compare.runs import find

    found = find([fspath(path) for path in paths or ("outputs",)])
    for sentence in found.left_out:
        log.warning("left out: %s", sentence)
    return found.runs
