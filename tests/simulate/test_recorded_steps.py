"""The real step on fake ranks: its ledgers are those of the step that computes, and shallow models tell of deep ones."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch.distributed as dist
from support.composed import config
from support.counted_steps import PLANS, counted_step
from support.marks import exhaustive
from support.nets import Recurrent, Unused, model
from torch import Tensor, nn

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config
from tpresearch.config.validate import micro_batches, validate
from tpresearch.launch.composition import read_option
from tpresearch.ledger.formulas import expected_entries
from tpresearch.models import Head
from tpresearch.models.llama2 import FeedForward, Llama2
from tpresearch.parallel.device import CPU
from tpresearch.plan.meta import meta_model
from tpresearch.simulate.cluster import parse_cluster
from tpresearch.simulate.depth import depth_of, recording
from tpresearch.simulate.device_memory import peak_moment
from tpresearch.simulate.fake_ranks import fake_mesh
from tpresearch.simulate.fake_step import record
from tpresearch.simulate.kernels import _deduplicate_casts
from tpresearch.simulate.prediction import predict
from tpresearch.simulate.prices import moved_bytes
from tpresearch.simulate.trace import Op, Trace
from tpresearch.train.preflight import plan_model
from tpresearch.train.speed import Speed


def at_depth(cfg: Config, depth: int) -> Config:
    args = {**cfg.model.args, "n_layers": depth}
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, args=args))


def recorded(cfg: Config, world: int) -> Trace:
    return record(cfg, validate(cfg, world))


def equal_to_formulas(cfg: Config, world: int) -> None:
    sizes = validate(cfg, world)
    expected = expected_entries(*plan_model(cfg, sizes), cfg)
    assert expected
    assert recording(cfg, sizes).entries(micro_batches(cfg, sizes)) == expected


@pytest.mark.parametrize(("plan", "world"), PLANS)
def test_a_simulated_step_sends_what_the_formulas_say(plan: str, world: int) -> None:
    """In four micro-batches, of which two or three are recorded."""
    rows = {"none": 4, "tp": 4, "sp": 4, "fsdp_tp": 8, "hsdp_tp": 8}.get(plan, 16)
    batch = (f"train.global_batch_size={rows}", "train.micro_batch_size=1")
    if world == 1:
        sizes = validate(cfg := config("model=llama2_debug", f"parallel={plan}", *batch), world)
        assert record(cfg, sizes).entries(4) == []
    else:
        equal_to_formulas(config("model=llama2_debug", f"parallel={plan}", *batch), world)


def test_thousands_of_ranks_send_what_the_formulas_say() -> None:
    batch = "train.global_batch_size=4096"
    equal_to_formulas(config("model=llama2_debug", "parallel=hsdp_tp", "mesh.tp=2", batch), 8192)


def test_meshes_of_which_a_part_is_equal_are_recorded_one_after_another() -> None:
    """tp=4 of one mesh is that of another to DTensor's caches, and has other process groups."""
    for shape in (
        ("dp_replicate=2", "dp_shard=2"),
        ("dp_replicate=4", "dp_shard=1"),
        ("dp_replicate=2", "dp_shard=2"),
    ):
        sizes = [f"mesh.{size}" for size in (*shape, "tp=4")]
        equal_to_formulas(config("parallel=hsdp_tp", *sizes, "train.global_batch_size=32"), 16)


def test_a_mesh_that_is_entered_within_itself_is_the_same_and_another_is_not() -> None:
    few, more = (
        validate(config("model=toy_mlp", "parallel=fsdp_tp", "mesh.tp=2"), world) for world in (4, 8)
    )
    with fake_mesh(few) as outer:
        with fake_mesh(few) as inner:
            assert inner is outer
        assert outer["tp"] == outer["tp"] != outer["dp_shard"]
        assert dist.get_world_size() == 4
    with fake_mesh(more) as mesh:
        assert mesh != outer
        assert mesh.shape == (1, 4, 2)


def test_an_equal_mesh_with_groups_of_its_own_finds_none_of_a_recorded_one() -> None:
    """Recording makes rank 0's groups alone, whose names then are those of other axes."""
    words = ("model=toy_mlp", "parallel=hsdp_tp", "train.seed=5")
    equal_to_formulas(cfg := config(*words), 4)
    assert counted_step(4, *words).sent == expected_entries(*plan_model(cfg, validate(cfg, 4)), cfg)


@pytest.mark.exhaustive
@pytest.mark.parametrize("plan", [("fsdp_tp", "mesh.tp=8"), ("hsdp_tp", "mesh.tp=8"), ("fsdp",)])
def test_llama2_70b_on_65536_ranks_in_20_seconds_of_processor_time(plan: tuple[str, ...]) -> None:
    before = time.process_time()
    words = (f"parallel={plan[0]}", *plan[1:], "train.dtype=bfloat16", "data.seq_len=4096")
    equal_to_formulas(config("model=llama2_70b", *words, "train.global_batch_size=65536"), 65_536)
    assert time.process_time() - before < 20


@pytest.mark.parametrize("model", ["toy_mlp", "llama2_debug"])
@pytest.mark.parametrize(("plan", "world"), [("none", 1), ("fsdp_tp", 4), ("ddp", 4)])
def test_a_simulated_step_holds_what_the_step_that_computes_does(plan: str, world: int, model: str) -> None:
    """To the byte; on a CPU also what the ops hold of which a GPU makes one kernel, as of a norm."""
    words = (f"model={model}", f"parallel={plan}")
    held = {use.kind: use.at_peak_bytes for use in counted_step(world, *words).held}
    assert peak_moment(recorded(config(*words), world).memory) == held
    assert sum(held.values()) > 0


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_what_is_held_most_where_partial_gradients_are_summed_is_told(micro_batches: int) -> None:
    """An embedding's gradient under tensor parallelism, which has all rows until then; that is after the last micro-batch, and in none."""
    words = ("model=toy_mlp", "parallel=sp", "model.hidden_dim=16", "train.micro_batch_size=1")
    step = (*words, f"train.global_batch_size={micro_batches}")
    held = {use.kind: use.at_peak_bytes for use in counted_step(2, *step).held}
    told = peak_moment(recorded(config(*words, "train.global_batch_size=2"), 2).memory, micro_batches)
    assert held["temporaries"] > 4 * 260 * 64
    for kind in ("parameters", "gradients", "optimizer"):
        assert told[kind] == held[kind]


@pytest.mark.parametrize("plan", ["ddp", "fsdp"])
def test_a_layer_that_no_forward_reaches_is_no_op_on_values(plan: str) -> None:
    """It sends what it does in training, where each replica finds that none has a gradient of it."""
    words = (*model(Unused), f"parallel={plan}")
    assert recorded(config(*words), 2).entries(1) == counted_step(2, *words).sent


def test_mfu_counts_a_block_that_runs_three_times_as_in_training() -> None:
    cfg = config(*model(Recurrent), "parallel=none")
    sizes = validate(cfg, 1)
    trained = Speed.of(*plan_model(cfg, sizes), cfg, CPU)
    assert recording(cfg, sizes).flops_per_token == trained.flops_per_token


def test_norms_keep_on_a_device_what_one_kernel_keeps() -> None:
    """Per norm and token: its input, its output and one scale; the ledger of a CPU has the normalised input too."""
    words = ("model=llama2_debug", "model.n_kv_heads=8", "parallel=none", "train.global_batch_size=2")
    cfg = dataclasses.replace(config(*words), cluster=read_option("cluster", "h100_dgx"))
    on_cpu = counted_step(1, *words).most_bytes["activations"]
    tokens, width, norms = 2 * cfg.data.seq_len, 64, 2 * 2 + 1
    memory = recorded(cfg, 1).memory
    simulated = max(size for name, size in memory.items() if name.endswith("/activations"))
    assert on_cpu - simulated >= norms * tokens * width * 4


@pytest.mark.parametrize("plan", ["fsdp_tp", exhaustive("hsdp")])
def test_a_deep_model_is_told_from_shallow_ones(plan: str) -> None:
    """Five blocks from two and three: bytes sent are exact, and so is what is counted per kind of op."""
    cfg = at_depth(config("model=llama2_debug", f"parallel={plan}", "train.micro_batch_size=1"), 5)
    sizes = validate(cfg, 4)
    told = recording(cfg, sizes)
    whole = record(cfg, sizes)

    def moved(trace: Trace) -> dict[str, float]:
        return {
            kind: sum(op.bytes_moved for op in trace.ops(2) if op.kind == kind) for kind in ("gemm", "other")
        }

    assert told.at_full_depth(moved) == pytest.approx(moved(whole), rel=1e-12)
    assert told.at_full_depth(lambda trace: trace.memory) == pytest.approx(whole.memory, rel=1e-3)
    assert told.entries(4) == whole.entries(4)
    assert sorted(told.traces) == [2, 3, 4]


def test_where_two_and_three_blocks_do_not_tell_three_and_four_may() -> None:
    """Time that one block hides in part and two hide whole."""
    cfg = at_depth(config("model=llama2_debug", "parallel=fsdp"), 8)
    told = recording(
        cfg, validate(cfg, 2), lambda cfg, *_: Trace((), (), {"blocks": cfg.model.args["n_layers"]})
    )

    def seconds(trace: Trace) -> dict[str, float]:
        return {"step": 10.0 * trace.memory["blocks"] + max(0.0, 7.0 - 3 * trace.memory["blocks"])}

    assert told.at_full_depth(seconds, check=False)["step"] == pytest.approx(75)
    assert told.at_full_depth(seconds)["step"] == pytest.approx(80)
    assert sorted(told.traces) == [2, 3, 4, 5]


def test_a_wait_that_each_block_shortens_is_not_shorter_than_none() -> None:
    """At the end of a step, whose ops are short: with more blocks the host is further ahead."""
    plain = read_option("cluster", "h200_dgx")
    plain["numbers"]["launch_us"]["value"] = 6
    cfg = at_depth(config("model=llama2_debug", "parallel=none", "data.seq_len=128"), 12)
    cfg = dataclasses.replace(cfg, cluster=plain)
    whole = dataclasses.replace(recording(cfg, sizes := validate(cfg, 1)), setting=None)
    one, other = (predict(each, parse_cluster(plain)) for each in (recording(cfg, sizes), whole))
    assert one.step_time_s == pytest.approx(other.step_time_s, rel=2e-3)
    assert one.time_s["waiting for the host"] == 0
    assert sum(one.time_s.values()) == pytest.approx(one.step_time_s)


def test_where_depth_does_not_tell_the_whole_model_is_recorded() -> None:
    cfg = at_depth(config("model=llama2_debug", "parallel=none"), 6)
    told = recording(cfg, validate(cfg, 1))
    assert (
        told.at_full_depth(lambda trace: {"x": float(len(trace.end) ** 3)})["x"]
        == len(told.traces[6].end) ** 3
    )
    deeper = told.at_full_depth(lambda trace: {"x": 3.0} if trace is told.traces.get(3) else {}, check=False)
    assert deeper == {"x": 4 * 3.0}, "none in the shallower"


def test_the_setting_of_depth_is_found() -> None:
    for cfg, found in (
        (at_depth(config("model=llama2_debug"), 5), (5, "n_layers")),
        (config("model=toy_mlp"), (1, None)),
    ):
        assert depth_of(cfg, meta_model(cfg.model)) == found


class Through(nn.Module):
    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        return x


class Hybrid(Llama2):
    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        for index, layer in enumerate(self.layers):
            if index % 4 != 3:
                layer.set_submodule("attention", Through())


class WideFirst(Llama2):
    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.layers[0].set_submodule("feed_forward", FeedForward(sizes["dim"], 512, 0.02, 0.02))


@pytest.mark.parametrize(("name", "setting"), [("Hybrid", None), ("WideFirst", "n_layers")])
def test_blocks_that_differ_are_all_recorded_but_for_the_first(name: str, setting: str | None) -> None:
    """Two to four of the hybrid's blocks do not lie on a line, but three to five do: it has attention in each fourth alone."""
    cfg = at_depth(config("model=llama2_debug"), 9)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, target=f"{__name__}.{name}"))
    assert depth_of(cfg, meta_model(cfg.model)) == (9, setting)


class Asking(Llama2):
    def forward(self, tokens: Tensor, head: Head | None = None) -> Tensor:
        if tokens.is_meta:
            return super().forward(tokens, head)
        return super().forward(tokens, head) * tokens.max().item()


class InNumpy(Llama2):
    def forward(self, tokens: Tensor, head: Head | None = None) -> Tensor:
        if tokens.is_meta:
            return super().forward(tokens, head)
        return super().forward(tokens, head) * float(tokens.numpy().max())


@pytest.mark.parametrize(("name", "op"), [("Asking", "aten._local_scalar_dense"), ("InNumpy", ".numpy() ")])
def test_a_model_that_asks_for_values_is_refused_by_the_op(name: str, op: str) -> None:
    cfg = config("model=llama2_debug", "parallel=none")
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, target=f"{__name__}.{name}"))
    with pytest.raises(ConfigError, match=f"^model=llama2_debug: {re.escape(op)}.*depends on the values"):
        recorded(cfg, 1)


@pytest.mark.parametrize("plan", [("none", 1), ("fsdp_tp", 8, "mesh.tp=2")])
def test_linear_layers_in_float8_are_recorded_as_they_run_and_casts_once_where_compiled(
    plan: tuple[str, int, str],
) -> None:
    """Of 14 linear layers in two blocks, forward and the gradients of input and weight, each with both factors cast. Of 7
    linear layers of a block, 3, 1, 2 and 1 have the same input."""
    name, world, *mesh = plan
    words = (
        "train.dtype=bfloat16",
        "train.float8=tensorwise",
        "train.global_batch_size=4",
        "data.seq_len=64",
    )
    trace = recorded(config("model=llama2_debug", f"parallel={name}", *words, *mesh), world)
    part = trace.micro_batches[0]
    matmuls = [op for op in part if op.name == "_scaled_mm"]
    assert {(op.kind, op.element) for op in matmuls} == {("gemm", 1)}
    assert [sum(op.phase == phase for op in matmuls) for phase in ("forward", "backward")] == [14, 28]
    assert not any(op.name == "mm" for op in part if op.phase != "loss")

    def scales(ops: Sequence[Op], phase: str) -> int:
        return sum(op.name == "abs" for op in ops if op.phase == phase)

    once = _deduplicate_casts(part)
    assert (scales(part, "forward"), scales(once, "forward")) == (28, 22)
    assert scales(part, "backward") == 56
    assert scales(once, "backward") == 14  # of output gradients: those of inputs and weights are known
    made = {number for op in once for number, _ in op.writes} | {n for op in part for n, _ in op.reads}
    assert all(number in made for op in once for number, _ in op.reads)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_selective_checkpointing_repeats_no_matmul_in_float8_whose_output_ranks_sum(recipe: str) -> None:
    words = ("train.dtype=bfloat16", f"train.float8={recipe}", "parallel.activation_checkpointing=selective")
    trace = recorded(config("model=llama2_debug", "parallel=tp", *words, "data.seq_len=64"), 2)
    matmuls = [op.phase for op in trace.micro_batches[0] if op.name == "_scaled_mm"]
    assert [matmuls.count(phase) for phase in ("forward", "backward")] == [14, 28]


@pytest.mark.parametrize(("dtype", "element"), [("float32", 4), ("bfloat16", 2)])
def test_matmuls_that_add_to_a_gradient_take_the_place_of_two_kernels(dtype: str, element: int) -> None:
    words = "model=llama2_debug", "parallel=none", "train.micro_batch_size=2", f"train.dtype={dtype}"
    plain, fused = (
        recorded(config(*words, f"parallel.gradient_accumulation_fusion={fuses}"), 1).micro_batches[-1]
        for fuses in (False, True)
    )
    adding = [op for op in fused if op.name == "add_product_"]
    assert {(op.kind, op.element) for op in adding} == {("gemm", element)}
    assert [op.phase for op in adding] == ["loss"] + ["backward"] * 2 * 7
    matmuls = [sorted(op.shape for op in ops if op.kind == "gemm") for ops in (plain, fused)]
    assert matmuls[0] == matmuls[1]
    additions = [sum(op.name == "add_" for op in ops) for ops in (plain, fused)]
    assert additions[0] - additions[1] == 2 * 7 + 2  # and the embedding's, of which only rows are added
    h, f = 64, max(op.shape[1] for op in adding)
    widest = next(op for op in adding if op.shape[1:3] == (f, h))
    tokens = 2 * 16
    assert moved_bytes(widest) == 2 * f * h * 4 + tokens * (h + f) * element


@pytest.mark.parametrize("chunk", [4, 32])
def test_the_loss_multiplies_as_much_in_any_number_of_chunks(chunk: int) -> None:
    words = "model=llama2_debug", "parallel=none", "train.micro_batch_size=2", f"train.loss_chunk={chunk}"
    ops = recorded(config(*words), 1).micro_batches[-1]
    multiplied = sum(math.prod(op.shape) for op in ops if op.kind == "gemm" and op.phase == "loss")
    assert multiplied == 3 * 2 * 16 * 64 * 260


def test_a_cast_of_what_has_that_dtype_already_is_no_kernel() -> None:
    """DTensor's loss on shards of the vocabulary calls `to` on float32 logits, which returns them."""
    trace = recorded(config("model=llama2_debug", "parallel=sp", "train.loss_chunk=null"), 4)
    casts = [op for part in trace.micro_batches for op in part if op.name == "to"]
    assert not [op for op in casts if {n for n, _ in op.writes} <= {n for n, _ in op.reads}]
    assert any(op.event and op.event.issuer == "loss" for part in trace.micro_batches for op in part)
