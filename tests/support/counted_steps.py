"""What a step sent and held, beside what formulas say: each config is run once for all tests that look at it."""

from __future__ import annotations

from support.composed import config, corpus, in_two_parts
from tpresearch.config import Config
from tpresearch.config.world import World
from tpresearch.data import prepare
from tpresearch.ledger.entries import Expected, StepLedger
from tpresearch.ledger.formulas import expected_entries
from tpresearch.ledger.memory_formulas import expected_bytes
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh
from tpresearch.train.loop import Loop
from tpresearch.train.preflight import preflight
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

_known: dict[tuple[int, bool, tuple[str, ...]], StepLedger] = {}


def counted_step(ranks: Ranks, world: int, *overrides: str, two_parts: bool = False) -> StepLedger:
    """Rank 0's second step; in two micro-batches a rank where `two_parts`."""
    key = world, two_parts, overrides
    if key not in _known:
        cfg = config(*overrides)
        _known[key] = ranks.run(world, count, in_two_parts(cfg, world) if two_parts else cfg)[0]
    return _known[key]


def count(world: World, cfg: Config) -> StepLedger:
    """The second step of a job on this rank, under both ledgers."""
    job = preflight(cfg, world)
    assert job.device
    formulas = (
        expected_entries(job.model, job.plan, cfg),
        expected_bytes(job.model, job.plan, cfg, job.device.type),
    )
    rows = prepare(cfg.data, cfg.tokenizer) if cfg.data.source.is_synthetic else corpus()
    with process_group(job.device, world):
        mesh = build_mesh(job.sizes, job.device.type)
        counting = CountedStep(mesh, Expected(*formulas), last_step=1)
        loop = Loop.assemble(job, mesh, job.device, rows, [counting])
        loop.step()
        loop.evaluate()  # which must leave nothing gathered
        loop.step()
        assert counting.counted
        return counting.counted
