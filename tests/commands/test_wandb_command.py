"""What two ranks under torchrun tell W&B: one run, row for row what metrics.jsonl holds."""

from __future__ import annotations

import pytest
from support.arrivals import logged, only_run
from support.fake_wandb import FakeWandb
from support.trainings import Trained

pytestmark = pytest.mark.cli


def test_two_ranks_are_one_run_under_the_names_that_were_typed(
    run_fsdp: Trained, wandb_server: FakeWandb
) -> None:
    """What else a run consists of there, tests/track/test_wandb_run.py compares."""
    arrived = only_run(wandb_server)
    assert len(run_fsdp.rows) == 4
    assert logged(arrived) == run_fsdp.rows
    assert (arrived.project, arrived.group, arrived.exit_code) == ("tpresearch", "study", 0)
    assert sorted(arrived.tags) == ["cpu", "float32", "fsdp", "llama2_debug", "mine"]
    page = f"{wandb_server.url}/fake/tpresearch/runs/{arrived.name}"
    assert f"W&B: {page}\n" in run_fsdp.done.err
    assert page in run_fsdp.done.out
