"""What a step really sends, collective by collective, against closed formulas; and the formulas by hand."""

from __future__ import annotations

import pytest
from composed import config, corpus, in_two_parts

from tpresearch.config import Config
from tpresearch.config.validate import validate
from tpresearch.launch.world import World
from tpresearch.parallel.mesh import build_mesh
from tpresearch.track.counted import Counted
from tpresearch.track.expected import expected_entries
from tpresearch.track.ledger import Entry, ring_bytes
from tpresearch.train.build import planned
from tpresearch.train.device import choose_device
from tpresearch.train.loop import assemble, process_group
from tpresearch.train.trainer import Window
from tpresearch.verify.ranks import Ranks


def measured(world: World, cfg: Config) -> list[Entry]:
    """The ledger of this rank's second step."""
    sizes = validate(cfg, world.size)
    model, plan = planned(cfg, sizes)
    device = choose_device(cfg, world.local_rank, world.local_size)
    with process_group(device, world):
        mesh = build_mesh(sizes, device.type)
        trainer = assemble(cfg, model, plan, mesh, device, corpus())
        trainer.step(0, Window(), None)
        trainer.evaluate()  # which must leave nothing gathered
        counted = Counted(mesh, trainer.model, trainer.optimizer)
        trainer.step(1, Window(), counted)
        return counted.sent.entries()


def expected(cfg: Config, world: int) -> list[Entry] | None:
    model, plan = planned(cfg, validate(cfg, world))
    return expected_entries(model, plan, cfg)


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


@pytest.mark.parametrize("model", ["toy_mlp", "llama2_debug"])
@pytest.mark.parametrize(("plan", "world"), PLANS)
def test_measured_is_expected(ranks: Ranks, plan: str, world: int, model: str) -> None:
    cfg = in_two_parts(config(f"model={model}", f"parallel={plan}"), world)
    found = ranks.run(world, measured, cfg)[0]
    assert found == expected(cfg, world)
    assert (found == []) == (world == 1)


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel=fsdp_tp", "train.dtype=bfloat16"],
        ["parallel=fsdp_tp", "train.dtype=float64"],
        ["parallel=fsdp_tp", "model.vocab_size=263"],
        ["parallel=fsdp_tp", "parallel.loss_parallel=false"],
        ["parallel=fsdp_tp", "parallel.fsdp.reshard_after_forward=false"],
        ["parallel=fsdp_tp", "parallel.activation_checkpointing=selective"],
        ["parallel=tp", "parallel.loss_parallel=false"],
        ["parallel=fsdp", "parallel.activation_checkpointing=full"],
        ["parallel=fsdp", "optimizer=sgd", "train.dtype=bfloat16", "parallel.fsdp.reduce_dtype=bfloat16"],
    ],
    ids=" ".join,
)
def test_options_move_both_alike(ranks: Ranks, overrides: list[str]) -> None:
    cfg = config("model=llama2_debug", *overrides)
    assert ranks.run(4, measured, cfg)[0] == expected(cfg, 4)


def test_ring_bytes_by_hand() -> None:
    assert ring_bytes("all_gather", 1200, 4) == 900
    assert ring_bytes("reduce_scatter", 1200, 4) == 900
    assert ring_bytes("all_reduce", 1200, 4) == 1800
    assert ring_bytes("all_reduce", 1200, 1) == 0


def test_tensor_parallelism_sends_megatrons_four_all_reduces_a_layer(ranks: Ranks) -> None:
    """2 forward and 2 backward a layer, of b s h; beside them one for the embedding, one for the logits' input."""
    cfg = config("model=llama2_debug", "parallel=tp")
    found = {(e.phase, e.collective): (e.count, e.tensor_bytes) for e in ranks.run(2, measured, cfg)[0]}
    layers, bsh = 2, 8 * 16 * 64 * 4
    assert found["forward", "all_reduce"] == (2 * layers + 1, (2 * layers + 1) * bsh)
    assert found["backward", "all_reduce"] == (2 * layers + 1, (2 * layers + 1) * bsh)
    assert found["loss", "all_reduce"] == (3, 3 * 8 * 16 * 4)
    assert found["clip", "all_reduce"] == (1, 4)
    assert len(found) == 4
