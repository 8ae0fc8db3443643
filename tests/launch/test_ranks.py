"""Several ranks behave as one job: one line when refused, one folder, one writer, one voice."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.launches import PROGRAM, Command

pytestmark = pytest.mark.cli


def test_a_refused_config_is_one_line_over_all_ranks(torchrun: Command, tmp_path: Path) -> None:
    done = torchrun(2, "train.stepz=3")
    line = "error: train.stepz=3: no such key; nearest is train.steps; try: "
    assert done.err == f"{line}torchrun --nproc-per-node=2 {PROGRAM} train.steps=3\n"
    assert (done.code, done.out) == (2, "")
    assert not list(tmp_path.iterdir())


def test_a_sweep_inside_torchrun_is_refused_once_also_when_restarted(torchrun: Command) -> None:
    done = torchrun(2, "-m", "train.steps=1,2", restarts=1)
    assert len(done.refusals) == 1
    assert done.refusals[0].startswith(
        "error: hydra.mode=MULTIRUN: one failing rank would hang a sweep inside torchrun; "
    )
    assert done.refusals[0].endswith(f"; try: python {PROGRAM} -m train.steps=1,2")


def test_ranks_that_start_apart_share_a_folder_also_after_a_restart(
    torchrun: Command, tmp_path: Path
) -> None:
    done = torchrun(2, "name=fails_once", restarts=1, JITTER_S="1.2")
    assert done.code == 0, done.err
    assert len(done.folders) == 2
    (folder,) = set(done.folders)
    assert list(tmp_path.glob("outputs/*/*/*")) == [Path(folder)]
    assert done.records == [".hydra", "None"]
    # The first attempt failed on rank 0 at once; what a rank of both attempts said is all in its file.
    assert (Path(folder) / "ranks" / "rank-00000.log").read_text().count("training llama2_tiny") == 2


def test_other_ranks_are_heard_in_their_own_files_only(torchrun: Command) -> None:
    done = torchrun(2, "name=bug")
    assert done.refusals == []
    assert "warned by rank 0" in done.err
    assert "python warned rank 0" in done.err
    assert "warned by rank 1" not in done.err
    assert "python warned rank 1" not in done.err
    assert done.err.count("ValueError: not the user's fault") == 1  # in torchrun's report
    folder = Path(done.folders[0])
    of_rank_1 = (folder / "ranks" / "rank-00001.log").read_text()
    for said in ("warned by rank 1", "python warned rank 1", "ValueError: not the user's fault"):
        assert said in of_rank_1
    assert "rank 1" not in (folder / "train.log").read_text()
