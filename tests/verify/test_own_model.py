"""A researcher's own model joins by a module, a conf/model file and a conf/plan file, all outside the package."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from support.commands import ROOT
from support.composed import config, corpus
from support.marks import exhaustive
from support.traces import CLIP, PLANS, agree

from tpresearch.config import Config, ConfigError
from tpresearch.config.validate import validate
from tpresearch.config.world import World
from tpresearch.train.preflight import plan_model
from tpresearch.verify.ranks import Ranks
from tpresearch.verify.trace import RunTrace, trace_run

MODULE = '''
"""A gated network with layer norms, one style of its own, biases and a buffer: nothing that the package ships."""
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel


class Mine(ColwiseParallel):
    def __init__(self, gather):
        super().__init__()
        assert gather is False


class Layer(nn.Module):
    def __init__(self, width, inner, owns):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width)) if owns else None
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.gate = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def reset_parameters(self):
        nn.init.uniform_(self.scale, 0.5, 1.5)

    def forward(self, x):
        y = self.norm(x)
        if self.scale is not None:
            y = y * self.scale
        return x + self.down(torch.tanh(self.up(y)) * self.gate(y))


class Net(nn.Module):
    def __init__(self, vocab_size, width, inner, depth, owns):
        super().__init__()
        self.shift = nn.Parameter(torch.empty(width)) if owns else None
        self.embed = nn.Embedding(vocab_size, width)
        self.stack = nn.ModuleList(Layer(width, inner, owns) for _ in range(depth))
        self.head = nn.Linear(width, vocab_size)
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def reset_parameters(self):
        nn.init.normal_(self.shift)

    def reset_buffers(self):
        self.scale.fill_(0.5)

    def forward(self, tokens):
        x = self.embed(tokens) * self.scale
        if self.shift is not None:
            x = x + self.shift
        for layer in self.stack:
            x = layer(x)
        return self.head(x)


class Shared(nn.Module):
    """One gate for all features: its output is whole, and meets a shard."""

    def __init__(self, width, inner):
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.gate = nn.Linear(width, 1)
        self.down = nn.Linear(inner, width)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)) * self.gate(x))


class SharedNet(nn.Module):
    def __init__(self, vocab_size, width, inner, depth, owns):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = Shared(width, inner)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.mlp(self.norm(x)))
'''
MODEL = """
# A model of one's own.
defaults:
  - /plan/own@_here_
name: own
_target_: own_net.Net
vocab_size: ${tokenizer.vocab_size}
width: 16
inner: 32
depth: 2
owns: false
"""
PLAN = """
# Its plan.
blocks: [stack.*]
plans:
  tp:
    embed: {match: embed, style: colwise, dst: replicate}
    up:    {match: stack.*.up, _target_: own_net.Mine, gather: false}
    gate:  {match: stack.*.gate, style: colwise}
    down:  {match: stack.*.down, style: rowwise}
    head:  {match: head, style: colwise, dst: logits}
  sp:
    embed: {match: embed, style: rowwise, src: replicate, dst: shard:1}
    norm:  {match: stack.*.norm, style: sequence}
    up:    {match: stack.*.up, style: colwise, src: shard:1}
    gate:  {match: stack.*.gate, style: colwise, src: shard:1}
    down:  {match: stack.*.down, style: rowwise, dst: shard:1}
    head:  {match: head, style: colwise, src: shard:1, dst: logits}
"""

EVERY_DAY = ("tp", "fsdp_tp")
"""The second has the rules of sp within it; hsdp has the model below every day."""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    for name, text in {
        "own_net.py": MODULE,
        "conf/model/own.yaml": MODEL,
        "conf/plan/own.yaml": PLAN,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def job(world: World, cfg: Config, path: str) -> RunTrace | None:
    if path not in sys.path:
        sys.path.insert(0, path)
    result = trace_run(cfg, corpus(), world, 3)
    return result if world.rank == 0 else None


def own_config(own: Path, *overrides: str) -> Config:
    return config(
        f"hydra.searchpath=[file://{own}/conf]",
        "model=own",
        "train.dtype=float64",
        f"train.clip_grad_norm={CLIP}",
        "optimizer=sgd",
        "schedule.warmup_steps=1",
        *overrides,
    )


@pytest.mark.parametrize("plan", [plan if plan in EVERY_DAY else exhaustive(plan) for plan in PLANS])
def test_it_trains_under_every_plan_as_on_one_process(ranks: Ranks, own: Path, plan: str) -> None:
    alone = job(World(), own_config(own, "parallel=none"), str(own))
    assert alone is not None
    size = 2 if plan in ("tp", "sp") else 4
    agree(ranks.run(size, job, own_config(own, f"parallel={plan}"), str(own))[0], alone)


@pytest.mark.parametrize("plan", [exhaustive("fsdp"), "hsdp", "tp"])
def test_parameters_may_belong_to_the_root_and_to_a_block(ranks: Ranks, own: Path, plan: str) -> None:
    alone = job(World(), own_config(own, "parallel=none", "model.owns=true"), str(own))
    assert alone is not None
    assert {"shift", "stack.1.scale"} < alone.initial.keys()
    agree(ranks.run(4, job, own_config(own, f"parallel={plan}", "model.owns=true"), str(own))[0], alone)


SHARED = {
    "tp": """{
        up: {match: mlp.up, style: colwise},
        gate: {match: mlp.gate, _target_: own_styles.CopyToShards},
        down: {match: mlp.down, style: rowwise}}""",
    "sp": """{
        embed: {match: embed, style: rowwise, src: replicate, dst: 'shard:1'},
        norm: {match: norm, style: sequence},
        mlp: {match: mlp, style: input, src: 'shard:1', dst: replicate},
        up: {match: mlp.up, style: colwise},
        gate: {match: mlp.gate, _target_: own_styles.CopyToShards},
        down: {match: mlp.down, style: rowwise, dst: 'shard:1'},
        head: {match: head, style: colwise, src: 'shard:1', dst: logits}}""",
}


@pytest.mark.parametrize("plan", SHARED)
def test_a_whole_output_that_meets_a_shard_has_the_style_of_the_page(
    ranks: Ranks, own: Path, plan: str
) -> None:
    page = (ROOT / "docs/plans.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n# mine/styles.py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (own / "own_styles.py").write_text(block)
    rules = " ".join(SHARED[plan].split())
    shared = (
        "model._target_=own_net.SharedNet",
        "model.blocks=[]",
        "~model.plans",
        f"+model.plans.{plan}={rules}",
    )
    alone = job(World(), own_config(own, "parallel=none", *shared), str(own))
    assert alone is not None
    agree(ranks.run(2, job, own_config(own, f"parallel={plan}", *shared), str(own))[0], alone)


def test_a_weight_without_a_rule_is_refused_where_the_sequence_is_split(own: Path) -> None:
    sys.path.insert(0, str(own))
    cfg = own_config(own, "parallel=sp", "model.owns=true")
    with pytest.raises(ConfigError, match="has no sharding rule") as caught:
        plan_model(cfg, validate(cfg, 4))
    assert "shift" in caught.value.why
    assert caught.value.fix == {"+model.plans.sp.root": "{match:.,style:sequence}"}
