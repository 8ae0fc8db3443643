"""What two ranks under torchrun tell W&B: one run, row for row what metrics.jsonl holds."""

from __future__ import annotations

import pytest
import yaml
from support.fake_wandb import FakeRun, FakeWandb
from support.trainings import Trained

pytestmark = pytest.mark.cli


@pytest.fixture
def arrived(run_fsdp: Trained, wandb_server: FakeWandb) -> FakeRun:
    (run,) = wandb_server.runs.values()
    return run


def test_the_history_is_the_record(run_fsdp: Trained, arrived: FakeRun) -> None:
    history = [
        {key: value for key, value in row.items() if not key.startswith("_")} for row in arrived.history
    ]
    assert len(history) == 4
    assert history == run_fsdp.rows


def test_the_run_is_named_and_filed(arrived: FakeRun) -> None:
    assert arrived.display_name == "llama2_debug/fsdp2"
    assert (arrived.project, arrived.group, arrived.job_type) == ("tpresearch", "study", "train")
    assert sorted(arrived.tags) == ["cpu", "float32", "fsdp", "llama2_debug", "mine"]
    assert arrived.exit_code == 0


def test_its_config_is_the_resolved_one(run_fsdp: Trained, arrived: FakeRun) -> None:
    theirs = {key: value for key, value in arrived.config.items() if key != "_wandb"}
    ours = yaml.safe_load((run_fsdp.folder / "config.yaml").read_text())
    assert theirs == {key: value for key, value in ours.items() if value != {}}  # which W&B leaves out


def test_its_summary_is_the_summary(run_fsdp: Trained, arrived: FakeRun) -> None:
    defined = {key: value for key, value in run_fsdp.json("summary.json").items() if value is not None}
    assert defined.items() <= arrived.summary.items()


def test_its_page_is_told(run_fsdp: Trained, arrived: FakeRun, wandb_server: FakeWandb) -> None:
    page = f"{wandb_server.url}/fake/tpresearch/runs/{arrived.name}"
    assert f"W&B: {page}\n" in run_fsdp.done.err
    assert page in run_fsdp.done.out
