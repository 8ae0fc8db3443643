"""The record on disk: complete rows, no invented figures, and nothing lost to a kill."""

from __future__ import annotations

import json
import math
import os
import shutil
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.example_run import row

from tpresearch.track.metrics_file import MetricsFile
from tpresearch.track.names import NAMES, complete_row
from tpresearch.track.record import (
    measured_from,
    read_metrics,
    record_resumption,
    summary_figures,
    was_begun,
    write_atomically,
    write_config,
    write_plan,
    write_summary,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def test_a_row_has_every_metric_and_null_for_what_is_undefined(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    metrics.append(row(1, **{"train/loss": float("nan"), "train/grad_norm": float("inf")}))
    written = json.loads((tmp_path / "metrics.jsonl").read_text())  # before close: a killed run keeps it
    assert tuple(written) == NAMES
    undefined = {name for name, value in written.items() if value is None}
    assert undefined == {"train/loss", "train/grad_norm", "val/loss", "perf/mfu", "perf/mfu_causal"}
    assert written["train/tokens"] == 3072


def test_an_undeclared_metric_is_refused_by_name() -> None:
    with pytest.raises(KeyError, match=r"train/los is logged but not declared.*names\.py"):
        complete_row({"train/los": 1.0})


def test_a_row_without_its_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without train/step"):
        MetricsFile(tmp_path).append({"train/loss": 1.0})
    assert read_metrics(tmp_path) == []


def test_a_resumed_run_appends_and_the_later_row_of_a_step_counts(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path)
    for step in (1, 2, 3):
        first.append(row(step))
    first.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-40])  # killed while it wrote step 3
    second = MetricsFile(tmp_path)  # resumed from the checkpoint of step 1
    for step in (2, 3, 4):
        second.append(row(step, **{"train/loss": 100.0 + step}))
    second.close()
    rows = [(r["train/step"], r["train/loss"]) for r in read_metrics(tmp_path)]
    assert rows == [(1, 8.1875), (2, 102.0), (3, 103.0), (4, 104.0)]


def test_rows_after_the_step_that_a_run_resumes_from_are_kept_apart_each_time(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    for lines, step, kept in (((1, 2, 3, 4), 2, [1, 2]), ((3, 4, 4), 4, [1, 2, 3, 4]), ((), 3, [1, 2, 3])):
        for each in lines:
            metrics.append(row(each))
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"train/step": ')  # and killed
        metrics = MetricsFile(tmp_path)
        metrics.truncate_after(step)
        left = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["train/step"] for line in left] == kept
    cut = (tmp_path / "metrics.cut.jsonl").read_text()
    starts = [line.partition(",")[0].removeprefix('{"train/step": ') for line in cut.splitlines()]
    assert starts == ["3", "4", "", "4", "", "4", ""]


def test_a_run_s_speed_is_that_of_the_steps_that_its_last_plan_took(tmp_path: Path) -> None:
    write_plan(tmp_path, "tp", 0)
    assert measured_from(tmp_path, 8, 8) == 0
    for step in (4, 8):
        record_resumption(tmp_path, {"step": step})
    assert [measured_from(tmp_path, step, 8) for step in (6, 8)] == [6, 4]
    write_plan(tmp_path, "fsdp", 8)
    assert measured_from(tmp_path, 8, 8) == 8


def test_a_start_from_a_checkpoint_is_gone_on_with_unless_it_has_ended_or_is_another(tmp_path: Path) -> None:
    config = {"resume": "run/checkpoints/step-00000004", "seed": 0}
    assert not was_begun(tmp_path, config)
    write_config(tmp_path, config)
    record_resumption(tmp_path, {"step": 4})
    assert was_begun(tmp_path, config)
    assert not was_begun(tmp_path, config | {"seed": 1})
    for status, goes_on in {
        "preempted": True,
        "failed": True,
        "interrupted": False,
        "completed": False,
    }.items():
        write_summary(tmp_path, {"status": status})
        assert was_begun(tmp_path, config) == goes_on
    (tmp_path / "summary.json").unlink()
    record_resumption(tmp_path, {"step": 6})
    assert not was_begun(tmp_path, config), "it has gone on from another since"


def test_medians_leave_out_every_row_that_covers_a_warm_up_step() -> None:
    rows = [complete_row(row(step)) for step in range(1, 9)]
    figures = summary_figures(rows, warmup_steps=5)
    assert figures["perf/tokens_per_second"] == 6007.0  # of steps 6, 7 and 8
    assert figures["perf/step_time_s"] == pytest.approx(0.57)
    assert figures["perf/mfu"] is None
    assert figures["train/loss"] == 7.75
    assert figures["memory/peak_bytes"] == 1_000_008
    every_fourth = [rows[3], rows[7]]  # step 8 stands for steps 5 to 8, and 5 is of the warm-up
    assert summary_figures(every_fourth, warmup_steps=5)["perf/tokens_per_second"] is None
    assert summary_figures(every_fourth, warmup_steps=4)["perf/tokens_per_second"] == 6008.0


def test_a_resumed_run_tells_its_own_speed_and_the_last_evaluation_there_was() -> None:
    rows = [complete_row(row(step, **{"memory/peak_bytes": 900 // step})) for step in range(1, 7)]
    figures = summary_figures(rows, warmup_steps=1, start_step=4)
    assert figures["memory/peak_bytes"] == 180  # of step 5
    assert figures["perf/tokens_per_second"] == 6006.0  # of step 6: step 5 warmed up this process
    assert figures["val/loss"] == 7.5  # of step 4


def test_a_run_that_ends_in_nan_has_not_the_held_out_loss_of_before() -> None:
    rows = [complete_row(row(step, **{"train/loss": math.nan if step > 5 else 4.0})) for step in range(1, 8)]
    assert summary_figures(rows[:5], warmup_steps=1)["val/loss"] == 7.5  # of step 4
    assert summary_figures(rows, warmup_steps=1)["val/loss"] is None
    assert summary_figures([*rows, rows[3] | {"train/loss": None}], warmup_steps=1)["val/loss"] == 7.5


def test_a_run_without_rows_has_no_figures() -> None:
    assert set(summary_figures([], warmup_steps=5).values()) == {None}


def test_a_summary_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError("No space left on device")

    write_summary(tmp_path, {"status": "completed"})
    write_summary(tmp_path, {"status": "completed", "entropy": float("nan"), "mesh": {"tp": float("inf")}})
    whole = {"status": "completed", "entropy": None, "mesh": {"tp": None}}
    assert json.loads((tmp_path / "summary.json").read_text()) == whole
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_summary(tmp_path, {"status": "failed"})
    assert json.loads((tmp_path / "summary.json").read_text()) == whole
    assert [path.name for path in tmp_path.glob("*summary*")] == ["summary.json"]


def test_rows_wait_for_room_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    metrics, room = MetricsFile(tmp_path), [True, False, False, True]
    write = FileIO.write

    class Disk(FileIO):
        def write(self, data: ReadableBuffer, /) -> int:
            if not room[0]:
                raise OSError(28, "No space left on device")
            return write(self, bytes(data)[:100])  # and never all at once

    metrics._file = Disk(tmp_path / "metrics.jsonl", "a+")
    for step in (1, 2, 3, 4):
        metrics.append(row(step))
        del room[0]
        room.append(False)
    assert [r["train/step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert [record.message for record in caplog.records] == [
        "metrics.jsonl cannot be written (No space left on device): rows wait for room"
    ]
    assert metrics.close() is None
    lacking = MetricsFile(tmp_path)
    lacking._file = Disk(tmp_path / "metrics.jsonl", "a+")
    lacking.append(row(5))
    assert lacking.close() == "No space left on device"


def test_rows_outlive_their_folder(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    metrics.append(row(1))
    shutil.rmtree(tmp_path)
    metrics.append(row(2))
    assert metrics.close() is None
    assert [r["train/step"] for r in read_metrics(tmp_path)] == [1, 2]


def test_a_file_may_have_a_path_in_it_that_is_not_utf8(tmp_path: Path) -> None:
    folder = os.fsdecode(b"caf\xe9")
    write_atomically(tmp_path / "page", f"runs in {folder}")
    assert (tmp_path / "page").read_bytes() == b"runs in caf\xe9"


def test_a_run_that_resumes_from_an_older_checkpoint_keeps_the_config_up_to_that(tmp_path: Path) -> None:
    """And none up to a later step, from which it had resumed before."""
    changes = [("ddp", 0), ("fsdp", 100), ("tp", 200)]
    cases = {("sp", 50): ["ddp"], ("ddp", 50): [], ("sp", 100): ["ddp"], ("sp", 150): ["ddp", "fsdp"]}
    for (plan, step), kept in cases.items():
        (folder := tmp_path / f"{plan}-{step}").mkdir()
        for each in [*changes, (plan, step)]:
            write_config(folder, {"parallel": each[0]}, each[1])
        steps = [100, step] if step > 100 else [step]
        names = [f"config.step-{at:08}.yaml" for at in steps[: len(kept)]]
        plans = dict(zip([*names, "config.yaml"], [*kept, plan], strict=True))
        assert {path.name: path.read_text() for path in folder.iterdir()} == {
            name: f"parallel: {each}\n" for name, each in plans.items()
        }


def test_a_config_that_led_to_no_checkpoint_is_not_kept_as_that_of_the_steps_before(tmp_path: Path) -> None:
    """As of a run that is killed soon after it has resumed, and resumes once more with another."""
    for plan, step in (("ddp", 0), ("fsdp", 100), ("tp", 100)):
        write_config(tmp_path, {"parallel": plan}, step)
    kept = {path.name: path.read_text() for path in tmp_path.glob("config*")}
    assert kept == {"config.yaml": "parallel: tp\n", "config.step-00000100.yaml": "parallel: ddp\n"}
