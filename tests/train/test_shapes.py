"""Code of a model that counts heads by its settings fits the whole model alone, and the run says so, and where."""

from __future__ import annotations

import inspect

import pytest
import torch
from support.composed import config, corpus
from support.nets import model
from torch import Tensor

from tpresearch.config import Config
from tpresearch.config.errors import ConfigError, WrongModel
from tpresearch.config.validate import validate
from tpresearch.config.world import World
from tpresearch.models.toy_mlp import ToyLM, ToyMLP
from tpresearch.plan.compiler import Plan
from tpresearch.simulate.fake_step import record
from tpresearch.train.preflight import plan_model
from tpresearch.train.shapes import refusing_shapes
from tpresearch.verify.ranks import Ranks
from tpresearch.verify.trace import trace_run


class Counted(ToyMLP):
    """Its heads are as many as a setting says, also where a rank has some of them."""

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        return self.out_proj(self.in_proj(x).view(b, s, 8, self.in_proj.out_features // 8).flatten(-2))


class CountedHeads(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.mlp = Counted(dim, hidden_dim, dim)


def plan(*overrides: str) -> Plan:
    cfg = config("model=toy_mlp", *overrides)
    return plan_model(cfg, validate(cfg, 2))[1]


def heads(x: Tensor) -> Tensor:
    return x.view(2, 4, 8)


def test_the_line_of_the_model_is_named() -> None:
    line = inspect.getsourcelines(heads)[1] + 1
    at = rf"model=mine: it runs whole, but on a rank's shards ends at {__file__}, line {line}: shape '\[2, 4, 8\]' is inv"
    with pytest.raises(WrongModel, match=at), refusing_shapes("mine", plan("parallel=tp")):
        heads(torch.zeros(2, 16))
    with (
        pytest.raises(WrongModel, match="cannot be multiplied"),
        refusing_shapes("mine", plan("parallel=tp")),
    ):
        torch.zeros(2, 16) @ torch.zeros(32, 2)


def product(x: Tensor) -> Tensor:
    return x @ torch.zeros(16, 2, dtype=torch.bfloat16)


def test_a_line_that_mixes_dtypes_is_named_whatever_the_plan() -> None:
    line = inspect.getsourcelines(product)[1] + 1
    at = rf"model=mine: it ends at {__file__}, line {line}: expected m1 and m2 to have the same dtype, .*; a forward that mixes no"
    with pytest.raises(WrongModel, match=at), refusing_shapes("mine", plan("parallel=fsdp")):
        product(torch.zeros(2, 16))


NARROW = {
    "frequencies": torch.fft.rfft,
    "rotations": lambda x: torch.linalg.qr(x)[0],
    "inverse": torch.linalg.inv,
    "complex": torch.view_as_complex,
    "angles": lambda x: torch.polar(x, x),
}


@pytest.mark.parametrize("op", NARROW)
def test_an_op_that_torch_lacks_in_bfloat16_is_named(op: str) -> None:
    at = rf"model=mine: it ends at {__file__}, line \d+: .*BFloat16.*; train.dtype=float32, or a forward"
    with pytest.raises(WrongModel, match=at), refusing_shapes("mine", plan("parallel=fsdp")):
        NARROW[op](torch.zeros(2, 2, dtype=torch.bfloat16))


class InPlace(ToyLM):
    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        x = self.mlp(self.embed(tokens))
        x += 1
        return self.output(x)


def test_an_op_in_place_on_what_a_rule_returns_is_named() -> None:
    cfg = config(*model(InPlace), "parallel=tp")
    with pytest.raises(
        WrongModel, match=rf"ends at {__file__}, line \d+: Output 0 .*: x = x \+ y for x \+= y"
    ):
        record(cfg, validate(cfg, 2))


def test_a_layer_whose_input_is_left_a_dtensor_is_told_what_makes_it_local() -> None:
    mlp = "model.plans.sp.in_proj"
    own = f"{mlp}.style=null", f"{mlp}.src=null", f"{mlp}.dst=null", f"+{mlp}._target_=support.nets.NoStyle"
    gathered = "+model.plans.sp.mlp={match: mlp, style: input, src: 'shard:1', dst: replicate}"
    cfg = config("model=toy_mlp", "parallel=sp", *own, gathered)
    with pytest.raises(WrongModel, match=r"mixed torch\.Tensor and DTensor.*local, as CopyToShards"):
        record(cfg, validate(cfg, 2))


class Normalized(ToyLM):
    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        return super().forward(tokens).softmax(-1)


class Renormed(ToyLM):
    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        return super().forward(tokens).renorm(2, 0, 1.0)


def first_step(world: World, cfg: Config) -> tuple[str, dict[str, object]]:
    """What it is refused for, and what would mend it."""
    try:
        trace_run(cfg, corpus(64, cfg.data.seq_len, cfg.tokenizer.vocab_size), world, 1)
    except ConfigError as error:
        return str(error), error.fix
    return "", {}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Normalized, "what the forward does to the logits leaves no shards"),
        (Renormed, "torch cannot compute aten.renorm.default on shards of the vocabulary"),
    ],
)
def test_logits_that_cannot_stay_shards_name_the_setting(ranks: Ranks, kind: type[ToyLM], said: str) -> None:
    words = (
        *model(kind),
        "parallel=sp",
        "train.dtype=float64",
        "tokenizer.vocab_size=64",
        "data.seq_len=8",
        "data=random_tokens",
        "train.micro_batch_size=2",
    )
    (why, fix), _ = ranks.run(2, first_step, config(*words))
    assert why.startswith(f"parallel.loss_parallel=true: {said}")
    mended = (f"{key}={value}" for key, value in fix.items())
    assert ranks.run(2, first_step, config(*words, *mended)) == [("", {})] * 2


def test_other_errors_and_those_without_rules_are_what_they_were() -> None:
    with pytest.raises(RuntimeError, match=r"^shape"), refusing_shapes("mine", plan("parallel=fsdp")):
        heads(torch.zeros(2, 16))
    with pytest.raises(RuntimeError, match=r"^no more"), refusing_shapes("mine", plan("parallel=tp")):
        raise RuntimeError("no more")


def test_a_simulated_step_says_it_too() -> None:
    cfg = config(*model(CountedHeads), "parallel=tp")
    with pytest.raises(WrongModel, match=rf"on a rank's shards ends at {__file__}, line \d+: shape"):
        record(cfg, validate(cfg, 2))
