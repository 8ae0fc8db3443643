"""The plan compiler: what it refuses, and that its table is what really happens to a model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.assembled import planned, ranks_of_a_host, refusal
from support.composed import config
from support.counted_steps import FAKE
from support.nets import HookedHead, InFront, Positions, TakesLayouts, model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from tpresearch.config import Config
from tpresearch.config.model import model_as_dict, model_config
from tpresearch.config.validate import validate
from tpresearch.config.world import World
from tpresearch.models.toy_mlp import ToyLM
from tpresearch.parallel.apply import parallelize
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh
from tpresearch.plan.compiler import matching_names
from tpresearch.plan.describe import fold_layers, plan_rows, plan_text
from tpresearch.train.preflight import plan_model


def test_wildcards_match_part_by_part() -> None:
    names = ["layers.0.attention.wq", "layers.1.attention.wq", "layers.0.attention.wo", "layers.0.wq"]
    assert matching_names("layers.*.attention.wq", names) == names[:2]
    assert matching_names("layers.*.attention.w[qo]", names) == names[:3]
    assert matching_names("layers.*", names) == []


def test_a_rule_that_matches_nothing_is_refused_with_near_names() -> None:
    error = refusal("model.plans.sp.out.match=layers.*.attention.w0")
    assert error.field == "model.plans.sp.out.match"
    assert "matches no module" in str(error)
    assert "layers.0.attention.wo" in error.legal or "layers.1.attention.wo" in error.legal


def test_overlapping_rules_are_refused_and_both_named() -> None:
    error = refusal("model.plans.sp.out.match='layers.*.attention.w[oq]'")
    assert error.field == "model.plans.sp.out.match"
    assert "qkv" in str(error)
    assert "out" in str(error)


OUT = "model.plans.sp.out"
OWN = f"+{OUT}._target_"


@pytest.mark.parametrize(
    ("override", "field", "offered"),
    [
        ("model.plans.sp.out.style=rowwize", "model.plans.sp.out.style", "rowwise"),
        ("model.plans.sp.out.dst=shared:1", "model.plans.sp.out.dst", "shard:N"),
        ("model.plans.sp.attn_in.dst=[replicate]", "model.plans.sp.attn_in", "one length"),
        ("model.plans.sp.norms.style=colwise", "model.plans.sp.norms.style", "nn.Linear"),
        ("model.plans.sp.qkv.units=[n_head]", "model.plans.sp.qkv.units", "n_heads"),
        ("model.plans.sp.out.dst=shard:3", "model.plans.sp.out.dst", "shard:-3 to shard:2"),
        ("model.plans.sp.out.dst=shard:-4", "model.plans.sp.out.dst", "shard:-3 to shard:2"),
        (
            "model.plans.sp.ffn_x.src=['shard:1',null] model.plans.sp.ffn_x.dst=[replicate,null]",
            "model.plans.sp.ffn_x.src",
            "lists of 1",
        ),
        ("model.plans.sp.out.dst=['shard:1','shard:1']", "model.plans.sp.out.dst", "one layout"),
        ("model.plans.sp.norms.dst=replicate", "model.plans.sp.norms", "src and dst the same"),
        ("model.plans.sp.qkv.dst=logits", "model.plans.sp.qkv.dst", "replicate, or shard:N"),
        ("+model.plans.sp.out._target_=nowhere.Mine", "model.plans.sp.out._target_", "class"),
        ("+model.plans.sp.out._target_=torch.nn.Linear", "model.plans.sp.out._target_", "ParallelStyle"),
        (
            f"{OWN}=torch.distributed.tensor.parallel.RowwiseParallel +model.plans.sp.out.dim=1 {OUT}.style=null {OUT}.dst=null",
            "model.plans.sp.out._target_",
            "arguments",
        ),
        (f"{OWN}=support.nets.NoStyle", f"{OUT}.style", "null beside a _target_"),
        (f"{OWN}=support.nets.NoStyle {OUT}.style=null {OUT}.dst=shard:1", f"{OUT}._target_", "arguments"),
        (f"{OWN}=support.nets.NoStyle {OUT}.style=null {OUT}.src=[null]", f"{OUT}._target_", "arguments"),
        ("+model.plans.sp.out.stile=rowwise", "model.plans.sp.out.stile", "style"),
        ("model.blocks=[layer.*]", "model.blocks", "layers"),
        ("model.dim=60", "model", "settings"),
        ("+model.n_head=3", "model.n_head", "n_heads"),
        ("model._target_=tpresearch.models.llama3.Llama3", "model._target_", "class"),
        ("model._target_=pathlib.Path", "model._target_", "a subclass of torch's Module"),
    ],
)
def test_what_cannot_be_read_is_refused(override: str, field: str, offered: str) -> None:
    error = refusal("model=llama2_debug", *override.split())
    assert error.field == field
    assert offered in error.legal


def test_layouts_of_a_rule_are_arguments_of_a_style_of_its_own() -> None:
    words = f"{OUT}.style=null", f"{OUT}.dst=[shard:1,null]", f"{OUT}.src=null"
    cfg = config("model=llama2_debug", f"{OWN}=support.nets.TakesLayouts", *words)
    _, plan = plan_model(cfg, validate(cfg, 4))
    style = plan.rules["layers.0.attention.wo"].style()
    assert isinstance(style, TakesLayouts)
    assert (style.dst, style.src) == (["shard:1", None], "unset")
    assert model_config(model_as_dict(cfg.model)) == cfg.model


ROWS = "model=toy_mlp", "parallel=sp", "model.plans.sp.output.dst=batch"
THREE = "train.micro_batch_size=3", "train.global_batch_size=6"


@pytest.mark.parametrize(
    ("overrides", "world", "culprit", "legal"),
    [
        (["model=llama2_tiny", "parallel=tp"], 3, "model.n_heads=16", "1 2 4 8 16"),
        (["model=toy_mlp", "parallel=tp", "model.hidden_dim=30"], 4, "model.hidden_dim=30", "1 2"),
        ([*model(InFront), "parallel=sp", "data.seq_len=16"], 2, "mlp.in_proj.input.shape[1]=17", "1"),
        ([*ROWS, "train.loss=sum", "train.eval_rows=0", *THREE], 2, "train.micro_batch_size=3", "1"),
    ],
)
def test_what_tp_does_not_divide_is_refused(
    overrides: list[str], world: int, culprit: str, legal: str
) -> None:
    error = refusal(*overrides, world=world)
    assert error.field == "mesh.tp"
    assert culprit in error.why
    assert legal in error.legal
    assert str(error.nproc) in error.legal.split()


def test_tp_alone_needs_no_divisible_sequence() -> None:
    planned("model=llama2_debug", "parallel=tp", "data.seq_len=17")


def test_logits_of_each_ranks_rows_are_for_a_sum_without_a_held_out_loss() -> None:
    assert "logits, or train.loss=sum" in refusal(*ROWS).legal
    assert "logits, or train.eval_rows=0" in refusal(*ROWS, "train.loss=sum").legal
    assert planned(*ROWS, "train.loss=sum", "train.eval_rows=0")[1].output_shard_dim == 0


def test_of_rows_of_numbers_dim_1_is_features_and_no_sequence() -> None:
    numbers = (
        "experiment=seed_tp",
        "model.plans.tp.in_proj.dst=shard:1",
        "model.plans.tp.out_proj.src=shard:1",
    )
    _, plan = planned(*numbers, world=2)
    assert plan.rules["in_proj"].dst == (Shard(1),)


def sharded_dim(placement: Placement) -> int:
    assert isinstance(placement, Shard | _StridedShard)
    return placement.dim


def facts_of_rank_zero(cfg: Config, world: World) -> dict[str, tuple[str, str]]:
    """What really became of each parameter: its placements over axes of several ranks, its local shape."""
    model, plan = plan_model(cfg, sizes := validate(cfg, world.size))
    with process_group(FAKE, world):
        parallelize(model, plan, cfg.parallel, build_mesh(sizes, "cpu"), cfg.train.dtype)
        found = {}
        for name, parameter in model.named_parameters():
            if not isinstance(parameter, DTensor):
                found[name] = ("replicated", "x".join(map(str, parameter.shape)))
                continue
            names = parameter.device_mesh.mesh_dim_names or ()
            over = [
                f"{axis}: Shard({sharded_dim(placement)})"
                for axis, placement in zip(names, parameter.placements, strict=True)
                if sizes.nontrivial().get(axis) and not placement.is_replicate()
            ]
            found[name] = (", ".join(over) or "replicated", "x".join(map(str, parameter.to_local().shape)))
        return found


@pytest.mark.parametrize("name", ["toy_mlp", "llama2_debug"])
@pytest.mark.parametrize("plan", ["ddp", "tp", "sp", "fsdp", "hsdp", "fsdp_tp"])
def test_the_table_is_what_becomes_of_each_parameter(plan: str, name: str) -> None:
    overrides = [f"model={name}", f"parallel={plan}", "model.vocab_size=263"]
    rows = plan_rows(*planned(*overrides))
    table = {row.fqn: (row.placement, row.local_shape) for row in rows if row.local_shape}
    assert table == facts_of_rank_zero(config(*overrides), ranks_of_a_host(4))


def test_layers_fold_into_one_row_and_nothing_is_lost() -> None:
    meta, plan = planned("model=llama2_7b", "tokenizer.vocab_size=32000", "mesh.tp=8")
    rows = plan_rows(meta, plan)
    assert len([row for row in rows if row.local_shape]) == len(list(meta.parameters())) == 32 * 9 + 3
    assert len(fold_layers(rows)) == 14
    assert "parameters: 6,738,415,616" in plan_text(meta, plan)


def test_parameters_left_replicated_are_named() -> None:
    _, plan = planned("model=toy_mlp", "parallel=tp")
    assert plan.replicated == ["mlp.out_proj.bias"]
    _, plan = planned("model=llama2_debug", "parallel=tp")
    assert {name.rsplit(".", 2)[-2] for name in plan.replicated} == {"attention_norm", "ffn_norm", "norm"}


def test_one_rule_can_be_changed_from_the_command_line() -> None:
    _, plan = planned("model=llama2_debug", "model.plans.sp.logits.dst=replicate")
    assert str(plan.rules["output"].dst[0]) == "R"


@pytest.mark.parametrize("change", ["~model.plans.sp.norms", "model.plans.sp.norms.match=layers.0.*_norm"])
def test_a_weight_without_a_rule_is_refused_where_the_sequence_is_split(change: str) -> None:
    error = refusal("model=llama2_debug", change)
    assert error.field == "model.plans.sp"
    assert "_norm" in error.why


@pytest.mark.parametrize("blocks", ["[layers.*,layers.0]", "[layers.*,layers]"])
def test_blocks_that_hold_each_other_are_refused(blocks: str) -> None:
    assert refusal("model=llama2_debug", f"model.blocks={blocks}").field == "model.blocks"


def test_the_plan_is_compiled_without_memory() -> None:
    words = "model=llama2_70b", "model.n_layers=4", "parallel=sp", "mesh.tp=8", "data.seq_len=64"
    meta, _ = planned(*words)  # 14 GB
    assert all(p.device == torch.device("meta") for p in meta.parameters())


class Experts(ToyLM):
    """As many modules as 64 experts of two layers have in each of 28 blocks."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.experts = nn.ModuleList(nn.Identity() for _ in range(28 * 64 * 2))


def test_a_model_of_many_experts_is_planned() -> None:
    meta, _ = planned(*model(Experts), "parallel=fsdp")
    assert len(list(meta.modules())) > 28 * 64 * 2


class Replaced(ToyLM):
    """With a forward that is set on a layer, as by a library that changes models."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.embed.forward = lambda input: F.embedding(input, F.normalize(self.embed.weight, dim=-1))


def test_an_embedding_with_another_forward_is_no_unit_of_its_own() -> None:
    for net, layers in ((ToyLM, ["embed", "output"]), (Replaced, ["output"])):
        _, plan = planned(*model(net), "parallel=fsdp")
        assert plan.end_layers == layers


def test_logits_are_chunked_where_nothing_but_a_matmul_makes_them() -> None:
    def head(*words: str) -> str | None:
        return planned(*words)[1].chunked_head

    assert head(*model(ToyLM), "parallel=none") == head(*model(ToyLM), "parallel=tp") == "output"
    assert head(*model(HookedHead), "parallel=none") is None
    assert head(*model(ToyLM), "parallel=tp", "model.plans.tp.output.dst=replicate") is None


def test_the_rule_that_is_proposed_for_an_embedding_shards_its_positions() -> None:
    """Learned ones have no rows, of which a micro-batch here has one."""
    words = (*model(Positions), "parallel=sp", "train.micro_batch_size=1")
    error = refusal(*words)
    assert "positions.weight has no sharding rule; with a sharded sequence" in str(error)
    ((key, rule),) = error.fix.items()
    assert rule == "{match:positions,style:rowwise,src:'replicate',dst:'shard:0'}"
    _, plan = planned(*words, f"{key}={rule}")
    assert plan.rules["positions"].dst == (Shard(0),)
    error = refusal(*words, f"{key}={rule}", "~model.plans.sp.embed")
    assert "embed.weight has no sharding rule; with a sharded sequence" in str(error)
    assert [*error.fix.values()] == ["{match:embed,style:rowwise,src:'replicate',dst:'shard:1'}"]


class NormedHeads(ToyLM):
    """A norm of each head, in the order that attention takes, `[b, heads, s, h]`, and one of the whole input."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.norm, self.of_head = nn.LayerNorm(dim), nn.RMSNorm(8)

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        x = self.mlp.in_proj(self.norm(self.embed(tokens)))
        x = self.of_head(x.unflatten(-1, (-1, 8)).transpose(1, 2))
        return self.output(self.mlp.out_proj(x.transpose(1, 2).flatten(2)))


def test_heads_in_front_of_the_sequence_are_not_taken_for_it() -> None:
    rule = "+model.plans.tp.of_head={match: of_head, style: sequence, src: 'shard:1', dst: 'shard:1'}"
    _, plan = planned(*model(NormedHeads), "parallel=tp", rule, "data.seq_len=20")
    assert "of_head" in plan.rules
