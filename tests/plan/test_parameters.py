"""Parameters that not every plan can shard are refused by name, or are right: tied, frozen, scalar, unevenly cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.assembled import planned, refusal
from support.counted_steps import counted_step
from support.nets import (
    AllFrozen,
    ByFuncGrad,
    ByGrad,
    ByJvp,
    ByVmap,
    ComplexPositions,
    Frozen,
    Scaled,
    Tied,
    Unused,
    model,
)
from support.odd_nets import (
    ByKeyword,
    Complex,
    Counting,
    Hooked,
    NormalizedByHook,
    Parametrized,
    Transposed,
    Wide,
)
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from tpresearch.models.llama2 import Linear
from tpresearch.models.toy_mlp import ToyLM
from tpresearch.plan.parameters import _same_shards, tied_parameters


def test_ties_are_found_and_counted_once() -> None:
    meta, _ = planned(*model(Tied), "parallel=none", "model.dim=8", "model.hidden_dim=32")
    assert tied_parameters(meta) == {"output.weight": "embed.weight"}
    assert sum(p.numel() for p in meta.parameters()) == 260 * 8 + 2 * 8 * 32 + 32 + 8


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Hooked, "it has a hook on its gradient"),
        (Complex, "its numbers are complex"),
        (Parametrized, "it is parametrized"),
        (NormalizedByHook, "its weight is computed from parameters as the model is built"),
        (Wide, "it is float64 where others are float32"),
    ],
)
def test_what_would_be_lost_without_a_word_is_refused(kind: type[nn.Module], why: str) -> None:
    error = refusal(*model(kind), "parallel=none")
    assert error.value in ("output.weight", "output")
    assert error.why.startswith(why)


def test_a_rule_on_a_layer_that_is_given_its_input_by_keyword_is_refused() -> None:
    error = refusal(*model(ByKeyword), "parallel=tp")
    assert (error.field, error.value) == ("model.plans.tp.output.match", "output")
    assert error.why == "output is given no input by position"
    planned(*model(ByKeyword), "parallel=fsdp")


def test_tables_of_complex_numbers_are_as_wide_as_the_parameters() -> None:
    meta, _ = planned(*model(ComplexPositions), "parallel=none", "train.dtype=float64")
    assert meta.get_buffer("turns").dtype is torch.complex128


@pytest.mark.parametrize(
    "words", [["parallel=none"], ["parallel=none", "train.dtype=bfloat16", "train.weights=bfloat16"]]
)
def test_whole_numbers_and_flags_stay_what_they_are(words: list[str]) -> None:
    meta, _ = planned(*model(Counting), *words)
    counts = meta.get_submodule("counts")
    assert [p.dtype for p in counts.parameters()] == [torch.long, torch.bool]


@pytest.mark.parametrize("parallel", ["none", "fsdp"])
def test_no_formula_is_claimed_where_a_parameter_has_no_part_in_the_loss(parallel: str) -> None:
    counted = counted_step(1 if parallel == "none" else 2, *model(Unused), f"parallel={parallel}")
    assert counted.expected.sent is None
    found = {kind.kind: kind.most_bytes for kind in counted.held}
    assert counted.expected.held == dict.fromkeys(counted.expected.held) | {"parameters": found["parameters"]}


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["parallel=tp", "model.plans.tp.embed.style=colwise"], "model.plans"),
        (["parallel=tp", "~model.plans.tp.output"], "model.plans"),
        (["parallel=fsdp", "model.blocks=[embed]"], "model.blocks"),
    ],
)
def test_a_plan_that_would_untie_is_refused_and_both_are_named(overrides: list[str], field: str) -> None:
    error = refusal(*model(Tied), *overrides)
    assert error.field == field
    assert all(name in str(error) for name in ("embed.weight", "output.weight"))


def test_a_tie_of_what_two_rules_keep_whole_says_which_has_none() -> None:
    error = refusal(
        *model(Tied), "parallel=tp", "~model.plans.tp.output", "model.plans.tp.embed.style=output"
    )
    assert error.why.endswith("they are kept whole by a rule over tp and whole without a rule")


@pytest.mark.parametrize("overrides", [["parallel=fsdp"], ["parallel=fsdp", "train.dtype=bfloat16"]])
def test_a_scalar_is_refused_where_fsdp_would_shard_it(overrides: list[str]) -> None:
    error = refusal(*model(Scaled), *overrides)
    assert "scale.s is a scalar" in str(error)
    assert error.field == "parallel"


def test_a_model_without_anything_to_train_is_refused() -> None:
    assert "requires a gradient" in refusal(*model(AllFrozen), "parallel=none").why


@pytest.mark.parametrize(
    ("rows", "shards", "ways", "alike"),
    [
        *((50257, 4, 2, False), (4093, 3, 2, False), (13, 3, 2, False), (50257, 2, 4, True)),
        *((32000, 3, 2, True), (50257, 8192, 8, True)),
    ],
)
def test_rows_that_two_axes_cut_unevenly_are_known(rows: int, shards: int, ways: int, alike: bool) -> None:
    """Also of tens of thousands of ranks, and at once."""
    assert _same_shards(rows, ways, shards) == alike


@pytest.mark.parametrize(("ways", "shards"), [(2, 3), (3, 2), (4, 7), (6, 4)])
@pytest.mark.parametrize("rows", [1, 5, 13, 26, 31, 61])
def test_rows_are_cut_as_torch_cuts_them(rows: int, ways: int, shards: int) -> None:
    """FSDP by chunks of chunks; DTensor by the placements that FSDP gives a parameter of a rule (private, torch 2.11 to 2.14)."""
    placements = [Replicate(), _StridedShard(0, split_factor=ways), Shard(0)]
    same = True
    for way, part in enumerate(torch.arange(rows).chunk(ways)):
        for shard, held in enumerate(part.chunk(shards)):
            shape, offset = _compute_local_shape_and_global_offset(
                (rows,), (1, shards, ways), [0, shard, way], placements
            )
            same &= shape[0] == len(held) and offset[0] == int(held[0])
    assert _same_shards(rows, ways, shards) == same


def test_uneven_rows_are_refused_with_the_next_vocabulary_that_fits() -> None:
    error = refusal("model=llama2_debug", "parallel=fsdp_tp", "mesh.tp=4", "model.vocab_size=50258", world=16)
    assert "50258 rows of tok_embeddings.weight" in error.why
    assert error.fix == {"model.vocab_size": 50260}
    planned("model=llama2_debug", "parallel=fsdp_tp", "mesh.tp=4", "model.vocab_size=50260", world=16)


def test_a_rank_without_a_row_of_the_vocabulary_is_refused() -> None:
    words = "model=toy_mlp", "parallel=tp", "data=random_tokens", "tokenizer.vocab_size=5"
    error = refusal(*words, world=4)
    assert (error.field, error.fix) == ("mesh.tp", {"model.vocab_size": 7})
    assert "without any of the 5 rows of embed.weight" in error.why
    planned(*words, "model.vocab_size=7", world=4)


@pytest.mark.parametrize(
    ("kind", "plan", "world"),
    [
        *((kind, "parallel=none", 1) for kind in (Tied, Frozen, Scaled, Transposed)),
        *(
            (Tied, plan, 4)
            for plan in ("parallel=fsdp", "parallel=tp", "parallel=fsdp_tp", "parallel=hsdp_tp")
        ),
        (Transposed, "parallel=fsdp", 2),
        *((Frozen, plan, 2) for plan in ("parallel=ddp", "parallel=fsdp")),
        *((kind, "parallel=ddp", 2) for kind in (Scaled, Tied)),
    ],
)
def test_formulas_are_what_is_measured(kind: type, plan: str, world: int) -> None:
    blocks = ["model.blocks=[]"] if kind is Frozen else []
    found = counted_step(world, *model(kind), plan, *blocks)
    for kept in ("parameters", "gradients", "optimizer"):
        assert found.most_bytes[kept] == found.expected.held[kept], kept
    assert found.sent == found.expected.sent


def constructed(change: Callable[[ToyLM], object]) -> type[nn.Module]:
    class Constructed(ToyLM):
        def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
            super().__init__(vocab_size, dim, hidden_dim)
            self.norm = nn.LayerNorm(dim)
            change(self)

    return Constructed


OWN = "model=toy_mlp", f"model._target_={__name__}.Constructed"
"""The model that a test has constructed."""


@pytest.mark.parametrize(
    ("option", "plan", "why"),
    [
        ({"sparse": True}, "none", "a sparse gradient"),
        ({"scale_grad_by_freq": True}, "none", "scale_grad_by_freq counts"),
        ({"max_norm": 1.0}, "fsdp", "max_norm changes"),  # which a single process may
    ],
)
def test_embeddings_that_depend_on_the_rows_of_a_rank_are_refused(
    monkeypatch: pytest.MonkeyPatch, option: dict[str, Any], plan: str, why: str
) -> None:
    embeds = constructed(lambda net: setattr(net, "embed", nn.Embedding(260, 64, **option)))
    monkeypatch.setitem(globals(), "Constructed", embeds)
    error = refusal(*OWN, f"parallel={plan}")
    assert error.value == "embed"
    assert error.why.startswith(why)
    if plan != "none":
        planned(*OWN, "parallel=none")


@torch.no_grad()
def clear_first_row(net: ToyLM) -> None:
    net.embed.weight[0] = 0


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight.data.normal_(0, 0.02)
    if isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)


LOST = {
    "all of them": (lambda net: net.apply(initialize), "mlp.in_proj.weight"),
    "to nothing": (lambda net: nn.init.zeros_(net.output.weight), "output.weight"),
    "truncated": (lambda net: nn.init.trunc_normal_(net.output.weight, std=0.02), "output.weight"),
    "scaled": (lambda net: net.output.weight.data.div_(2), "output.weight"),
    "a row": (clear_first_row, "embed.weight"),
}


class Itself(nn.Module):
    """That calls itself by another word."""

    def __init__(me) -> None:
        super().__init__()
        me.weight = nn.Parameter(torch.empty(260, 64))
        me.reset_parameters()

    def reset_parameters(me) -> None:
        nn.init.normal_(me.weight)

    def forward(me, x: Tensor) -> Tensor:
        return x @ me.weight.T


KEPT = {
    "as it is anyway": lambda net: (nn.init.ones_(net.norm.weight), nn.init.constant_(net.norm.bias, 0.0)),
    "and resets": lambda net: (nn.init.zeros_(net.output.weight), net.output.reset_parameters()),
    "ties": lambda net: setattr(net.embed, "weight", net.output.weight),
    "freezes": lambda net: net.embed.weight.requires_grad_(False),
    "a class with its own": lambda net: setattr(net, "output", Linear(64, 260, 0.02)),
    "a class with a word of its own": lambda net: setattr(net, "output", Itself()),
}


@pytest.mark.parametrize("how", [*LOST, *KEPT])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_initial_values_that_only_the_constructor_sets_are_refused(
    how: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, name = LOST.get(how) or (KEPT[how], None)
    monkeypatch.setitem(globals(), "Constructed", constructed(change))
    words = *OWN, f"train.dtype={dtype}", "parallel=none"
    planned(*words)  # for a checkpoint's weights
    if name is None:
        planned(*words, from_seed=True)
        return
    error = refusal(*words, from_seed=True)
    assert (error.value, error.why[:31]) == (name, "the model's constructor sets it")


@pytest.mark.parametrize("kind", [ByGrad, ByFuncGrad, ByJvp, ByVmap])
def test_gradients_and_transforms_that_a_forward_takes_are_right_or_refused(kind: type[nn.Module]) -> None:
    """What one process computes is planned, though its blocks are alike, of which one alone would be followed."""
    words = (*model(kind), "model.blocks=[first,mlp]", "train.micro_batch_size=2")
    planned(*words, "parallel=none")
    planned(*words, "parallel=ddp")
    by_units = (*words, "parallel=fsdp")
    if kind in (ByGrad, ByFuncGrad):
        assert "it takes a gradient through first in its forward" in str(refusal(*by_units))
    else:
        planned(*by_units)
    why = (
        "backward goes through a gradient" if kind is ByGrad else "it calls mlp.in_proj, which a rule shards"
    )
    assert f"model=toy_mlp: {why}" in str(refusal(*words, "parallel=tp"))
