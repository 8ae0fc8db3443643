"""The typed settings of a sweep's launchers, `hydra.launcher`; conf/hydra/launcher/ says what each is for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from tpresearch.config.choices import SlurmCluster


@dataclass
class LauncherConfig:
    """How a sweep (`-m`) starts its jobs. Numbers are above 0."""

    _target_: str = MISSING
    nproc: int | None = None
    slots: int | None = None
    fail_fast: bool = False
    objective: str = "train/loss"


@dataclass
class TorchrunConfig(LauncherConfig):
    """On this machine."""

    _target_: str = "hydra_plugins.tpresearch_launchers.TorchrunLauncher"
    cpu_slots: int | None = None


@dataclass
class SlurmConfig(LauncherConfig):
    """On a Slurm cluster, through submitit."""

    _target_: str = "hydra_plugins.tpresearch_launchers.SlurmLauncher"
    cluster: SlurmCluster = SlurmCluster.slurm
    ranks_per_node: int = 8
    gpus: bool = True
    cpus_per_slot: int = 1
    timeout_min: int = 60
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    mem_gb: float | None = None
    jobs_at_once: int = 256
    job_name: str = "tpresearch"
    setup: list[str] = field(default_factory=list)
    sbatch: dict[str, Any] = field(default_factory=dict)
