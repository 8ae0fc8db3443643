"""What a step sent and held, beside what formulas say: each config is run once for all tests that look at it."""

from __future__ import annotations

from support.composed import config, corpus, in_two_parts
from tpresearch.config import Config
from tpresearch.config.validate import validate
from tpresearch.config.world import World
from tpresearch.ledger.formulas import expected_entries
from tpresearch.ledger.memory_formulas import expected_bytes
from tpresearch.ledger.step import Counted, Expected, StepCount, count_of
from tpresearch.parallel.mesh import build_mesh
from tpresearch.train.build import planned
from tpresearch.train.device import choose_device
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

_known: dict[tuple[int, bool, tuple[str, ...]], StepCount] = {}


def counted_step(ranks: Ranks, world: int, *overrides: str, two_parts: bool = False) -> StepCount:
    """Rank 0's second step; in two micro-batches a rank where `two_parts`."""
    key = world, two_parts, overrides
    if key not in _known:
        cfg = config(*overrides)
        _known[key] = ranks.run(world, count, in_two_parts(cfg, world) if two_parts else cfg)[0]
    return _known[key]


def count(world: World, cfg: Config) -> StepCount:
    sizes = validate(cfg, world.size)
    model, plan = planned(cfg, sizes)
    expected = Expected(expected_entries(model, plan, cfg), expected_bytes(model, plan, cfg))
    device = choose_device(cfg, world.local_rank, world.local_size)
    with process_group(device, world):
        mesh = build_mesh(sizes, device.type)
        trainer = assemble(cfg, model, plan, mesh, device, corpus())
        trainer.step(0, trainer.window(), None)
        trainer.evaluate()  # which must leave nothing gathered
        counted = Counted(mesh, trainer.model, trainer.optimizer)
        trainer.step(1, trainer.window(), counted)
        return count_of(counted, expected)
