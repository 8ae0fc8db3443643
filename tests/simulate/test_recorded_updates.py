"""The optimizer's part of a simulated step: its ops, the bytes that they move, and what it holds."""

from __future__ import annotations

import pytest
from support.composed import config

from tpresearch.config.schema import Config
from tpresearch.config.validate import validate
from tpresearch.plan.meta import meta_model
from tpresearch.simulate.device_memory import peak_moment
from tpresearch.simulate.fake_step import record
from tpresearch.simulate.prices import moved_bytes
from tpresearch.simulate.trace import Trace


def recorded(cfg: Config, world: int) -> Trace:
    return record(cfg, validate(cfg, world))


@pytest.mark.parametrize("compiled", [False, True])
def test_an_update_with_moments_of_a_dtype_of_their_own_is_an_op_per_weight(compiled: bool) -> None:
    words = "optimizer.moment_dtype=bfloat16", f"optimizer.compile={compiled}"
    ops = recorded(config("model=llama2_debug", "parallel=fsdp", *words), 2).end
    names = [op.name for op in ops if op.kind == "optimizer"]
    assert names == ["adamw_" if compiled else "adamw_ in plain torch"] * (2 * 9 + 3)


def test_split_masters_hold_2_bytes_less_per_weight_and_move_2_bytes_less() -> None:
    words = "model=llama2_debug", "parallel=none", "train.dtype=bfloat16", "optimizer.compile=true"
    whole, split = (
        recorded(config(*words, f"optimizer.split_masters={splits}"), 1) for splits in (False, True)
    )
    elements = sum(parameter.numel() for parameter in meta_model(config(*words).model).parameters())
    saved = [sum(peak_moment(trace.memory).values()) for trace in (whole, split)]
    assert saved[0] - saved[1] == 2 * elements
    updates = [[op for op in trace.end if op.name == "adamw_"] for trace in (whole, split)]
    moved = [sum(map(moved_bytes, ops)) for ops in updates]
    assert len(updates[0]) == len(updates[1]) == 2 * 9 + 3
    assert moved[0] - moved[1] == pytest.approx(2 * elements, rel=1e-3)
