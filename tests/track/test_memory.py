"""What a step really holds, by kind, against closed formulas; and the ledger itself on sums done by hand."""

from __future__ import annotations

import pytest
import torch
from composed import config, corpus, in_two_parts
from torch import nn

from tpresearch.config import Config
from tpresearch.config.validate import validate
from tpresearch.launch.world import World
from tpresearch.parallel.mesh import build_mesh
from tpresearch.track.counted import Counted
from tpresearch.track.expected_memory import expected_bytes
from tpresearch.track.memory import Held, MemoryLedger
from tpresearch.train.build import planned
from tpresearch.train.device import choose_device
from tpresearch.train.loop import assemble, process_group
from tpresearch.train.trainer import Window
from tpresearch.verify.ranks import Ranks


def measured(world: World, cfg: Config) -> dict[str, Held]:
    """What this rank held in its second step."""
    sizes = validate(cfg, world.size)
    model, plan = planned(cfg, sizes)
    device = choose_device(cfg, world.local_rank, world.local_size)
    with process_group(device, world):
        mesh = build_mesh(sizes, device.type)
        trainer = assemble(cfg, model, plan, mesh, device, corpus())
        trainer.step(0, Window(), None)
        counted = Counted(mesh, trainer.model, trainer.optimizer)
        trainer.step(1, Window(), counted)
        return {held.kind: held for held in counted.held.held()}


def expected(cfg: Config, world: int) -> dict[str, int | None]:
    model, plan = planned(cfg, validate(cfg, world))
    return expected_bytes(model, plan, cfg)


def agree(found: dict[str, Held], wanted: dict[str, int | None]) -> None:
    for kind in ("parameters", "gradients", "optimizer"):
        assert found[kind].most_bytes == wanted[kind], kind
    assert wanted["activations"]
    assert found["activations"].most_bytes == pytest.approx(wanted["activations"], rel=0.02)


@pytest.mark.parametrize("model", ["toy_mlp", "llama2_debug"])
@pytest.mark.parametrize(
    ("plan", "world"),
    [("none", 1), ("ddp", 2), ("tp", 2), ("sp", 2), ("fsdp", 2), ("hsdp", 4), ("fsdp_tp", 4), ("hsdp_tp", 4)],
)
def test_measured_is_expected(ranks: Ranks, plan: str, world: int, model: str) -> None:
    cfg = in_two_parts(config(f"model={model}", f"parallel={plan}", "train.global_batch_size=32"), world)
    agree(ranks.run(world, measured, cfg)[0], expected(cfg, world))


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel=none", "train.dtype=float64"],
        ["parallel=none", "parallel.activation_checkpointing=full"],
        ["parallel=none", "parallel.activation_checkpointing=selective"],
        ["parallel=none", "model.n_kv_heads=8", "model.n_layers=3"],
        ["parallel=none", "train.dtype=bfloat16"],
        ["parallel=none", "optimizer=sgd"],
        ["parallel=none", "optimizer=sgd", "optimizer.momentum=0.9"],
        ["parallel=sp", "parallel.activation_checkpointing=full"],
        ["parallel=tp", "parallel.loss_parallel=false"],
        ["parallel=fsdp", "parallel.fsdp.reshard_after_forward=false"],
        ["parallel=sp", "train.loss=sum"],
    ],
    ids=" ".join,
)
def test_options_move_both_alike(ranks: Ranks, overrides: list[str]) -> None:
    cfg = config("model=llama2_debug", *overrides)
    world = 1 if "parallel=none" in overrides else 2
    agree(ranks.run(world, measured, cfg)[0], expected(cfg, world))


def test_sharding_weights_keeps_activations_and_gathers_for_a_while(ranks: Ranks) -> None:
    """FSDP holds half of what is kept for the step, the same activations, and gathered blocks as temporaries."""
    alone, halves = (
        ranks.run(
            world, measured, config("model=llama2_debug", plan, f"train.global_batch_size={8 * world}")
        )[0]
        for world, plan in ((1, "parallel=none"), (2, "parallel=fsdp"))
    )
    for kind in ("gradients", "optimizer"):
        assert halves[kind].most_bytes == pytest.approx(alone[kind].most_bytes / 2, rel=0.001)
    assert halves["activations"].most_bytes == pytest.approx(alone["activations"].most_bytes, rel=0.001)
    block = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 192 + 2 * 64)
    assert halves["temporaries"].most_bytes - alone["temporaries"].most_bytes > block


def test_by_hand() -> None:
    """Two layers of 8 by 8: 100 rows of 8 saved by each matmul, and one more result that is dropped."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    rows = torch.ones(100, 8)
    memory = MemoryLedger(model, optimizer)
    with memory:
        with memory.mark("forward"):
            loss = model(rows * 2).sum()
        with memory.mark("backward"):
            loss.backward()
        memory.note_gradients()
        optimizer.step()
        optimizer.zero_grad()
    held = {kind.kind: kind for kind in memory.held()}
    matrix, activation = 8 * 8 * 4, 100 * 8 * 4
    assert held["parameters"].most_bytes == 2 * matrix
    assert held["gradients"].most_bytes == held["optimizer"].most_bytes == 2 * matrix
    assert held["activations"].most_bytes == 2 * activation + 4  # and the loss, a scalar
    assert held["optimizer"].at_peak_bytes == 0  # momentum comes last
    assert sum(kind.at_peak_bytes for kind in held.values()) >= 2 * matrix + 3 * activation
