"""The typed settings of a sweep's launchers: `hydra.launcher`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from tpresearch.config.choices import SlurmCluster


@dataclass
class LauncherConfig:
    """hydra.launcher: how a sweep (`-m`) starts its jobs."""

    _target_: str = MISSING
    nproc: int | None = None
    """Ranks of a job whose mesh leaves it open; null for world_size if that is set, else as many as GPUs, else 4."""
    slots: int | None = None
    """GPUs or CPU slots that a job takes; null for one a rank."""
    fail_fast: bool = False
    """Let the first failure end the sweep."""
    objective: str = "train/loss"
    """The key of summary.json that a sweeper is told."""


@dataclass
class TorchrunConfig(LauncherConfig):
    """On this machine."""

    _target_: str = "hydra_plugins.tpresearch_launchers.TorchrunLauncher"
    cpu_slots: int | None = None
    """Ranks that run side by side on CPUs, over all jobs; null for one job after another."""


@dataclass
class SlurmConfig(LauncherConfig):
    """On a Slurm cluster, through submitit."""

    _target_: str = "hydra_plugins.tpresearch_launchers.SlurmLauncher"
    cluster: SlurmCluster = SlurmCluster.slurm
    """local: submitit's stand-in for Slurm, one node, on this machine."""
    ranks_per_node: int = 8
    """Most ranks on a node: its GPUs."""
    gpus: bool = True
    """Ask for a GPU for each slot."""
    cpus_per_slot: int = 1
    timeout_min: int = 60
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    mem_gb: float | None = None
    """Memory of a node; null for the cluster's default."""
    jobs_at_once: int = 256
    """Of one array."""
    job_name: str = "tpresearch"
    setup: list[str] = field(default_factory=list)
    """Shell lines of the batch script before srun."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Any other option of sbatch."""
