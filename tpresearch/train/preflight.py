"""All that can be refused before there is a folder, an allocation or a process group, cheapest first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tpresearch.config import ConfigError
from tpresearch.config.compose import as_dict
from tpresearch.config.mesh import MeshSizes
from tpresearch.config.schema import Config
from tpresearch.config.validate import validate
from tpresearch.config.world import World
from tpresearch.data import check_data
from tpresearch.track.secrets import refuse_secrets

if TYPE_CHECKING:  # these import torch, which takes seconds
    from torch import nn

    from tpresearch.plan.compiler import Plan
    from tpresearch.train.device import Device


@dataclass(frozen=True)
class Preflight:
    """What judged a config, and what trains it."""

    cfg: Config
    sizes: MeshSizes
    model: nn.Module
    """On the meta device."""
    plan: Plan
    device: Device | None
    """None where nothing is to run on this machine: for plan_only, and for a job of a cluster."""


def preflight(cfg: Config, world: World) -> Preflight:
    """Judge the config, the data's paths, the device, and the plan against the model.

    Raises:
        ConfigError: for the first thing that cannot work.
    """
    try:
        return _preflight(cfg, world)
    except ConfigError as error:
        if cfg.plan_only and error.nproc:  # which starts no ranks: another number of them is an override too
            error.fix["world_size"], error.nproc = error.nproc, None
        raise


def _preflight(cfg: Config, world: World) -> Preflight:
    try:
        refuse_secrets(as_dict(cfg))
    except ValueError as error:
        raise ConfigError("config", "...", str(error), "a config without credentials") from None
    sizes = validate(cfg, world.size, world.hosts)
    check_data(cfg.data, cfg.tokenizer)
    from tpresearch.train.build import planned
    from tpresearch.train.device import choose_device

    runs_here = not cfg.plan_only and world.here
    device = choose_device(cfg, world.local_rank, world.local_size) if runs_here else None
    model, plan = planned(cfg, sizes)
    return Preflight(cfg, sizes, model, plan, device)
