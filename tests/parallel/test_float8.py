"""`train.float8`: which layers multiply in it, from which weights, and how near bfloat16 they stay, on any plan."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from support.assembled import assembled, ranks_of_a_host
from support.composed import config, corpus
from support.counted_steps import FAKE, counted_step
from support.marks import exhaustive
from torch import nn

from tpresearch.config import Config, ConfigError
from tpresearch.config.choices import Float8
from tpresearch.config.training import TrainConfig
from tpresearch.config.world import World
from tpresearch.parallel.float8 import check_float8, to_float8
from tpresearch.parallel.weights import local_part
from tpresearch.plan.describe import plan_text
from tpresearch.train.preflight import preflight
from tpresearch.verify.plans import check_plan
from tpresearch.verify.ranks import Ranks
from tpresearch.verify.trace import trace_run

BFLOAT16 = ("model=llama2_debug", "train.dtype=bfloat16", "optimizer=sgd")
STEPS = 2


def float8(recipe: str, *overrides: str) -> Config:
    return config(*BFLOAT16, f"train.float8={recipe}", "train.float8_emulated=true", *overrides)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_layer_rounds_what_it_multiplies_to_float8(recipe: str) -> None:
    """As torch's own cast has it, by the greatest value of a whole tensor or of each row and column."""
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32, bias=False), torch.randn(16, 64)
    model, weight = nn.Sequential(layer), layer.weight
    to_float8(model, ["0"], TrainConfig(float8=Float8(recipe), float8_emulated=True))
    assert model[0].weight is weight

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        most = tensor.abs().amax(-1, keepdim=True) if recipe == "rowwise" else tensor.abs().max()
        scale = 448 / most
        scale = scale.log2().floor().exp2() if recipe == "rowwise" else scale
        return (tensor * scale).to(torch.float8_e4m3fn).float() / scale

    torch.testing.assert_close(model(x), rounded(x) @ rounded(weight).T, rtol=1e-5, atol=1e-5)
    assert (model(x) - x @ weight.T).abs().max() > 1e-3


@pytest.mark.parametrize(("plan", "world"), [("none", 1), ("hsdp_tp", 8)])
def test_first_weights_are_those_of_the_plain_model(plan: str, world: int) -> None:
    found = []
    for cfg in (config(*BFLOAT16, f"parallel={plan}"), float8("tensorwise", f"parallel={plan}")):
        with assembled(cfg, ranks_of_a_host(world), FAKE) as loop:
            parameters = loop.state.trained_parameters()
            found.append({name: local_part(parameter) for name, parameter in parameters.items()})
    plain, narrow = found
    assert plain.keys() == narrow.keys()
    assert all(torch.equal(plain[name], narrow[name]) for name in plain)


def test_the_plan_names_the_layers() -> None:
    """Four tp ranks leave 8 rows of wk and wv to each, which float8 does not take."""
    for plan, world, kv in (("fsdp", 4, True), ("tp", 4, False), ("tp", 2, True)):
        job = preflight(float8("tensorwise", f"parallel={plan}"), World(size=world, local_size=world))
        kinds = {name.split(".", 2)[-1] for name in job.plan.float8}
        wide = {"attention.wq", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"}
        assert kinds == wide | ({"attention.wk", "attention.wv"} if kv else set())
        assert "matmuls in float8: layers.{0-1}.attention.wq, " in plan_text(job.model, job.plan)
    in_blocks = preflight(
        float8("tensorwise", "parallel=none", "model.blocks=[layers.1]"), World()
    ).plan.float8
    assert len(in_blocks) == 7
    assert all(name.startswith("layers.1.") for name in in_blocks)


def losses(world: World, cfg: Config) -> list[float]:
    return [step.loss for step in trace_run(cfg, corpus(), world, STEPS).steps]


@cache
def bfloat16_losses() -> list[float]:
    return losses(World(), config(*BFLOAT16, "parallel=none"))


@pytest.mark.parametrize(
    ("plan", "world", "recipe"),
    [
        ("none", 1, "tensorwise"),
        ("fsdp_tp", 4, "rowwise"),
        exhaustive("tp", 2, "tensorwise"),
        exhaustive("fsdp", 2, "tensorwise"),
        exhaustive("sp", 4, "tensorwise"),
        exhaustive("none", 1, "rowwise"),
    ],
)
def test_it_learns_as_bfloat16_does(ranks: Ranks, plan: str, world: int, recipe: str) -> None:
    checkpointed = "parallel.activation_checkpointing=" + ("selective" if "tp" in plan else "none")
    found = ranks.run(world, losses, float8(recipe, f"parallel={plan}", checkpointed))
    assert all(each == found[0] for each in found)
    plain = bfloat16_losses()
    assert plain[-1] < plain[0] - 0.01
    assert found[0] == pytest.approx(plain, rel=2e-3)
    assert found[0] != plain


def test_ledgers_claim_what_they_know() -> None:
    """Weights and gradients go over the data axes as in bfloat16; scales are agreed on over tp, by no formula."""
    emulated = ("train.float8=tensorwise", "train.float8_emulated=true")
    sharded = counted_step(4, *BFLOAT16, "parallel=fsdp", *emulated)
    assert sharded.sent == sharded.expected.sent == counted_step(4, *BFLOAT16, "parallel=fsdp").sent
    assert sharded.expected.held["activations"] is None
    split = counted_step(4, *BFLOAT16, "parallel=tp", *emulated)
    assert split.expected.sent is None
    assert split.sent != counted_step(4, *BFLOAT16, "parallel=tp").sent


H100, A100 = (9, 0), (8, 0)


@pytest.mark.parametrize(
    ("recipe", "capability", "why"),
    [
        ("tensorwise", None, "a CPU has no float8 matmuls"),
        ("tensorwise", A100, "it needs a GPU of compute capability 8.9, and this one has 8.0"),
        ("rowwise", (8, 9), "it needs a GPU of compute capability 9.0, and this one has 8.9"),
        ("rowwise", H100, None),
    ],
)
def test_a_device_that_cannot_is_refused(
    recipe: str, capability: tuple[int, int] | None, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda:0" if capability else "cpu")
    train = TrainConfig(float8=Float8(recipe))
    if why is None:
        check_float8(train, device)
        return
    with pytest.raises(ConfigError, match=re.escape(f"train.float8={recipe}: {why}; none on this device")):
        check_float8(train, device)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"torchao is not installed: pip install 'tpresearch\[float8\]'; "):
        check_float8(train, device)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["train.float8_emulated=false"], "a CPU has no float8 matmuls; none on this device"),
        (["train.dtype=float32"], "what surrounds its matmuls is bfloat16, and train.dtype=float32"),
        (["train.float8=none"], "train.float8=none leaves nothing to emulate"),
        (["data.seq_len=15", "train.micro_batch_size=2"], "a micro-batch has 30"),
        (
            ["model.dim=56", "model.n_heads=4", "model.ffn_dim=200"],
            "no linear layer in a block of llama2_debug has sizes",
        ),
    ],
)
def test_what_cannot_be_float8_is_refused(overrides: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        preflight(float8("tensorwise", "parallel=none", *overrides), World())


def test_it_is_not_held_to_one_process() -> None:
    with pytest.raises(ConfigError, match="equality with one process is not claimed"):
        check_plan(float8("rowwise", "parallel=fsdp"))
