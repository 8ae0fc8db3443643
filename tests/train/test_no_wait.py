"""No step makes the host wait for the device: whole steps on fake tensors, of which nothing can be read; and on a device of their
own, to and from which nothing is copied.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.card import Case
from support.composed import config, in_two_parts
from support.counted_steps import PLANS
from support.fake_steps import two_steps
from support.marks import exhaustive
from support.nets import Unused, model
from torch._subclasses.fake_tensor import DataDependentOutputException

EVERY_DAY = {"none", "sp", "hsdp_tp"}


@pytest.mark.parametrize(("plan", "world"), [p if p[0] in EVERY_DAY else exhaustive(*p) for p in PLANS])
def test_a_step_of_a_plan_waits_for_nothing(plan: str, world: int) -> None:
    """In bfloat16, in two micro-batches of three chunks, clipped, and with updates that may be skipped."""
    cfg = config(
        *("model=llama2_debug", f"parallel={plan}", "train.dtype=bfloat16", "train.loss_chunk=6"),
        *("train.on_nonfinite=skip", "train.clip_grad_norm=0.2"),
    )
    two_steps(in_two_parts(cfg, world), world)


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.activation_checkpointing=selective"],
        ["parallel.activation_checkpointing=full", "train.weights=bfloat16", "train.dtype=bfloat16"],
        ["optimizer=sgd", "train.loss_chunk=null"],
        ["optimizer.moment_dtype=bfloat16", "train.on_nonfinite=skip"],
    ],
    ids=" ".join,
)
def test_nor_does_an_option(overrides: list[str]) -> None:
    two_steps(config("model=llama2_debug", "parallel=fsdp_tp", *overrides), 4)


@pytest.mark.parametrize("overrides", [["optimizer.split_masters=true"], []], ids=" ".join)
def test_nor_do_gradients_that_matmuls_add_up(overrides: list[str]) -> None:
    fused = ("parallel=none", "train.dtype=bfloat16", "parallel.gradient_accumulation_fusion=true")
    two_steps(config("model=llama2_debug", "train.micro_batch_size=2", *fused, *overrides), 1)


def test_nor_does_a_weight_that_no_replica_has_a_gradient_of() -> None:
    two_steps(config(*model(Unused), "parallel=ddp"), 2)


SKIPS, SELECTIVE = "train.on_nonfinite=skip", "parallel.activation_checkpointing=selective"
FUSED = ["parallel.gradient_accumulation_fusion=true", "train.micro_batch_size=4"]
SPLIT, NARROW = "optimizer.split_masters=true", "optimizer.moment_dtype=bfloat16"
CASES: list[Case] = [
    ("none", 1, [SKIPS, SELECTIVE, SPLIT, *FUSED]),
    ("fsdp_tp", 4, [SKIPS, SELECTIVE]),
    ("sp", 4, ["optimizer=sgd", "train.loss_chunk=null"]),
]
OTHERS: list[Case] = [
    ("none", 1, ["train.weights=bfloat16", *FUSED]),
    ("ddp", 4, [SKIPS, NARROW]),
    ("tp", 4, [SKIPS, "parallel.loss_parallel=false"]),
    ("tp", 4, [SELECTIVE, "train.float8=tensorwise", "train.float8_emulated=true"]),
    ("sp", 4, [SPLIT, NARROW, "parallel.activation_checkpointing=full"]),
    ("hsdp", 4, [SKIPS]),
    ("hsdp_tp", 8, [SKIPS]),
]


@pytest.mark.parametrize("cases", [CASES, exhaustive(OTHERS)])
def test_all_that_a_step_makes_is_on_the_device(cases: list[Case]) -> None:
    command = [sys.executable, "-m", "support.card", json.dumps(cases)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_wait_would_be_seen() -> None:
    """SGD has no update that can leave itself out: skipping waits for the norm."""
    with pytest.raises(DataDependentOutputException):
        two_steps(
            config("model=llama2_debug", "parallel=none", "optimizer=sgd", "train.on_nonfinite=skip"), 1
        )
