"""`resume=RUN`: a run goes on in its own folder, on other ranks; what it was typed with is typed again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import Done
from support.composed import config
from support.trainings import TINY, Trained

from tpresearch.checkpoint.disk import complete_checkpoints
from tpresearch.config import ConfigError
from tpresearch.config.world import World
from tpresearch.hf.files import weights_hash
from tpresearch.track.record import read_summary
from tpresearch.train.preflight import preflight

pytestmark = pytest.mark.cli
Start = Callable[..., Done]
LOGS = (
    "train.log",
    "ranks/rank-00000.log",
    ".hydra/overrides.yaml",
    ".hydra/hydra.yaml",
    ".hydra/config.yaml",
)


def files(run: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"
    }


def test_a_run_resumes_under_another_plan_and_another_experiment_is_refused(
    train: Start, tmp_path: Path
) -> None:
    run = tmp_path / "mine"
    first = train(None, tmp_path, *TINY, "train.dtype=float64", f"hydra.run.dir={run}")
    assert first.code == 0, first.err
    assert [found.step for found in complete_checkpoints(run)] == [2]
    before = files(run)

    refused = train(None, tmp_path, "resume=mine", "optimizer.lr=0.5")
    assert refused.code == 2
    assert refused.refusal.startswith(
        "error: optimizer.lr=0.5: this run was started with 0.003; the same, or a new run"
    )
    offered = f"init_from={run}/checkpoints/step-00000002"
    assert set(refused.command_to_try[2:]) == {"optimizer.lr=0.5", "train.dtype=float64", offered, *TINY}
    narrow = train(None, tmp_path, "resume=mine", "train.weights=bfloat16")
    assert "train.dtype=float64 computes on wider numbers than that" in narrow.refusal
    assert {"train.dtype=bfloat16", offered, *TINY} <= set(narrow.command_to_try), (
        "resumed, it would be refused"
    )
    no_room = train(None, tmp_path, "resume=mine", "train.steps=1000000000", "checkpoint.keep=1000000000")
    assert "free, and " in no_room.refusal
    assert files(run) == before, "a refused command touches nothing that the next one would repeat"

    on = train(2, tmp_path, "resume=mine", "parallel=fsdp", "train.steps=4", "checkpoint.keep=1")
    assert on.code == 0, on.err
    assert "the budget has grown from 2 to 4 steps" in on.err
    assert "the learning rate of the next step stays" in on.err, "in the warm-up"
    went = Trained(on, run)
    assert went.column("train/step") == [1, 2, 3, 4]
    summary = went.json("summary.json")
    assert (summary["status"], summary["steps"], summary["parallel"]) == ("completed", 4, "fsdp")
    assert summary["resumed"] == [{"step": 2, "world_size": 2, "mesh": {"dp_shard": 2}}]
    assert summary["comm/bytes_per_step"] > 0, "the ledger is measured again"
    assert [found.step for found in complete_checkpoints(run)] == [4]
    assert {"config.step-00000002.yaml", "plan.step-00000002.txt"} <= {path.name for path in run.iterdir()}


def test_a_batch_that_does_not_split_over_the_ranks_that_are_left_is_resumed_on_fewer() -> None:
    cfg = config("model=toy_mlp", "parallel=fsdp", "mesh.dp_shard=3")
    with pytest.raises(ConfigError, match="does not split over 3") as caught:
        preflight(cfg, World(size=3, local_size=3, elastic=True), resumes=True)
    assert (caught.value.fix, caught.value.nproc) == ({"mesh.dp_shard": 2}, 2)


def test_of_a_run_that_was_killed_before_its_first_checkpoint_its_own_command_is_proposed(
    train: Start, tmp_path: Path
) -> None:
    assert train(None, tmp_path, *TINY, "hydra.run.dir=mine").code == 0
    shutil.rmtree(tmp_path / "mine/checkpoints")
    refused = train(None, tmp_path, "resume=mine", "train.steps=4")
    assert refused.refusal.startswith("error: resume=mine: it has no checkpoints/step-*; ")
    again = [word for word in TINY if not word.startswith("train.steps=")]
    assert set(refused.command_to_try[2:]) == {*again, "train.steps=4", "hydra.run.dir=mine"}


def test_first_weights_are_looked_for_only_where_a_run_begins(train: Start, tmp_path: Path) -> None:
    """The run that they came from may be gone by the time that this one goes on."""
    of_run = [*TINY, f"init_from={tmp_path}/first", "hydra.run.dir=mine"]
    assert train(None, tmp_path, *TINY, "hydra.run.dir=first").code == 0
    assert train(None, tmp_path, *of_run).code == 0
    began_with = read_summary(tmp_path / "mine")["initial_weights"]
    assert began_with == weights_hash(f"{tmp_path}/first")
    shutil.rmtree(tmp_path / "first")
    assert train(None, tmp_path, *of_run, "train.steps=3").code == 0
    assert train(None, tmp_path, "resume=mine", "train.steps=4").code == 0
    assert [found.step for found in complete_checkpoints(tmp_path / "mine")] == [3, 4]
    assert read_summary(tmp_path / "mine")["initial_weights"] == began_with
    for begins in (["hydra.run.dir=other"], ["resume=never"]):
        refused = train(None, tmp_path, *of_run, *begins)
        assert (refused.code, refused.refusal.partition(";")[0]) == (
            2,
            f"error: init_from={tmp_path}/first: there is no such folder",
        )
    assert not (tmp_path / "other").exists()
    assert [found.step for found in complete_checkpoints(tmp_path / "mine")] == [3, 4]


def test_a_complete_run_that_is_started_again_is_left_as_it_is(train: Start, tmp_path: Path) -> None:
    again, run = [*TINY, "hydra.run.dir=mine"], tmp_path / "mine"

    def record() -> dict[str, bytes]:
        return {
            name: content for name, content in files(run).items() if name.removeprefix(f"{run}/") not in LOGS
        }

    assert train(None, tmp_path, *again).code == 0
    before = record()
    assert f"{run}/summary.json" in before
    for words in (again, ["resume=mine", "parallel=none"]):
        done = train(None, tmp_path, *words)
        assert done.code == 0, done.err
        assert f"all 2 steps are done: {run}; to continue, set more train.steps" in done.err
        assert record() == before


def test_a_command_that_goes_back_to_a_checkpoint_and_is_killed_goes_on_when_it_is_repeated(
    train: Start, tmp_path: Path
) -> None:
    """As a scheduler repeats it. Ctrl-C ends it on purpose: then it goes back again."""
    run, every = tmp_path / "mine", ["checkpoint.every=1", "checkpoint.keep=9"]
    again = ["resume=mine/checkpoints/step-00000002", "train.steps=5"]

    def went_from(words: list[str], *lost: str) -> int:
        for name in lost:
            shutil.rmtree(run / "checkpoints" / name)
        done = train(None, tmp_path, *words)
        assert done.code == 0, done.err
        return Trained(done, run).json("summary.json")["resumed"][-1]["step"]

    assert train(None, tmp_path, *TINY, *every, "train.steps=4", "hydra.run.dir=mine").code == 0
    assert went_from(again) == 2
    (run / "summary.json").unlink()
    assert went_from(again, "step-00000005", "step-00000002") == 4, "also where it has been pruned since"
    again[0] = "resume=mine/checkpoints/step-00000003"
    assert went_from(again) == 3, "another command"
    (run / "summary.json").write_text('{"status": "interrupted"}')
    assert went_from(again) == 3


def test_first_weights_that_are_damaged_are_refused_in_one_line(train: Start, tmp_path: Path) -> None:
    assert train(None, tmp_path, *TINY, "hydra.run.dir=first").code == 0
    (checkpoint,) = complete_checkpoints(tmp_path / "first")
    (shard,) = checkpoint.folder.glob("*.distcp")
    shard.write_bytes(bytes(len(shard.read_bytes())))
    refused = train(None, tmp_path, *TINY, f"init_from={tmp_path}/first")
    assert refused.code == 2
    said = f"error: init_from={tmp_path}/first: step-00000002 cannot be read: __0_0.distcp is not as it was written;"
    assert refused.refusal.startswith(said)
    assert "Traceback" not in refused.err
