"""A run of eight steps: what the loop knows of it and logs."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tpresearch.config.model import ModelConfig, Rule
from tpresearch.config.schema import Config, DataPlan, ParallelConfig, TensorPlan
from tpresearch.track.tracker import RunFacts, Tracker

STEPS = 8
FACTS = RunFacts(
    world_size=4,
    mesh={"dp_replicate": 1, "dp_shard": 2, "tp": 2},
    parameters=18_089_216,
    device="cpu",
    corpus_hash="c0ffee",
    unigram_entropy=6.71,
    tokenizer_hash="7031",
    held_out_rows=96,
)


def example_config() -> Config:
    rule = Rule(match="layers.*.attention.w[qkv]", style="colwise", units=["n_heads"])
    target = "tpresearch.models.llama2.Llama2"
    model = ModelConfig("llama2_tiny", target, {"dim": 256}, ["layers.*"], {"sp": {"qkv": rule}})
    return Config(model=model, parallel=ParallelConfig("fsdp_tp", TensorPlan.sp, DataPlan.fsdp))


def row(step: int, **changes: float | None) -> dict[str, float | None]:
    """A row as the loop logs it: on a CPU, so with no MFU; evaluated at every fourth step."""
    values = {
        "train/step": step,
        "train/tokens": step * 3072,
        "train/loss": 8.25 - step / 16,
        "train/grad_norm": 1.5,
        "train/lr": 0.003,
        "train/skipped_updates": int(step == 3),
        "val/loss": 7.5 if step % 4 == 0 else None,
        "perf/step_time_s": 9.0 if step <= 5 else 0.5 + step / 100,
        "perf/tokens_per_second": 300.0 if step <= 5 else 6000.0 + step,
        "perf/tokens_per_second_per_device": 75.0 if step <= 5 else 1500.0 + step,
        **{f"time/{part}_s": 0.001 for part in ("data", "forward", "loss", "backward", "clip", "optimizer")},
        "memory/peak_bytes": 1_000_000 + step,
        "memory/reserved_bytes": 2_000_000,
        "memory/alloc_retries": 0,
        "comm/bytes_per_step": 12_345_678,
    }
    return values | changes


def log_steps(tracker: Tracker, first: int = 1, last: int = STEPS) -> None:
    for step in range(first, last + 1):
        tracker.log(row(step))


def train(
    tracker: Tracker, first: int = 1, last: int = STEPS, ending: BaseException | signal.Signals | None = None
) -> None:
    """A training loop that ends by itself, by an exception or by a signal."""
    with tracker:
        log_steps(tracker, first, last)
        if isinstance(ending, signal.Signals):
            os.kill(os.getpid(), ending)
        elif ending is not None:
            raise ending


if __name__ == "__main__":
    cfg = example_config()
    train(Tracker(cfg, Path(sys.argv[1]), FACTS, STEPS))
