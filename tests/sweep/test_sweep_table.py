"""What a sweep's table says: what differs, what is best, seeds together, and the first cause of a failure."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console
from support.composed import config

from tpresearch.sweep.job import STOPPED_CODE, Job, slots_of
from tpresearch.sweep.outcome import outcome_of
from tpresearch.sweep.table import print_table, seed_table, table_of, write_files


def job(
    folder: Path, number: int, overrides: str, summary: dict[str, Any] | None = None, said: str = ""
) -> Job:
    mine = folder / str(number)
    mine.mkdir(parents=True)
    if summary is not None:
        (mine / "summary.json").write_text(json.dumps({"status": "completed"} | summary))
    (mine / "console.log").write_text(said)
    words = overrides.split()
    group = " ".join(word for word in words if not word.startswith("train.seed"))
    return Job(number, words, mine, 2, 2, False, overrides, group, [], OmegaConf.create())


def test_a_prediction_says_so_and_for_how_many_ranks(tmp_path: Path) -> None:
    """Its job is one process, whose time is not the step's."""
    figures = {"predicted": True, "world_size": 64, "perf/tokens_per_second_per_device": 900.0}
    (row,) = table_of([outcome_of(job(tmp_path, 0, "parallel=tp", figures), 0, 3.0)]).rows
    assert [cell.text for cell in row] == ["0", "tp", "64", "900", "predicted"]
    failed = job(tmp_path, 1, "parallel=tp")
    failed.composed.world_size = 64
    assert [cell.text for cell in table_of([outcome_of(failed, 1, 3.0)]).rows[0]][:3] == ["1", "tp", "2"], (
        "it trains"
    )
    failed.composed.cluster = {"name": "h100_dgx"}
    assert [cell.text for cell in table_of([outcome_of(failed, 1, 3.0)]).rows[0]][:3] == ["1", "tp", "64"]


def test_a_job_takes_gpus_where_its_ranks_will() -> None:
    for words, gpus, taken in (
        (["device=auto"], 4, (4, True)),
        (["device=auto"], 3, (4, False)),
        (["device=cpu"], 8, (4, False)),
        (["device=cuda"], 8, (4, True)),
        (["device=cuda"], 3, (3, True)),
        (["device=cuda", "+cluster=h100_dgx"], 8, (4, False)),
    ):
        assert slots_of(config(*words), 4, gpus) == taken


def test_a_row_a_job_with_the_best_marked(tmp_path: Path) -> None:
    by_axis = {"tp": 2048}
    faster = {"train/loss": 6.0, "perf/tokens_per_second_per_device": 900.0, "wall_time_s": 61.0}
    better = {"train/loss": 5.5, "perf/tokens_per_second_per_device": 800.0, "wall_time_s": 83.0}
    sent = {"comm/bytes_per_step": 2048, "comm/bytes_per_step_by_axis": by_axis}
    jobs = [
        job(tmp_path, 0, "model=toy_mlp parallel=tp", faster | sent),
        job(tmp_path, 1, "model=toy_mlp parallel=sp", better),
    ]
    outcomes = [outcome_of(each, 0, 90.0) for each in jobs]
    table = table_of(outcomes)
    figures = ["loss", "tok/s/device", "communication per step (rank 0)", "time"]
    assert table.header == ["job", "parallel", "ranks", *figures, "status"]
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    jobs[0].composed.logger = {"group": None, "project": "mine", "entity": "us"}
    console = Console(width=200)
    with console.capture() as printed:
        print_table(console, tmp_path, outcomes)
    said = dict(line.split(maxsplit=1) for line in printed.get().splitlines()[-4:])
    assert said == {
        "sweep": f"{tmp_path}/summary.md",
        "compare": f"python -m tpresearch.compare {tmp_path}",
        "upload": f"wandb sync {tmp_path}/wandb/offline-run-*",
        "dashboard": f"python -m tpresearch.dashboard group={str(tmp_path).lstrip('/')} project=mine entity=us",
    }
    assert [[cell.text for cell in row if cell.best] for row in table.rows] == [["900", "1:01"], ["5.500"]]
    write_files(tmp_path, outcomes)
    _, _, row, *_ = (tmp_path / "summary.md").read_text().splitlines()
    assert row == "| 0 | tp | 2 | 6.000 | **900** | 2.0 KiB (tp 2.0 KiB) | **1:01** | completed |"
    with (tmp_path / "summary.csv").open() as file:
        first, second = csv.DictReader(file)
    assert list(first)[:3] == ["model", "parallel", "status"]
    assert list(first)[-2:] == ["error", "folder"]
    assert (first["comm/bytes_per_step_by_axis/tp"], second["train/loss"]) == ("2048", "5.5")
    assert second["folder"] == str(tmp_path / "1")


def test_no_loss_is_the_best_among_those_of_other_tokens(tmp_path: Path) -> None:
    """Per token of a smaller vocabulary it is lower, whatever the model."""
    outcomes = [
        outcome_of(job(tmp_path, n, f"tokenizer.vocab_size={n}", {"train/loss": n, "unigram_entropy": n}), 0)
        for n in (5, 7)
    ]
    assert not any(cell.best for row in table_of(outcomes).rows for cell in row)


def test_seeds_are_taken_together(tmp_path: Path) -> None:
    trained = enumerate([("tp train.seed=0", 5.0), ("tp train.seed=1", 6.0), ("sp train.seed=0", 7.0)])
    jobs = [job(tmp_path, n, f"parallel={plan}", {"train/loss": loss}) for n, (plan, loss) in trained]
    outcomes = [outcome_of(each, 0) for each in jobs]
    seeds = seed_table(outcomes)
    assert seeds
    assert seeds.header == ["parallel", "ranks", "seeds", "loss"]
    assert [[cell.text for cell in row] for row in seeds.rows] == [["tp", "2", "2", "5.500 ± 0.707"]]
    again = dataclasses.replace(
        outcomes[1], job=dataclasses.replace(jobs[1], number=3)
    )  # as lr=0.1,1e-1 does
    repeating = seed_table([*outcomes, again])
    assert repeating
    assert repeating.rows == seeds.rows, "a seed counts once"
    write_files(tmp_path, outcomes)
    assert "| tp | 2 | 2 | 5.500 ± 0.707 |" in (tmp_path / "summary.md").read_text()
    assert seed_table(outcomes[1:]) is None


REPORT = """[rank1]: ValueError: seen first on the way
Root Cause (first observed failure):
[0]:
  rank      : 1 (local_rank: 1)
  exitcode  : 1 (pid: 17)
  error_file: /tmp/x/error.json
  traceback : {}
"""
TRACEBACK = "Traceback (most recent call last):\n    File x\n  torch.OutOfMemoryError: CUDA out of memory"


def test_of_several_nodes_the_earliest_failure_is_the_cause(tmp_path: Path) -> None:
    def said(second: int, why: str) -> str:
        traceback = f"Traceback (most recent call last):\n  ValueError: {why}"
        return f"{REPORT.format(traceback)}  time      : 2026-11-29_10:00:0{second}\n"

    failed = job(tmp_path, 0, "parallel=tp", said=said(5, "peer closed"))
    first = failed.folder / "console-node1.log"
    first.write_text(said(2, "no such file"))
    outcome = outcome_of(failed, 1)
    assert (outcome.error, outcome.log) == ("ValueError: no such file", first)


@pytest.mark.parametrize(
    ("said", "summary", "error"),
    [
        ("error: mesh.tp=3: no\n", {}, "mesh.tp=3: no"),
        (REPORT.format(TRACEBACK), {"error": "gloo: peer closed"}, "OutOfMemoryError: CUDA out of memory"),
        (REPORT.format("Signal 9 (SIGKILL) received by PID 17"), {}, "Signal 9 (SIGKILL) received by PID 17"),
        (
            REPORT.format("RuntimeError: peer closed")
            + "rank 1 was ended by SIGKILL, as by the kernel; errors follow",
            {"error": "gloo: peer closed"},
            "rank 1 was ended by SIGKILL, as by the kernel",
        ),
        ("x\nKeyError: 'a'\n", {"error": "KeyError: 'b'"}, "KeyError: 'b'"),
        ("Traceback\nKeyError: 'a'\n", {}, "KeyError: 'a'"),
        (f"Traceback\nKeyError: {'a' * 5000}\n", {}, f"KeyError: {'a' * 990}..."),
        ("nothing\n", {}, "exit code 1"),
    ],
)
def test_a_failure_is_told_by_its_first_cause(
    tmp_path: Path, said: str, summary: dict[str, Any], error: str
) -> None:
    failed = job(tmp_path, 0, "parallel=tp", {"status": "failed", **summary}, said)
    outcome = outcome_of(failed, 1, 2.0)
    assert (outcome.status, outcome.error) == ("failed", error)
    console = Console(width=200)
    with console.capture() as printed:
        print_table(console, tmp_path, [outcome])
    assert f"job 0 failed: {error}" in printed.get()
    assert f"{failed.folder}/console.log" in printed.get()


def test_over_nodes_the_earliest_failure_is_the_cause(tmp_path: Path) -> None:
    mine = job(tmp_path, 0, "parallel=tp", {"status": "failed", "error": "gloo: peer closed"})
    block = "Root Cause (first observed failure):\n[0]:\n  time : 2026-11-22_10:00:0{}\n  rank : 1\n  {}\n"
    (mine.folder / "console.log").write_text(block.format(7, "RuntimeError: peer closed"))
    (mine.folder / "console-node1.log").write_text(block.format(6, "ValueError: no luck"))
    outcome = outcome_of(mine, 1, 2.0)
    assert outcome.error == "ValueError: no luck"
    assert outcome.log == mine.folder / "console-node1.log"


@pytest.mark.parametrize(("steps", "status"), [(3, "completed"), (2, "preempted")])
def test_a_job_that_is_stopped_after_its_last_step_has_completed(
    tmp_path: Path, steps: int, status: str
) -> None:
    """Where its summary is not that of an earlier start for fewer steps."""
    ended = dataclasses.replace(job(tmp_path, 0, "a=1", {"steps": steps}), steps=3)
    assert outcome_of(ended, STOPPED_CODE).status == status


def test_a_job_that_a_signal_ends_is_no_success(tmp_path: Path) -> None:
    assert outcome_of(job(tmp_path, 0, "a=1"), -11).error == "ended by SIGSEGV"
    assert outcome_of(job(tmp_path, 1, "a=1"), STOPPED_CODE).status == "preempted"
    assert outcome_of(job(tmp_path, 2, "a=1"), None).status == "not started"
