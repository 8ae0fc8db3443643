"""Plans and training loops of configs, without a command or a run folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from support.composed import config, corpus
from tpresearch.config import Config, ConfigError
from tpresearch.config.validate import DEFAULT_PLAN_RANKS, ranks_needed, validate
from tpresearch.config.world import SINGLE_PROCESS, World
from tpresearch.parallel.device import Device
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh
from tpresearch.plan.compiler import Plan
from tpresearch.train.assemble import assemble
from tpresearch.train.loop import Loop
from tpresearch.train.observe import Observer
from tpresearch.train.preflight import Preflight, plan_model, preflight


def planned(*overrides: str, world: int = 0, from_seed: bool = False) -> tuple[nn.Module, Plan]:
    """The meta model of a config, and its plan compiled against that: for 4 ranks, if several, unless it is said for how many."""
    cfg = config(*overrides)
    return plan_model(cfg, validate(cfg, world or ranks_needed(cfg, DEFAULT_PLAN_RANKS)), from_seed)


def refusal(*overrides: str, world: int = 0, from_seed: bool = False) -> ConfigError:
    """Why there is no such plan."""
    with pytest.raises(ConfigError) as caught:
        planned(*overrides, world=world, from_seed=from_seed)
    assert "\n" not in str(caught.value)
    return caught.value


def ranks_of_a_host(size: int) -> World:
    """The world as rank 0 of so many on this host sees it."""
    return World(size=size, local_size=size)


@contextmanager
def joined(
    cfg: Config, world: World = SINGLE_PROCESS, device: Device | None = None
) -> Iterator[tuple[Preflight, DeviceMesh, Device]]:
    """This rank's job, inside its process group.

    Args:
        device: the one that the config chooses, unless given.
    """
    job = preflight(cfg, world)
    device = device or job.device
    assert device
    with process_group(device, world):
        yield job, build_mesh(job.sizes, device.type), device


@contextmanager
def assembled(
    cfg: Config,
    world: World = SINGLE_PROCESS,
    device: Device | None = None,
    watching: Sequence[Observer] = (),
) -> Iterator[Loop]:
    """The training loop of this rank on random rows, inside its process group; see `joined`."""
    with joined(cfg, world, device) as (job, mesh, chosen):
        yield assemble(job, mesh, chosen, corpus(), watching)
