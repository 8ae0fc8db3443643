"""What a step sent and held, beside what formulas say: each config is run once for all tests that look at it.

On the fake process group; `on_ranks` runs the same step on real ranks, and tests hold the one to the other.
"""

from __future__ import annotations

from functools import cache

import torch

from support.composed import config, corpus, in_two_parts
from tpresearch.config import Config
from tpresearch.config.validate import validate
from tpresearch.config.world import World
from tpresearch.data import AnyCorpus
from tpresearch.ledger.formulas import expected_entries
from tpresearch.ledger.memory_formulas import expected_bytes
from tpresearch.ledger.step import Counted, Expected, StepCount, count_of
from tpresearch.parallel.mesh import build_mesh
from tpresearch.train.build import planned
from tpresearch.train.device import Device, choose_device
from tpresearch.train.loop import assemble, process_group
from tpresearch.verify.ranks import Ranks

PLANS = [
    ("none", 1),
    ("ddp", 4),
    ("tp", 4),
    ("sp", 4),
    ("fsdp", 4),
    ("hsdp", 4),
    ("fsdp_tp", 4),
    ("hsdp_tp", 4),
]
"""Plans and the ranks that they are counted on."""

FAKE = Device(torch.device("cpu"), "fake", "cpu")
"""Collectives return at once and move nothing: rank 0 alone, in this process, issues what it would among others."""


@cache
def counted_step(world: int, *overrides: str, two_parts: bool = False) -> StepCount:
    """Rank 0's second step; in two micro-batches per rank where `two_parts`."""
    cfg = _config(world, *overrides, two_parts=two_parts)
    return count(World(size=world, local_size=world), cfg, FAKE)


def on_ranks(ranks: Ranks, world: int, *overrides: str, two_parts: bool = False) -> StepCount:
    return ranks.run(world, count, _config(world, *overrides, two_parts=two_parts))[0]


def _config(world: int, *overrides: str, two_parts: bool = False) -> Config:
    cfg = config(*overrides)
    return in_two_parts(cfg, world) if two_parts else cfg


def count(
    world: World, cfg: Config, device: Device | None = None, rows: AnyCorpus | None = None
) -> StepCount:
    """A step of this rank under both ledgers.

    Args:
        device: the one that the config chooses, unless given.
        rows: random ones, unless given.
    """
    sizes = validate(cfg, world.size)
    model, plan = planned(cfg, sizes)
    device = device or choose_device(cfg, world.local_rank, world.local_size)
    formulas = expected_entries(model, plan, cfg), expected_bytes(model, plan, cfg, device.type)
    with process_group(device, world):
        mesh = build_mesh(sizes, device.type)
        trainer = assemble(cfg, model, plan, mesh, device, rows or corpus())
        trainer.step(0, trainer.window(), None)
        if cfg.train.eval_rows:
            trainer.evaluate()  # which must leave nothing gathered
        counted = Counted(mesh, trainer.model, trainer.optimizer)
        trainer.step(1, trainer.window(), counted)
        return count_of(counted, Expected(*formulas))
