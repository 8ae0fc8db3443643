"""What a step sent and held, beside what formulas say: each config is run once for all tests that look at it.

On the fake process group; `on_ranks` runs the same step on real ranks, and tests hold the one to the other.
"""

from __future__ import annotations

from functools import cache

from support.assembled import joined
from support.composed import config, corpus, in_two_parts
from tpresearch.config import Config
from tpresearch.config.world import World
from tpresearch.data.rows import AnyCorpus
from tpresearch.ledger.entries import Expected, StepLedger
from tpresearch.ledger.formulas import expected_entries
from tpresearch.ledger.memory_formulas import expected_memory
from tpresearch.parallel.device import FAKE, Device
from tpresearch.train.assemble import assemble
from tpresearch.train.watch import CountedStep
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


@cache
def counted_step(world: int, *overrides: str, two_parts: bool = False) -> StepLedger:
    """Rank 0's second step; in two micro-batches per rank where `two_parts`."""
    cfg = _config(world, *overrides, two_parts=two_parts)
    return count(World(size=world, local_size=world), cfg, FAKE)


@cache
def on_ranks(ranks: Ranks, world: int, *overrides: str, two_parts: bool = False) -> StepLedger:
    return ranks.run(world, count, _config(world, *overrides, two_parts=two_parts))[0]


def _config(world: int, *overrides: str, two_parts: bool = False) -> Config:
    cfg = config(*overrides)
    return in_two_parts(cfg, world) if two_parts else cfg


def count(
    world: World, cfg: Config, device: Device | None = None, rows: AnyCorpus | None = None
) -> StepLedger:
    """The second step of a job on this rank, under both ledgers.

    Args:
        device: the one that the config chooses, unless given.
        rows: random ones, unless given.
    """
    with joined(cfg, world, device) as (job, mesh, chosen):
        model, plan = job.model, job.plan
        formulas = expected_entries(model, plan, cfg), expected_memory(model, plan, cfg, chosen.type)
        counting = CountedStep(mesh, Expected(*formulas), last_step=1)
        loop = assemble(job, mesh, chosen, rows or corpus(), [counting])
        loop.step()
        if cfg.train.eval_rows:
            loop.evaluate()  # which must leave nothing gathered
        loop.step()
        assert counting.counted
        return counting.counted
