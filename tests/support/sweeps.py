"""A sweep in this process: composed, planned and judged as on the command line, with jobs that are only pretended."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import HydraContext, RunMode

from tpresearch.config.compose import as_dict, register_schema
from tpresearch.launch import entrypoint
from tpresearch.launch.composition import initialize_conf, typed_config
from tpresearch.launch.resolvers import register_resolvers
from tpresearch.sweep.job import Job
from tpresearch.sweep.launcher import TorchrunLauncher
from tpresearch.sweep.running import DeviceShare
from tpresearch.train.preflight import preflight

SMALL = ("model=toy_mlp", "tokenizer.vocab_size=300", "data.seq_len=16", "train.global_batch_size=8")


@dataclass
class Pretended:
    """A job that ends after a few looks at it, with a summary as a run's."""

    job: Job
    figures: dict[str, Any]
    code: int
    looks: int = 2
    asked_to_end: bool = False

    def poll(self) -> int | None:
        self.looks -= 1
        if self.looks > 0:
            return None
        self.job.folder.mkdir(parents=True, exist_ok=True)
        config = yaml.safe_dump(as_dict(typed_config(self.job.composed)))
        (self.job.folder / "config.yaml").write_text(config)
        status = {"status": "failed", "error": "ValueError: no"} if self.code else {"status": "completed"}
        summary = status | {"world_size": self.job.ranks, "mesh": {"tp": 2}} | self.figures
        (self.job.folder / "summary.json").write_text(json.dumps(summary))
        return self.code

    def terminate(self) -> None:
        self.asked_to_end = True
        self.looks = 0

    def kill(self) -> None:
        pass


@dataclass
class Sweep:
    """Runs sweeps in one folder; remembers what was started, and how many were at once."""

    folder: Path
    code: Callable[[Job], int] = lambda job: 0
    figures: Callable[[Job], dict[str, Any]] = lambda job: {"train/loss": 5.0 + job.number}
    started: list[Job] = field(default_factory=list)
    shares: list[DeviceShare] = field(default_factory=list)
    running: list[Pretended] = field(default_factory=list)
    most_at_once: int = 0

    def __call__(self, *overrides: str, **settings: Any) -> list[Any]:
        """What the sweeper is told of each job: a figure, or the exception that stands for a failure."""
        register_schema()
        register_resolvers()
        GlobalHydra.instance().clear()
        self.started, self.shares, self.running, self.most_at_once = [], [], [], 0
        typed = [f"hydra.sweep.dir={self.folder}", *SMALL, *overrides]
        with initialize_conf():
            hydra = GlobalHydra.instance().hydra
            assert hydra
            master = hydra.compose_config("train", typed, run_mode=RunMode.MULTIRUN)
            typed_settings = {key: value for key, value in master.hydra.launcher.items() if key != "_target_"}
            launcher = TorchrunLauncher(**{**typed_settings, **settings}, start=self._start)
            context = HydraContext(hydra.config_loader, Callbacks(master))
            program = entrypoint("train", preflight=preflight)(lambda job, run: None)
            launcher.setup(hydra_context=context, task_function=program, config=master)
            words = [word for word in typed if not word.lstrip("+").startswith("hydra")]
            parsed = OverridesParser.create(hydra.config_loader).parse_overrides(words)
            (batch,) = BasicSweeper.split_arguments(parsed, None)
            self.folder.mkdir(exist_ok=True)
            returned = launcher.launch(batch, 0)
        return [each._return_value for each in returned]

    def _start(self, job: Job, share: DeviceShare) -> Pretended:
        self.started.append(job)
        self.shares.append(share)
        self.running = [other for other in self.running if other.looks > 0]
        self.running.append(Pretended(job, self.figures(job), self.code(job)))
        self.most_at_once = max(self.most_at_once, len(self.running))
        return self.running[-1]

    @property
    def numbers(self) -> list[int]:
        return [job.number for job in self.started]
