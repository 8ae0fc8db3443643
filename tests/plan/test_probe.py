"""One batch's shapes through the meta model: what is incompatible is refused, and where no gradient flows is known."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.assembled import planned, refusal
from support.composed import config
from support.nets import Buffered, Counting, model
from torch import Tensor, nn

from tpresearch.config.world import World
from tpresearch.launch.proposal import command_to_try
from tpresearch.models.toy_mlp import ToyLM
from tpresearch.plan.describe import plan_text
from tpresearch.plan.probe import probe_model

NETS = """
import torch
from torch import nn

class Pair(nn.Module):
    def __init__(self, vocab_size, dim):
        super().__init__()
        self.embed, self.output = nn.Embedding(vocab_size, dim), nn.Linear(dim, vocab_size)

    def forward(self, tokens):
        return self.output(self.embed(tokens)), None

class Narrow(Pair):
    def forward(self, tokens):
        return self.output(self.embed(tokens))[..., :7]

class Judges(Pair):
    def forward(self, tokens, targets):
        return nn.functional.cross_entropy(super().forward(tokens)[0].flatten(0, 1), targets.flatten())

class Misspelt(Pair):
    def forward(self, tokens):
        return self.outputs(self.embed(tokens))

class Unfit(Pair):
    def forward(self, tokens):
        return self.output(self.output(self.embed(tokens)))

class Asks(Pair):
    def forward(self, tokens):
        return super().forward(tokens)[0] * (tokens.max().item() > 0)

class Wide(Pair):
    def forward(self, tokens):
        x = self.embed(tokens)
        return self.output(nn.functional.scaled_dot_product_attention(x.float(), x, x))

class Still(Pair):
    @torch.no_grad()
    def forward(self, tokens):
        return super().forward(tokens)[0]
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "probed_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("probed_nets", None)


NET = ("model=toy_net", "data=uniform", "train.loss=sum", "parallel=none")


@pytest.mark.parametrize(
    ("overrides", "field", "says", "fix"),
    [
        (
            ["model=toy_mlp", "data=uniform", "data.width=10", "train.loss=sum"],
            "data.source",
            "numbers",
            "data",
        ),
        (["model=toy_net", "data=random_tokens", "train.loss=sum"], "data.source", "token ids", "data"),
        ([*NET, "data.width=12"], "data.width", "numbers [8, 12]", "data.width"),
        ([*NET, "train.loss=next_token"], "train.loss", "no targets", "train.loss"),
        (["+model._target_=probed_nets.Pair"], "model", "a tuple", None),
        (["+model._target_=probed_nets.Narrow"], "model", "[8, 16, 7]", None),
        (["+model._target_=probed_nets.Misspelt"], "model", "AttributeError at {here}, line 23: ", None),
        (["+model._target_=probed_nets.Unfit"], "model", "RuntimeError at {here}, line 27: ", None),
        (
            ["+model._target_=probed_nets.Wide", "train.dtype=bfloat16", "train.weights=bfloat16"],
            "model",
            "RuntimeError at {here}, line 36: Expected query, key, and value to have the same dtype",
            None,
        ),
        (["+model._target_=probed_nets.Judges"], "model", "'targets'", None),
        (["+model._target_=probed_nets.Still"], "model", "no gradient flows back from its output", None),
        (
            ["+model._target_=probed_nets.Narrow", "train.loss=sum"],
            "train.eval_rows",
            "[8, 16, 7]",
            "train.eval_rows",
        ),
    ],
)
def test_what_is_incompatible_is_refused(
    nets: None, tmp_path: Path, overrides: list[str], field: str, says: str, fix: str | None
) -> None:
    own = any("probed_nets" in override for override in overrides)
    words = ["model=toy_mlp", "~model.hidden_dim", *overrides] if own else overrides
    error = refusal("parallel=none", *(word.removeprefix("+") for word in words))
    assert error.field == field
    assert says.format(here=tmp_path / "probed_nets.py") in error.why
    assert next(iter(error.fix), None) == fix
    assert (
        fix or command_to_try(error, World(), lambda _: None) is None
    )  # the code is to be changed, not the command


def test_a_model_that_cannot_run_without_data_is_left_alone(nets: None) -> None:
    asks = "model=toy_mlp", "~model.hidden_dim", "model.blocks=[]", "model._target_=probed_nets.Asks"
    planned("parallel=none", *asks)


def test_a_sum_of_outputs_that_are_no_logits_is_trained_without_a_held_out_loss(nets: None) -> None:
    narrow = "model=toy_mlp", "~model.hidden_dim", "model.blocks=[]", "model._target_=probed_nets.Narrow"
    planned("parallel=none", *narrow, "train.loss=sum", "train.eval_rows=0")


def test_modules_that_see_the_batch_first_need_no_gradient_of_it() -> None:
    for words, first in ((NET, "in_proj"), (("model=toy_mlp", "parallel=none"), "embed")):
        _, plan = planned(*words)
        assert plan.probe.no_input_grad == {"", first}


def test_it_leaves_the_model_as_it_was() -> None:
    class Net(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, device="meta")

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(x)

    net = Net()
    assert probe_model(net, torch.empty(2, 4, device="meta"), config()).output == (2, 4)
    assert net.calls == 0
    assert not net._forward_pre_hooks
    assert not net.layer._forward_pre_hooks


class Placed(ToyLM):
    """Positions are looked up in a table of 12 rows."""

    more = 0

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.places = nn.Embedding(12, dim)

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        length = tokens.shape[1]
        places = self.changed(torch.arange(length + self.more, device=tokens.device)[:length])
        return self.output(self.mlp(self.embed(tokens) + self.places(places[None].expand_as(tokens))))

    def changed(self, places: Tensor) -> Tensor:
        return places


class Cut(Placed):
    """From among more numbers than there are positions."""

    more = 4


class Clamped(Placed):
    def changed(self, places: Tensor) -> Tensor:
        return places.clamp_(max=11)


def test_a_table_of_positions_is_as_long_as_rows() -> None:
    for net, length in ((Placed, 12), (Cut, 12), (Clamped, 16)):
        planned(*model(net), "parallel=none", f"data.seq_len={length}")
    refused = refusal(*model(Placed), "parallel=none", "data.seq_len=16")
    assert str(refused).startswith(
        f"data.seq_len=16: model toy_mlp looks up position 15 in a table of 12 rows ({__file__}, line "
    )
    assert refused.fix == {"data.seq_len": 12}


def test_what_it_draws_in_python_is_the_same_on_all_ranks_and_left_to_the_caller() -> None:
    """Ranks whose model left out a layer here by chance made other units of FSDP."""
    drawn = []

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            drawn.append((random.random(), np.random.random()))
            return x

    for rank in range(2):
        random.seed(rank)
        np.random.seed(rank)
        found = probe_model(Net(), torch.empty(2, 4, device="meta"), config())
        assert found.may_branch
        assert (random.random(), np.random.random()) == (
            random.Random(rank).random(),
            np.random.RandomState(rank).random_sample(),
        )
    assert drawn[0] == drawn[1]


def test_buffers_that_a_forward_changes_are_named_by_the_plan() -> None:
    meta, plan = planned(*model(Buffered), "parallel=none")
    text = plan_text(meta, plan)
    assert "buffers: a forward changes seen, on each data-parallel rank" in text
    assert "not claimed, and a checkpoint has one rank's" in text
    assert "not in checkpoints" not in text
    meta.register_buffer("seen", meta.get_buffer("seen"), persistent=False)
    assert "not in checkpoints: seen, which a forward changes" in plan_text(meta, plan)
    assert "buffers:" not in plan_text(*planned("model=llama2_debug", "parallel=none"))


def test_numbers_that_a_forward_changes_are_said_not_to_be_saved() -> None:
    text = plan_text(*planned(*model(Counting), "parallel=none"))
    assert "not in checkpoints: calls, which a forward changes" in text
    assert "buffers:" not in text
    assert "checkpoints" not in plan_text(*planned("model=llama2_debug", "parallel=none"))
