"""What a step really holds, by kind, against closed formulas; and the ledger itself on sums done by hand."""

from __future__ import annotations

import pytest
import torch
from support.composed import config
from support.counted_steps import FAKE, PLANS, count, counted_step, on_ranks
from support.nets import FrozenBlock, Scaled, model
from torch import nn

from tpresearch.config.validate import validate
from tpresearch.config.world import World
from tpresearch.ledger.entries import StepLedger
from tpresearch.ledger.memory import MemoryLedger
from tpresearch.ledger.memory_formulas import expected_memory
from tpresearch.train.preflight import plan_model
from tpresearch.verify.ranks import Ranks


def agree(found: StepLedger) -> None:
    held, wanted = found.most_bytes, found.expected.held
    for kind in ("parameters", "gradients", "optimizer", "activations"):
        assert held[kind] == wanted[kind], kind


@pytest.mark.parametrize("model", ["toy_mlp", "llama2_debug"])
@pytest.mark.parametrize(("plan", "world"), PLANS)
def test_measured_is_expected(plan: str, world: int, model: str) -> None:
    agree(counted_step(world, f"model={model}", f"parallel={plan}", two_parts=True))


@pytest.mark.parametrize(
    ("overrides", "device"),
    [
        (["parallel=none", "train.dtype=float64"], "cuda"),
        (["parallel=tp", "parallel.compile=true"], "cpu"),
        (["parallel=tp", "parallel.activation_checkpointing=selective"], "cpu"),
        (["parallel=none", "parallel.compile=true", "parallel.activation_checkpointing=budget"], "cpu"),
        (["parallel=none", "train.dtype=bfloat16", "train.float8=rowwise"], "cuda"),
    ],
)
def test_of_activations_that_do_not_follow_from_shapes_no_formula_is_claimed(
    overrides: list[str], device: str
) -> None:
    assert expected_activations(*overrides, device=device) == 0


def expected_activations(*overrides: str, device: str = "cpu") -> int:
    """0 where no formula is claimed."""
    cfg = config("model=llama2_debug", *overrides)
    sizes = validate(cfg, 1 if "parallel=none" in overrides else 2)
    return expected_memory(*plan_model(cfg, sizes), cfg, device)["activations"] or 0


def test_selective_checkpointing_keeps_what_row_wise_layers_have_summed_and_not_their_parts() -> None:
    """Of `wo` of 2 blocks each rank's part is of all 8 x 16 tokens, 64 numbers each; backward needs no output of `w2`. A style of the
    user's own may leave a sum partial, so that parts are kept then."""
    sp = ("model=llama2_debug", "parallel=sp", "parallel.activation_checkpointing=selective")
    kept = counted_step(4, *sp).most_bytes["activations"]
    own = "+model.plans.sp.own={match: layers.*, _target_: support.nets.NoStyle}"
    assert counted_step(4, *sp, own).most_bytes["activations"] - kept == 2 * 8 * 16 * 64 * 4
    assert kept < counted_step(4, *sp[:2]).most_bytes["activations"]


def test_what_a_gpu_and_a_compiled_block_keep_by_hand() -> None:
    """Of 8 rows of 16 tokens; 2 blocks and 5 norms of 64, with keys and values of 32, and an MLP of 192."""
    on_cpu = expected_activations("parallel=none")
    on_gpu = expected_activations("parallel=none", device="cuda")
    compiled = expected_activations("parallel=none", "parallel.compile=true")
    # A GPU's norm keeps its input alone, and its attention in float32 repeated keys and values.
    assert on_cpu - on_gpu == 8 * 16 * 4 * (5 * 64 - 2 * 2 * (64 - 32))
    # It keeps neither normalised inputs nor one of four tensors of the MLP, and the sines of each position once.
    assert on_cpu - compiled == 2 * (8 * 16 * 4 * (2 * 64 + 192) - 16 * 4 * 8)


@pytest.mark.parametrize("loss", ["train.loss_chunk=null", "train.loss_chunk=2048", "train.loss=sum"])
@pytest.mark.parametrize(("plan", "world"), [("none", 1), ("tp", 2), ("fsdp_tp", 4)])
def test_of_many_small_micro_batches_the_indices_are_a_part(plan: str, world: int, loss: str) -> None:
    """64 of one row: tokens and targets of all, up to a fifth of the activations of one."""
    agree(
        counted_step(
            world,
            "model=toy_mlp",
            f"parallel={plan}",
            loss,
            f"train.global_batch_size={64 * max(1, world // 2)}",
            "train.micro_batch_size=1",
        )
    )


@pytest.mark.parametrize("blocks", ["model=toy_mlp", "model.blocks=[layers.*.attention]"])
def test_of_other_recomputed_blocks_than_layers_no_formula_is_claimed(blocks: str) -> None:
    found = counted_step(1, blocks, "parallel=none", "parallel.activation_checkpointing=full")
    assert found.expected.held["activations"] is None


def test_of_a_style_of_ones_own_no_formula_is_claimed() -> None:
    """Nobody knows which part of its parameters a rank has."""
    own = "_target_: torch.distributed.tensor.parallel.ColwiseParallel"
    rules = ("~model.plans.tp.in_proj", f"+model.plans.tp.own={{match: mlp.in_proj, {own}}}")
    found = counted_step(2, "model=toy_mlp", "parallel=tp", *rules)
    assert not any(found.expected.held.values())
    assert found.expected.sent is None


@pytest.mark.parametrize("kind", [FrozenBlock, Scaled])
def test_of_other_models_and_of_frozen_weights_no_formula_is_claimed(kind: type[nn.Module]) -> None:
    """What another forward keeps, or a backward that stops early, does not follow from the class that a model inherits."""
    found = counted_step(2, *model(kind), "parallel=tp")
    assert found.expected.held["activations"] is None
    for kind_of_memory in ("parameters", "gradients", "optimizer"):
        assert found.most_bytes[kind_of_memory] == found.expected.held[kind_of_memory]


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel=none", "train.dtype=float64"],
        ["parallel=none", "parallel.activation_checkpointing=full"],
        ["parallel=none", "parallel.activation_checkpointing=selective"],
        ["parallel=none", "model.n_kv_heads=8", "model.n_layers=3"],
        ["parallel=none", "train.dtype=bfloat16"],
        ["parallel=sp", "train.dtype=bfloat16"],
        ["parallel=none", "train.dtype=bfloat16", "optimizer.split_masters=true"],
        ["parallel=tp", "train.dtype=bfloat16", "optimizer.split_masters=true"],
        ["parallel=none", "train.dtype=bfloat16", "train.weights=bfloat16"],
        ["parallel=fsdp_tp", "train.dtype=bfloat16", "train.weights=bfloat16"],
        ["parallel=none", "train.loss_chunk=null"],
        ["parallel=sp", "train.loss_chunk=null"],
        ["parallel=ddp"],
        ["parallel=ddp", "model.tied=true"],
        ["parallel=none", "model.tied=true"],
        ["parallel=tp", "model.tied=true", "train.dtype=bfloat16", "train.weights=bfloat16"],
        ["parallel=ddp", "train.dtype=bfloat16"],
        ["parallel=ddp", "train.dtype=bfloat16", "train.weights=bfloat16"],
        ["parallel=none", "optimizer.moment_dtype=bfloat16"],
        ["parallel=none", "optimizer=sgd"],
        ["parallel=none", "optimizer=sgd", "optimizer.momentum=0.9"],
        ["parallel=sp", "parallel.activation_checkpointing=full"],
        ["parallel=tp", "parallel.loss_parallel=false"],
        ["parallel=fsdp", "parallel.fsdp.reshard_after_forward=false"],
    ],
    ids=" ".join,
)
def test_options_move_both_alike(overrides: list[str]) -> None:
    world = {"parallel=none": 1, "parallel=fsdp_tp": 4}.get(overrides[0], 2)
    agree(counted_step(world, "model=llama2_debug", *overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=toy_mlp"],
        ["model=llama2_debug"],
        ["model=llama2_debug", "parallel.fsdp.reduce_dtype=bfloat16"],
        ["model=llama2_debug", "model.tied=true"],
    ],
    ids=" ".join,
)
def test_weights_in_bfloat16_accumulate_over_replicas(overrides: list[str]) -> None:
    """Summed in float32, each of their gradients is replaced by its sum; the output layer's is made with the loss."""
    words = "parallel=ddp", "train.dtype=bfloat16", "train.weights=bfloat16"
    agree(counted_step(2, *overrides, *words, two_parts=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_that_matmuls_add_to_are_as_many(dtype: str) -> None:
    words = "parallel=none", f"train.dtype={dtype}", "train.micro_batch_size=4"
    agree(counted_step(1, "model=llama2_debug", *words, "parallel.gradient_accumulation_fusion=true"))


def test_shapes_that_dtensor_tells_of_an_op_it_meets_are_not_held() -> None:
    """SGD's momentum is multiplied from the second step on, which is the counted one: for that DTensor makes fake weights, whole."""
    words = "model=toy_mlp", "model.hidden_dim=998", "train.global_batch_size=1", "optimizer.momentum=0.9"
    first, again = (
        count(World(size=2, local_size=2), config("parallel=tp", "optimizer=sgd", *words), FAKE)
        for _ in range(2)
    )
    assert first.held == again.held


@pytest.mark.parametrize("plan", ["sp", "hsdp", "fsdp_tp"])
def test_real_ranks_hold_what_the_fake_group_counts(ranks: Ranks, plan: str) -> None:
    """Temporaries apart: a gathered block lives for a while that depends on when its gather ends."""
    step = 4, "model=llama2_debug", f"parallel={plan}"
    real, fake = (
        {kind: size for kind, size in found.most_bytes.items() if kind != "temporaries"}
        for found in (on_ranks(ranks, *step, two_parts=True), counted_step(*step, two_parts=True))
    )
    # A number per token or two, until gloo's thread lets go of their sums.
    late = real["activations"] - fake["activations"]
    assert 0 <= late <= 256, late
    assert real | {"activations": 0} == fake | {"activations": 0}


def test_sharding_weights_keeps_activations_and_gathers_for_a_while(ranks: Ranks) -> None:
    """FSDP holds half of what is kept for the step, the same activations, and gathered blocks as temporaries."""
    steps = (
        on_ranks(
            ranks,
            world,
            "model=llama2_debug",
            plan,
            f"train.global_batch_size={8 * world}",
            "train.loss_chunk=null",
        )
        for world, plan in ((1, "parallel=none"), (2, "parallel=fsdp"))
    )
    alone, halves = (step.most_bytes for step in steps)
    for kind in ("gradients", "optimizer"):
        assert halves[kind] == pytest.approx(alone[kind] / 2, rel=0.001)
    assert halves["activations"] == pytest.approx(alone["activations"], rel=0.001)
    block = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 192 + 2 * 64)
    assert halves["temporaries"] - alone["temporaries"] > block


def test_by_hand() -> None:
    """Two layers of 8 by 8: 100 rows of 8 saved by each matmul, and one more result that is dropped."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    rows = torch.ones(100, 8)
    memory = MemoryLedger(model, optimizer)
    with memory:
        with memory.phase("forward"):
            loss = model(rows * 2).sum()
        with memory.phase("backward"):
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


def test_storages_that_grow_and_shrink_by_hand() -> None:
    """As those of gathered weights do: one that begins before the step, and one within it."""
    model = nn.Linear(1, 1)
    early, resize = torch.empty(500), torch.UntypedStorage.resize_
    memory = MemoryLedger(model, torch.optim.SGD(model.parameters()))
    with memory:
        gathered = torch.empty(1000)
        early.untyped_storage().resize_(0)
        gathered.untyped_storage().resize_(0)
        gathered.untyped_storage().resize_(8000)
    assert torch.UntypedStorage.resize_ is resize
    held = {kind.kind: kind for kind in memory.held()}
    assert held["temporaries"].most_bytes == held["temporaries"].at_peak_bytes == 8000
    assert held["parameters"].at_peak_bytes == 2 * 4


@pytest.mark.parametrize(("phase", "counted"), [("forward", 4000), ("backward", 0)])
def test_a_view_of_what_no_op_has_made_counts_in_forward_alone(phase: str, counted: int) -> None:
    """There it is a micro-batch's part of the rows; in backward gloo splits its own copy of a gradient, where that is waited for."""
    model, made = nn.Linear(1, 1), torch.empty(1000)
    memory = MemoryLedger(model, torch.optim.SGD(model.parameters()))
    with memory, memory.phase(phase):
        parts = made.split(500)
    assert len(parts) == 2
    assert {kind.kind: kind.most_bytes for kind in memory.held()}["temporaries"] == counted
