"""Runs to compare, left by the tracker itself: of a dozen steps that nobody trained."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from tpresearch.compare.groups import Group, group_each_run
from tpresearch.compare.runs import find_runs
from tpresearch.config.choices import Dtype
from tpresearch.config.model import ModelConfig, Rule
from tpresearch.config.schema import Config, DataPlan, ParallelConfig, TensorPlan
from tpresearch.ledger.entries import Entry, Expected, MemoryUse, StepLedger
from tpresearch.track.tracker import RunFacts, Tracker

TOKENS_PER_STEP = 3072
PLANS = {
    "none": ParallelConfig(),
    "tp": ParallelConfig("tp", TensorPlan.tp),
    "fsdp": ParallelConfig("fsdp", None, DataPlan.fsdp),
    "fsdp_tp": ParallelConfig("fsdp_tp", TensorPlan.sp, DataPlan.fsdp),
}
PHASES = ("data", "forward", "loss", "backward", "clip", "optimizer")


def falling(step: int) -> float:
    return 8.0 - step / 16


def entry(axis: str, collective: str, sent: int, phase: str = "forward") -> Entry:
    return Entry(axis, phase, "dtensor", collective, 2, 2 * sent, sent)


@dataclass
class Made:
    """One run: what it was told, and what it is to have measured."""

    plan: str = "none"
    mesh: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    lr: float = 3e-3
    dtype: Dtype = Dtype.float32
    keep_gradients: bool = False
    global_batch_size: int = 24
    vocab_size: int = 4096
    max_tokens: int | None = None
    held_out_every: int = 20
    settings: Mapping[str, object] = field(default_factory=dict)
    """More of them: `data.seq_len`."""
    name: str | None = None
    steps: int = 12
    budget: int = 100
    """In steps; the run may end before."""
    log_every: int = 1
    loss: Callable[[int], float | None] = falling
    speed: float = 1000.0
    """Tokens per second per device."""
    mfu: float | None = None
    device: str = "cpu"
    memory: int = 2**30
    sent: list[Entry] = field(default_factory=list)
    expected: list[Entry] | None = None
    corpus_hash: str = "c0ffee"
    unigram_entropy: float = 6.5
    error: Exception | None = None

    @property
    def ranks(self) -> int:
        return math.prod(self.mesh.values())

    def config(self) -> Config:
        rule = Rule(match="layers.*.attention.w[qkv]", style="colwise", units=["n_heads"])
        target = "tpresearch.models.llama2.Llama2"
        model = ModelConfig("llama2_debug", target, {"dim": 64}, ["layers.*"], {"sp": {"qkv": rule}})
        cfg = Config(model=model, parallel=PLANS[self.plan])
        cfg.train.seed, cfg.train.global_batch_size = self.seed, self.global_batch_size
        cfg.tokenizer.vocab_size, cfg.optimizer.lr = self.vocab_size, self.lr
        cfg.data.max_tokens, cfg.data.held_out_every = self.max_tokens, self.held_out_every
        cfg.train.dtype, cfg.defects.keep_gradients = self.dtype, self.keep_gradients
        cfg.train.steps = self.budget
        for key, value in self.settings.items():
            section, _, name = key.partition(".")
            setattr(getattr(cfg, section), name, value)
        cfg.logger.wandb, cfg.logger.name = False, self.name
        return cfg

    def row(self, step: int) -> dict[str, float | None]:
        return {
            "train/step": step,
            "train/tokens": step * TOKENS_PER_STEP,
            "train/loss": self.loss(step),
            "train/grad_norm": 1 + 1 / step,
            "train/lr": self.lr,
            "val/loss": falling(step) + 0.25 if step % 4 == 0 else None,
            "perf/step_time_s": TOKENS_PER_STEP / (self.speed * self.ranks),
            "perf/tokens_per_second": self.speed * self.ranks,
            "perf/tokens_per_second_per_device": self.speed,
            "perf/mfu": self.mfu,
            **{f"time/{phase}_s": 0.1 * (1 + i) for i, phase in enumerate(PHASES)},
            "memory/peak_bytes": self.memory,
            "comm/bytes_per_step": sum(each.sent_bytes for each in self.sent),
        }

    def write(self, folder: Path) -> Path:
        """The run's folder, as a training leaves it."""
        cfg = self.config()
        facts = RunFacts(self.ranks, self.mesh, 622_912, self.device, self.corpus_hash, self.unigram_entropy)
        console = Console(file=io.StringIO(), width=120)
        tracker = Tracker(cfg, folder, facts, self.steps, console=console, plan="the plan")
        held = [MemoryUse("parameters", 2 * 2**20, 2 * 2**20), MemoryUse("activations", 9 * 2**20, 6 * 2**20)]
        expected = self.sent if self.expected is None else self.expected
        tracker.record_ledger(StepLedger(self.sent, held, None, Expected(expected, {})))
        for step in range(self.log_every, self.steps + 1, self.log_every):
            tracker.log(self.row(step))
        if self.error is None:
            tracker.finish()
        else:
            tracker.finish(status="failed", error=f"{type(self.error).__name__}: {self.error}")
        return folder


def groups_of(folder: Path, *runs: Made) -> list[Group]:
    for index, run in enumerate(runs):
        run.write(folder / str(index))
    found = find_runs([str(folder)]).runs
    return group_each_run(found)
