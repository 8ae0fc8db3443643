"""What a step really sends, collective by collective, against closed formulas; and the formulas by hand."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support.composed import config
from support.counted_steps import FAKE, PLANS, counted_step, on_ranks
from support.nets import (
    Frozen,
    FrozenBlock,
    NotReentrant,
    OwnCheckpoints,
    Positions,
    Recurrent,
    Routed,
    model,
)

from tpresearch.config.axes import MeshSizes
from tpresearch.config.validate import validate
from tpresearch.config.world import World
from tpresearch.ledger.communication import CommunicationLedger
from tpresearch.ledger.entries import Entry, Event, entries_of, ring_bytes
from tpresearch.ledger.formulas import expected_entries
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh
from tpresearch.train.preflight import plan_model
from tpresearch.verify.ranks import Ranks


@pytest.mark.parametrize("model", ["toy_mlp", "llama2_debug"])
@pytest.mark.parametrize(("plan", "world"), PLANS)
def test_measured_is_expected(plan: str, world: int, model: str) -> None:
    found = counted_step(world, f"model={model}", f"parallel={plan}", two_parts=True)
    assert found.sent == found.expected.sent
    assert (found.sent == []) == (world == 1)


@pytest.mark.parametrize("plan", ["sp", "hsdp", "fsdp_tp"])
def test_real_ranks_send_what_the_fake_group_counts(ranks: Ranks, plan: str) -> None:
    step = 4, "model=llama2_debug", f"parallel={plan}"
    assert on_ranks(ranks, *step, two_parts=True).sent == counted_step(*step, two_parts=True).sent


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel=fsdp_tp", "train.dtype=bfloat16"],
        ["parallel=fsdp_tp", "train.dtype=float64"],
        ["parallel=sp", "train.dtype=bfloat16"],
        ["parallel=hsdp_tp", "train.dtype=bfloat16", "train.weights=bfloat16"],
        ["parallel=fsdp_tp", "model.vocab_size=263"],
        ["parallel=fsdp_tp", "parallel.loss_parallel=false"],
        ["parallel=fsdp_tp", "parallel.fsdp.reshard_after_forward=false"],
        ["parallel=fsdp_tp", "parallel.activation_checkpointing=selective"],
        ["parallel=tp", "parallel.loss_parallel=false"],
        ["parallel=fsdp_tp", "train.loss_chunk=24"],
        ["parallel=sp", "train.loss_chunk=null"],
        ["parallel=fsdp", "parallel.activation_checkpointing=full"],
        ["parallel=fsdp", "optimizer=sgd", "train.dtype=bfloat16", "parallel.fsdp.reduce_dtype=bfloat16"],
    ],
    ids=" ".join,
)
def test_options_move_both_alike(overrides: list[str]) -> None:
    found = counted_step(8 if "hsdp_tp" in overrides[0] else 4, "model=llama2_debug", *overrides)
    assert found.sent == found.expected.sent
    assert found.sent


def test_learned_positions_are_sent_once_whatever_the_rows() -> None:
    rule = "+model.plans.sp.positions={match: positions, style: rowwise, src: replicate, dst: 'shard:0'}"
    found = counted_step(2, *model(Positions), "parallel=sp", rule)
    assert found.sent == found.expected.sent
    assert found.sent


@pytest.mark.parametrize("plan", ["tp", "fsdp", "ddp"])
def test_no_formula_is_claimed_of_a_block_that_sends_each_time_it_runs(plan: str) -> None:
    found = counted_step(2, *model(Recurrent), f"parallel={plan}")
    assert found.expected.sent == (found.sent if plan == "ddp" else None)
    assert found.sent


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=llama2_debug", "parallel=tp", "parallel.activation_checkpointing=full"],
        ["model=llama2_debug", "parallel=sp", "parallel.activation_checkpointing=full"],
        ["model=llama2_debug", "parallel=sp", "model.plans.sp.attn_in.dst=[shard:1,null]"],
        [*model(FrozenBlock), "parallel=fsdp"],
        [*model(Frozen), "parallel=tp"],
        [*model(OwnCheckpoints), "parallel=tp"],
        [*model(NotReentrant), "parallel=tp"],
        [*model(Routed), "parallel=tp"],
        [*model(Routed), "parallel=fsdp"],
    ],
    ids=lambda overrides: " ".join(overrides[1:]),
)
def test_no_formula_is_claimed_of_what_may_be_sent_again_or_left_out(overrides: list[str]) -> None:
    cfg = config(*overrides)
    assert expected_entries(*plan_model(cfg, validate(cfg, 2)), cfg) is None


def test_ring_bytes_by_hand() -> None:
    assert ring_bytes("all_gather", 1200, 4) == 900
    assert ring_bytes("reduce_scatter", 1200, 4) == 900
    assert ring_bytes("all_reduce", 1200, 4) == 1800
    assert ring_bytes("all_reduce", 1200, 1) == 0
    kind = "tp", "forward", "dtensor", "all_gather"
    assert entries_of([Event(*kind, 1200, 4), Event(*kind, 400, 4)]) == [Entry(*kind, 2, 1600, 1200)]


def test_tensor_parallelism_sends_megatrons_four_all_reduces_a_layer() -> None:
    """2 forward and 2 backward a layer, of b s h; beside them one for the embedding, one for the logits' input."""
    entries = counted_step(2, "model=llama2_debug", "parallel=tp").sent
    found = {(e.phase, e.issuer, e.collective): (e.count, e.tensor_bytes) for e in entries}
    layers, bsh = 2, 8 * 16 * 64 * 4
    assert found == {
        ("forward", "dtensor", "all_reduce"): (2 * layers + 1, (2 * layers + 1) * bsh),
        ("backward", "dtensor", "all_reduce"): (2 * layers + 1, (2 * layers + 1) * bsh),
        ("loss", "loss", "all_reduce"): (3, 3 * 8 * 16 * 4),
        ("clip", "clip", "all_reduce"): (1, 4),
    }


@pytest.mark.parametrize("plan", ["sp", "fsdp_tp"])
def test_norms_gradients_are_summed_once_a_step_and_logits_are_never_gathered(plan: str) -> None:
    """Of two micro-batches too: 5 norms of 64, of which each rank of FSDP sums its shard."""
    found = counted_step(4, "model=llama2_debug", f"parallel={plan}", two_parts=True)
    shards = 2 if plan == "fsdp_tp" else 1
    sums = [e for e in found.sent if e.issuer == "step"]
    assert [(e.axis, e.phase, e.collective, e.count, e.tensor_bytes) for e in sums] == [
        ("tp", "backward", "all_reduce", 1, 5 * 64 * 4 // shards)
    ]
    loss = [(e.collective, e.count) for e in found.sent if e.phase == "loss"]
    assert loss == [("all_reduce", 6)]  # three for each micro-batch


def test_each_entry_says_who_issued_it() -> None:
    found = counted_step(4, "model=llama2_debug", "parallel=fsdp_tp", two_parts=True)
    assert {(e.axis, e.issuer) for e in found.sent} == {
        *(("tp", issuer) for issuer in ("dtensor", "loss", "step", "clip")),
        *(("dp_shard", issuer) for issuer in ("fsdp", "clip")),
    }


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_what_a_style_of_ones_own_may_send_is_counted() -> None:
    """By a list for each rank, or several tensors at once."""
    with process_group(FAKE, World(size=4, local_size=4)):
        mesh = build_mesh(MeshSizes(tp=4), "cpu")
        group, ledger = mesh.get_group("tp"), CommunicationLedger(mesh)
        x, part, whole = torch.zeros(8), torch.zeros(2), torch.zeros(32)
        with ledger, ledger.phase("forward"):
            dist.all_to_all([part.clone() for _ in range(4)], list(x.chunk(4)), group=group)
            dist.all_to_all_single(x.clone(), x, group=group)
            dist.all_gather([part.clone() for _ in range(4)], part, group=group)
            dist.reduce_scatter(part, list(x.chunk(4)), group=group)
            for send in (
                lambda: dist.all_reduce(x, group=group),
                lambda: dist.all_gather_into_tensor(whole, x, group=group),
                lambda: dist.reduce_scatter_tensor(part, x, group=group),
            ):
                with dist._coalescing_manager(group):
                    send()
                    send()
            dist.send(x, dst=1, group=group)
            dist.recv(x, src=1, group=group)
            dist.reduce(x, dst=0, group=group)
            dist.gather(part, [part.clone() for _ in range(4)], dst=0, group=group)
            dist.scatter(part, list(x.chunk(4)), src=0, group=group)
            dist.broadcast(x, src=0, group=group)
    assert [(e.axis, e.collective, e.tensor_bytes) for e in ledger.events] == [
        *(("tp", name, 8 * 4) for name in ("all_to_all", "all_to_all", "all_gather", "reduce_scatter")),
        ("tp", "all_reduce", 2 * 8 * 4),
        ("tp", "all_gather", 2 * 32 * 4),
        ("tp", "reduce_scatter", 2 * 8 * 4),
        *(("tp", name, 8 * 4) for name in ("send", "reduce", "gather", "scatter", "broadcast")),
    ]
    sent = {entry.collective: entry.sent_bytes for entry in entries_of(ledger.events)}
    assert (sent["send"], sent["reduce"], sent["gather"], sent["scatter"]) == (32, 24, 24, 24)


def test_collectives_as_compiled_code_issues_them_are_counted() -> None:
    """In place, into a buffer, several at once."""
    with process_group(FAKE, World(size=4, local_size=4)):
        mesh = build_mesh(MeshSizes(tp=4), "cpu")
        group, ledger = mesh.get_group("tp").group_name, CommunicationLedger(mesh)
        ops, x, whole = torch.ops._c10d_functional, torch.zeros(8), torch.zeros(32)
        with ledger, ledger.phase("forward"):
            issued = [
                ops.all_reduce_(x, "sum", group),
                *ops.all_reduce_coalesced_([x, x.clone()], "sum", group),
                ops.all_gather_into_tensor_out(x, 4, group, out=whole),
                *ops.reduce_scatter_tensor_coalesced([x, x], "sum", 4, group),
            ]
        for tensor in issued:
            ops.wait_tensor(tensor)
    assert [(e.axis, e.issuer, e.collective, e.tensor_bytes) for e in ledger.events] == [
        ("tp", "dtensor", "all_reduce", 8 * 4),
        ("tp", "dtensor", "all_reduce", 2 * 8 * 4),
        ("tp", "dtensor", "all_gather", 32 * 4),
        ("tp", "dtensor", "reduce_scatter", 2 * 8 * 4),
    ]


def test_async_tensor_parallelism_is_counted_in_its_fused_matmuls() -> None:
    """They move what they multiply: on the meta device, since they run on CUDA alone."""
    import torch.distributed._symmetric_memory

    here = World(size=4, local_size=4)
    with process_group(FAKE, here):
        mesh = build_mesh(MeshSizes(tp=4), "cpu")
        group = mesh.get_group("tp").group_name
        ledger = CommunicationLedger(mesh)
        x, w = (torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in ((8, 16), (16, 32)))
        with ledger, ledger.phase("forward"):
            torch.ops.symm_mem.fused_all_gather_matmul(x, [w], 0, group)
            torch.ops.symm_mem.fused_matmul_reduce_scatter(x, w, "sum", 0, group)
    found = {(e.axis, e.issuer, e.collective): (e.count, e.tensor_bytes) for e in entries_of(ledger.events)}
    assert found == {
        ("tp", "dtensor", "all_gather"): (1, 4 * 8 * 16 * 2),
        ("tp", "dtensor", "reduce_scatter"): (1, 8 * 32 * 2),
    }
