"""What FSDP gathers, and when: an embedding and an output layer only where they are used, in bytes that do not grow."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from support.assembled import assembled, planned, ranks_of_a_host, refusal
from support.composed import config
from support.counted_steps import FAKE
from support.nets import (
    AddsInPlace,
    AfterBlocks,
    Forced,
    NotReentrant,
    OwnCheckpoints,
    ReadApart,
    RecurrentInCheckpoints,
    TiedInCheckpoints,
    model,
)
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard

from tpresearch.config import ConfigError
from tpresearch.ledger.communication import CommunicationLedger
from tpresearch.train.loop import Loop

LAYERS = 4
EMBEDDING, FIRST, LAST, OUTPUT = "tok_embeddings", "layers.0", f"layers.{LAYERS - 1}", "output"


def gathered(model: nn.Module) -> set[str]:
    """Of the embedding, the output layer and two blocks, those whose weights are whole."""
    weights = {
        EMBEDDING: model.get_parameter(f"{EMBEDDING}.weight"),
        OUTPUT: model.get_parameter(f"{OUTPUT}.weight"),
        **{name: model.get_parameter(f"{name}.ffn_norm.weight") for name in (FIRST, LAST)},
    }
    return {name for name, w in weights.items() if not (isinstance(w, DTensor) and Shard(0) in w.placements)}


def moments(loop: Loop, sent: Callable[[], int]) -> dict[str, set[Any]]:
    """What is gathered when each of them begins its forward, and when the output of each gets its gradient; and how much
    was `sent` when the last block began.
    """
    model, found = loop.state.model, {}

    def before(name: str) -> Any:
        def note(module: nn.Module, args: Any) -> None:
            found[f"{name} forward"], found["gathers"] = gathered(model), {sent()}

        return note

    def after(name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if output.requires_grad:
                output.register_hook(lambda _: found.update({f"{name} backward": gathered(model)}))

        return note

    for name in (EMBEDDING, FIRST, LAST):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(before(name))
        module.register_forward_hook(after(name))
    loop.step()
    return found


@pytest.mark.parametrize("chunk", ["24", "null"])
def test_embedding_and_output_are_gathered_where_they_are_used(chunk: str) -> None:
    cfg = config(
        *("model=llama2_debug", "parallel=fsdp", f"model.n_layers={LAYERS}", f"train.loss_chunk={chunk}"),
        "train.eval_rows=11",
    )
    with assembled(cfg, ranks_of_a_host(4), FAKE) as loop:
        plan = loop.setup.plan
        assert (plan.end_layers, plan.after_blocks) == ([EMBEDDING, OUTPUT], ["norm"])
        loop.step()
        loop.evaluate()
        with CommunicationLedger(loop.setup.mesh) as ledger:
            found = moments(loop, lambda: len(ledger.events))
        assert gathered(loop.state.model) == set()
    assert found[f"{FIRST} forward"] == {FIRST}
    assert found[f"{LAST} forward"] == {LAST}
    # Those of embedding and blocks, and of the output, which comes while the last block computes.
    assert found["gathers"] == {1 + LAYERS + 1}
    assert OUTPUT not in found[f"{FIRST} backward"]
    assert EMBEDDING not in found[f"{FIRST} backward"]
    assert found[f"{EMBEDDING} backward"] == set()


@pytest.mark.parametrize("rows", [0, 11])
def test_an_evaluation_may_come_before_the_first_step(rows: int) -> None:
    """As that of a run that a signal stopped before it; FSDP makes itself ready in the first forward, if there is one."""
    cfg = config("model=llama2_debug", "parallel=fsdp", f"model.n_layers={LAYERS}", f"train.eval_rows={rows}")
    with assembled(cfg, ranks_of_a_host(4), FAKE) as loop:
        assert (loop.evaluate() is None) == (rows == 0)
        assert gathered(loop.state.model) == set()
        loop.step()


def test_what_is_tied_stays_together() -> None:
    for overrides in (["model.tied=true"], ["model.blocks=[]"]):
        _, plan = planned("model=llama2_debug", "parallel=fsdp", *overrides)
        assert plan.end_layers == []
        assert plan.after_blocks == (["norm"] if plan.blocks else [])


def test_what_is_called_once_after_the_last_block_is_gathered_with_it() -> None:
    cfg = config(*model(AfterBlocks), "parallel=fsdp", "train.eval_rows=8")
    of = {"gated.gate": "mlp", "in_training": "mlp", "before": None, "twice": None, "embed": "embed"}
    with assembled(cfg, ranks_of_a_host(2), FAKE) as loop:
        plan = loop.setup.plan
        assert plan.after_blocks == ["gated", "in_training"]
        assert {name: plan.unit_of(f"{name}.weight") for name in of} == of
        for _ in range(2):  # of which an evaluation calls but a part
            loop.step()
            loop.evaluate()
        assert all(isinstance(weight, DTensor) for weight in loop.state.model.parameters())


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["model.blocks=[first,mlp]"], True),
        (["model.blocks=[mlp,first]"], False),  # the last is not freed before its backward
        (["model.blocks=[first,mlp]", "parallel.fsdp.reshard_after_forward=false"], False),
        (["model.blocks=[first,mlp]", "parallel=ddp"], False),
    ],
)
def test_a_block_whose_output_is_changed_in_place_would_not_be_gathered_again(
    words: list[str], refused: bool
) -> None:
    job = (*model(AddsInPlace), "parallel=fsdp", *words)
    if not refused:
        planned(*job)
    else:
        assert str(refusal(*job)).startswith(
            "model=toy_mlp: it changes the output of first in place, and FSDP "
        )


def test_of_views_that_nothing_changes_torch_does_not_warn() -> None:
    cfg = config("model=toy_mlp", "parallel=fsdp")
    with warnings.catch_warnings(record=True) as warned, assembled(cfg, ranks_of_a_host(2), FAKE) as loop:
        loop.step()
    assert [str(each.message) for each in warned if "view" in str(each.message)] == []


def test_a_weight_of_a_unit_that_is_read_where_the_unit_does_not_run_is_refused() -> None:
    error = refusal(*model(ReadApart), "parallel=fsdp", world=2)
    assert "reads a parameter of mlp.in_proj while mlp does not run" in str(error)
    for fits in (
        ("parallel=ddp",),
        ("parallel=fsdp", "model.blocks=[]"),
        ("parallel=fsdp", "mesh.dp_shard=1"),
    ):
        planned(*model(ReadApart), *fits, world=1 if fits[-1] == "mesh.dp_shard=1" else 2)


def test_a_forward_that_takes_a_gradient_through_a_unit_is_refused() -> None:
    error = refusal(*model(Forced), "parallel=fsdp", world=2)
    assert "it takes a gradient through mlp in its forward" in str(error)
    for fits in (("parallel=ddp",), ("parallel=fsdp", "model.blocks=[]")):
        planned(*model(Forced), *fits, world=2)


@pytest.mark.parametrize(
    ("kind", "plan", "refused"),
    [
        (RecurrentInCheckpoints, "ddp", "mlp."),
        (RecurrentInCheckpoints, "fsdp", "mlp."),
        (RecurrentInCheckpoints, "none", None),
        (TiedInCheckpoints, "ddp", "embed.weight"),
        (TiedInCheckpoints, "fsdp", None),  # summed once, at the end
        (OwnCheckpoints, "ddp", None),
        (OwnCheckpoints, "fsdp", None),  # a norm that is gathered with the block before it is not whole there
        (NotReentrant, "fsdp", None),
    ],
)
def test_a_gradient_in_several_parts_of_which_ranks_would_sum_the_first_is_refused(
    kind: type[nn.Module], plan: str, refused: str | None
) -> None:
    cfg = config(*model(kind), f"parallel={plan}", "model.blocks=[mlp]")
    with assembled(cfg, ranks_of_a_host(1 if plan == "none" else 2), FAKE) as loop:
        if refused is None:
            loop.step()
            return
        with pytest.raises(ConfigError) as caught:
            loop.step()
    assert str(caught.value).startswith(f"model={refused}")
    assert "its gradient comes in several parts" in str(caught.value)
