"""Validation before a step is recorded, and what cannot be recorded."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import NamedTuple

from tpresearch.config import Config, ConfigError
from tpresearch.config.axes import MeshSizes
from tpresearch.config.choices import Float8
from tpresearch.config.notes import notes_on_settings
from tpresearch.config.validate import ranks_of_mesh, validate
from tpresearch.config.world import World
from tpresearch.launch.garbage import gc_paused
from tpresearch.launch.hydra_app import typed_overrides
from tpresearch.simulate.cluster import Cluster, check_world, parse_cluster


class SimulationPreflight(NamedTuple):
    cfg: Config
    cluster: Cluster
    sizes: MeshSizes
    notes: tuple[str, ...] = ()
    """On settings without effect."""


def preflight(cfg: Config, world: World) -> SimulationPreflight:
    """Validate the config, its cluster, its mesh, and its plan against the model; data are not checked, since none are read.

    Raises:
        ConfigError: as `check_simulation` does, and for a plan that this model does not allow.
    """
    if cfg.gpus is not None:
        fix = {"gpus": None, "world_size": cfg.gpus}
        raise ConfigError("gpus", cfg.gpus, "an option of the planner", f"world_size={cfg.gpus}", fix=fix)
    job = check_simulation(cfg, world)
    with gc_paused():  # late: it imports torch
        from tpresearch.train.preflight import plan_model
    plan_model(job.cfg, job.sizes)
    return job._replace(notes=tuple(notes_on_settings(job.cfg, job.sizes, typed_overrides())))


def check_simulation(cfg: Config, world: World) -> SimulationPreflight:
    """Validate what needs no model.

    Raises:
        ConfigError: for what could not train at all, a cluster that lacks a number or cannot hold the world, and what
            is not simulated.
    """
    if world.size > 1:
        why = "it simulates all ranks in one process"
        raise ConfigError("WORLD_SIZE", world.size, why, "a start by python, without torchrun", nproc=1)
    cluster = parse_cluster(cfg.cluster)
    ranks = cfg.world_size or ranks_of_mesh(cfg, cluster.devices_per_host)
    check_world(cluster, ranks)
    cfg = dataclasses.replace(cfg, world_size=ranks, plan_only=False)
    sizes = validate(cfg, ranks, cluster.hosts_of(ranks))
    if cfg.parallel.fsdp.cpu_offload:
        why = "transfers to the host's memory are not simulated"
        raise ConfigError("parallel.fsdp.cpu_offload", True, why, "false")
    if cfg.train.float8 is not Float8.none and (lack := _float8_lack(cfg, cluster)):
        raise ConfigError("train.float8", cfg.train.float8, lack, "none", fix={"train.float8": "none"})
    if not cluster.peak_flops(cfg.train.dtype):
        why = f"cluster {cluster.name} states no rate for it"
        raise ConfigError("train.dtype", cfg.train.dtype, why, "a dtype with a peak_tflops above 0")
    return SimulationPreflight(cfg, cluster, sizes)


def _float8_lack(cfg: Config, cluster: Cluster) -> str | None:
    if cfg.train.float8_emulated:
        return "its emulation is not simulated"
    if not cluster["peak_tflops_float8"]:
        return f"cluster {cluster.name} states no peak_tflops_float8 above 0"
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed: pip install 'tpresearch[float8]'"
    return None
