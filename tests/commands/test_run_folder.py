"""A run folder holds one run, whatever becomes of its terminal and of its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.trainings import TINY, Start

pytestmark = pytest.mark.cli


def test_a_second_run_into_a_folder_has_a_record_of_its_own(train_py: Start, tmp_path: Path) -> None:
    cwd = tmp_path / "cwd"
    first = train_py(*TINY, "train.steps=4", "hydra.run.dir=D")
    anew = *TINY, "train.steps=2", "train.seed=1", "hydra.run.dir=D"
    refused = train_py(*anew)  # where it would go on from the other's checkpoint
    assert (refused.code, len(refused.err.splitlines())) == (2, 1), refused.err
    second = train_py(*anew, "resume=never")
    assert (first.code, second.code) == (0, 0)
    steps = {"D": [1, 2], "D.earlier-1": [1, 2, 3, 4]}
    losses = set()
    for folder, expected in steps.items():
        rows = [json.loads(line) for line in (cwd / folder / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((cwd / folder / "summary.json").read_text())
        assert [row["train/step"] for row in rows] == expected
        assert (summary["steps"], summary["train/loss"]) == (expected[-1], rows[-1]["train/loss"])
        losses.add(summary["train/loss"])
    assert len(losses) == 2
    assert "the record of an earlier run in D is now in D.earlier-1" in second.err


def test_a_terminal_without_the_letters_costs_no_run(train_py: Start, tmp_path: Path) -> None:
    done = train_py(*TINY, "hydra.run.dir=D", "name='é'", PYTHONIOENCODING="ascii")
    assert done.code == 0, done.err
    assert "\\u2013 (no step after" in done.out  # the dash of an undefined speed
    assert json.loads((tmp_path / "cwd" / "D" / "summary.json").read_text())["status"] == "completed"


def test_paths_are_resolved_where_they_were_typed(train_py: Start, tmp_path: Path) -> None:
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    (cwd / "mine.txt").write_text("\n\n".join(f"document {nth} of a few words" for nth in range(300)))
    read = (
        "data=text",
        "data.path=mine.txt",
        "data.cache_dir=cache",
        "tokenizer.vocab_size=260",
        "data.held_out_every=2",
    )
    done = train_py(*TINY, *read, "hydra.run.dir=D", "hydra.job.chdir=true")
    assert done.code == 0, done.err
    assert {path.name for path in cwd.iterdir()} == {"mine.txt", "cache", "D"}
    assert "run    D\n" in done.out
    assert "  cat D/plan.txt" in done.out
    assert " parallel=fsdp " in done.out.partition("next\n")[2]  # what is proposed was judged from there


REFUSED = [
    ("name=../../esc", "name=../../esc: a folder below outputs/ is named by it"),
    ("name=''", "name=: a folder below outputs/ is named by it"),
    ("hydra.run.dir=", "hydra.run.dir=: names no folder"),
    ("data.cache_dir=''", "data.cache_dir=: names no folder"),
    (
        "parallel.name=tp",
        "parallel.name=tp: parallel=none was chosen, and the record would name another plan",
    ),
]


@pytest.mark.parametrize(("typed", "says"), REFUSED, ids=[row[0][:20] for row in REFUSED])
def test_names_that_no_folder_or_record_should_have_are_refused(
    train_py: Start, tmp_path: Path, typed: str, says: str
) -> None:
    done = train_py(*TINY, typed)
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1), done.err
    assert done.err.startswith(f"error: {says}; ")
    assert done.command_to_try[-len(TINY) :] == [*TINY]
    assert not list((tmp_path / "cwd").iterdir())
