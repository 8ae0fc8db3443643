"""A run from its first row to its summary, however it ends."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from support.example_run import FACTS, STEPS, log_steps, train

from tpresearch.config import Config, ConfigError
from tpresearch.config.compose import as_dict
from tpresearch.launch.stop import StopFlag, Stopped
from tpresearch.ledger.entries import Entry, Expected, MemoryUse, StepLedger
from tpresearch.track import record
from tpresearch.track.record import read_metrics, read_summary
from tpresearch.track.tracker import Tracker

LEDGER = StepLedger(
    [Entry("tp", "forward", "dtensor", "all_reduce", 2, 64, 64)],
    [MemoryUse("parameters", 128, 128)],
    None,
    Expected([Entry("tp", "forward", "dtensor", "all_reduce", 2, 64, 64)], {"parameters": 128}),
)


def no_report(*_: object) -> None:
    raise ZeroDivisionError("division by zero")


@pytest.fixture(autouse=True)
def no_wandb(cfg: Config) -> None:
    cfg.logger.wandb = False


def test_a_completed_run_leaves_config_plan_rows_and_summary(
    track: Callable[..., Tracker], cfg: Config, run_dir: Path
) -> None:
    began = time.monotonic()
    train(track())
    assert yaml.safe_load((run_dir / "config.yaml").read_text()) == as_dict(cfg)
    assert (run_dir / "plan.txt").read_text() == "the plan\n"
    assert [r["train/step"] for r in read_metrics(run_dir)] == list(range(1, STEPS + 1))
    summary = read_summary(run_dir)
    assert 0 < summary.pop("wall_time_s") < time.monotonic() - began
    assert summary == {
        "status": "completed",
        "run_name": "llama2_tiny/fsdp2-tp2",
        "steps": 8,
        "tokens": 24_576,
        "world_size": 4,
        "mesh": {"dp_replicate": 1, "dp_shard": 2, "tp": 2},
        "model": "llama2_tiny",
        "parallel": "fsdp_tp",
        "parameters": 18_089_216,
        "corpus_hash": "c0ffee",
        "device": "cpu",
        "dtype": "float32",
        "weights": "float32",
        "moments": "float32",
        "float8": "none",
        "unigram_entropy": 6.71,
        "tokenizer_hash": "7031",
        "initial_weights": None,
        "held_out_rows": 96,
        "train/loss": 7.75,
        "train/skipped_updates": 1,
        "val/loss": 7.5,
        "perf/step_time_s": pytest.approx(0.57),
        "perf/tokens_per_second": 6007.0,
        "perf/tokens_per_second_per_device": 1507.0,
        "perf/mfu": None,
        "perf/mfu_causal": None,
        **{f"time/{part}_s": 0.001 for part in ("data", "forward", "loss", "backward", "clip", "optimizer")},
        "memory/peak_bytes": 1_000_008,
        "comm/bytes_per_step": 12_345_678,
    }


def test_a_run_that_goes_on_after_its_end_has_no_summary_until_it_ends_again(
    track: Callable[..., Tracker], run_dir: Path
) -> None:
    """Killed meanwhile, it would otherwise count as completed, with the figures of its earlier end."""
    train(track())
    resumed = track(start_step=STEPS)
    assert read_summary(run_dir)["status"] == "completed", "it may still be refused"
    resumed.resume_from(STEPS)
    with pytest.raises(FileNotFoundError):
        read_summary(run_dir)
    resumed.finish()
    assert read_summary(run_dir)["status"] == "completed"


def test_from_an_older_checkpoint_than_the_newest_the_record_continues_after_that(
    track: Callable[..., Tracker], run_dir: Path
) -> None:
    train(track())
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(
            b"\xff\n"
        )  # damage, as by a crash of the host, neither keeps a run from resuming nor is dropped
    resumed = track(start_step=STEPS, plan="another")
    resumed.resume_from(4)
    resumed.finish("failed")
    plans = {path.name: path.read_text() for path in run_dir.glob("plan*")}
    assert plans == {"plan.step-00000004.txt": "the plan\n", "plan.txt": "another\n"}
    found = read_summary(run_dir)
    assert (found["steps"], found["resumed"]) == (4, [{"step": 4, "world_size": 4, "mesh": FACTS.mesh}])
    assert [r["train/step"] for r in read_metrics(run_dir)] == [1, 2, 3, 4]
    *cut, damaged = (run_dir / "metrics.cut.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["train/step"] for line in cut] == [5, 6, 7, 8]
    assert damaged == b"\xff"


@pytest.mark.parametrize("resumptions", ["[{", "5", "[1]", '[{"step": "x"}]', "[" * 100_000])
def test_a_record_that_is_damaged_keeps_no_run_from_resuming(
    track: Callable[..., Tracker], run_dir: Path, resumptions: str
) -> None:
    train(track())
    (run_dir / "resumed.json").write_text(resumptions)
    for name in ("config.yaml", "plan.txt"):
        (run_dir / name).write_bytes(b"\xff")
    resumed = track(start_step=STEPS, plan="another")
    resumed.resume_from(4)
    resumed.finish("failed")
    assert [each["step"] for each in read_summary(run_dir)["resumed"]] == [4]
    assert (run_dir / "plan.txt").read_text() == "another\n"
    kept = [(run_dir / name).read_bytes() for name in ("config.step-00000004.yaml", "plan.step-00000004.txt")]
    assert kept == [b"\xff", b"\xff"], "as it was"


@pytest.mark.parametrize(("lines", "lost"), [(8, ""), (5, "6 to 8"), (0, "1 to 8")])
def test_rows_that_are_lost_are_told_where_a_run_resumes(
    track: Callable[..., Tracker], run_dir: Path, caplog: pytest.LogCaptureFixture, lines: int, lost: str
) -> None:
    train(track())
    rows = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(rows[:lines]))
    caplog.clear()
    resumed = track(start_step=STEPS)
    resumed.resume_from(STEPS)
    resumed.finish()
    said = [record.message for record in caplog.records if "rows" in record.message]
    assert said == ([f"metrics.jsonl has lost the rows of steps {lost}"] if lost else [])


@pytest.mark.parametrize(("plan", "speed"), [("the plan", 6007.0), ("another", None)])
def test_a_run_that_was_killed_after_its_last_step_has_the_figures_of_its_steps(
    track: Callable[..., Tracker], run_dir: Path, plan: str, speed: float | None
) -> None:
    ended = track()
    log_steps(ended)
    ended.record_ledger(LEDGER)
    ended.finish()
    figures = read_summary(run_dir)
    for _ in range(2):  # the first of which is killed too
        resumed = track(start_step=STEPS, plan=plan)
        resumed.resume_from(STEPS)
    resumed.finish()
    found = read_summary(run_dir)
    assert found["perf/tokens_per_second"] == speed
    for name in figures.keys() - {"wall_time_s"} if speed else ():
        assert found[name] == figures[name]


@pytest.mark.parametrize(
    ("ending", "status", "error"),
    [
        (ValueError("no luck\nand much more"), "failed", "ValueError: no luck"),
        (signal.SIGINT, "interrupted", "KeyboardInterrupt"),
        (Stopped(signal.SIGTERM), "preempted", "stopped by SIGTERM"),
    ],
)
def test_how_it_ends_is_in_the_summary_and_goes_on(
    track: Callable[..., Tracker],
    run_dir: Path,
    ending: BaseException | signal.Signals,
    status: str,
    error: str,
) -> None:
    with pytest.raises(type(ending) if isinstance(ending, BaseException) else KeyboardInterrupt):
        train(track(), last=2, ending=ending)
    summary = read_summary(run_dir)
    assert (summary["status"], summary["error"]) == (status, error)
    assert (summary["steps"], summary["train/loss"]) == (2, 8.125)


def test_a_signal_that_follows_an_error_does_not_cut_the_closing_short(
    track: Callable[..., Tracker], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = record.write_summary

    def interrupted(folder: Path, summary: Mapping[str, object]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        write(folder, summary)

    monkeypatch.setattr(record, "write_summary", interrupted)
    with StopFlag(), pytest.raises(RuntimeError, match="a peer has gone"):
        train(track(), last=2, ending=RuntimeError("a peer has gone"))
    assert read_summary(run_dir)["status"] == "failed"


def test_a_loop_says_itself_how_it_ended(track: Callable[..., Tracker], run_dir: Path) -> None:
    with track() as tracker:
        log_steps(tracker, last=4)
        tracker.finish(status="preempted", error="stopped by SIGTERM after step 4")
    summary = read_summary(run_dir)
    assert (summary["status"], summary["error"]) == ("preempted", "stopped by SIGTERM after step 4")


def test_a_name_of_ones_own_is_kept(track: Callable[..., Tracker], cfg: Config, run_dir: Path) -> None:
    cfg.logger.name = "the good one"
    with track():
        pass
    summary = read_summary(run_dir)
    assert (summary["run_name"], summary["steps"], summary["tokens"]) == ("the good one", 0, 0)


def test_a_config_with_a_credential_is_refused_before_a_file_is_written(
    track: Callable[..., Tracker], cfg: Config, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")
    for no_credential in ("TOKENIZERS_PARALLELISM", "HOTKEY"):
        monkeypatch.setenv(no_credential, "layers.*.attention.w[qkv]")  # which the config does say
    track().finish()
    cfg.model.args["extra"] = {"headers": ["Bearer hf_0123456789abcdef"]}
    (run_dir / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"extra.* holds the value of \$HF_TOKEN") as refused:
        track()
    assert "hf_0123" not in str(refused.value)
    assert not (run_dir / "config.yaml").exists()


def test_nothing_on_the_way_out_costs_the_summary(
    cfg: Config, run_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg.logger.name = "[/b]"  # which rich would take for markup
    facts = dataclasses.replace(FACTS, unigram_entropy=float("nan"))  # nothing is held out
    out = io.StringIO()
    with Tracker(cfg, run_dir, facts, STEPS, console=Console(file=out, width=120)) as tracker:
        log_steps(tracker)
        shutil.rmtree(run_dir)
        monkeypatch.setattr("tpresearch.track.tracker.report", no_report)
    summary = read_summary(run_dir)
    assert (summary["status"], summary["run_name"], summary["unigram_entropy"]) == ("completed", "[/b]", None)
    assert (summary["steps"], summary["train/loss"], len(read_metrics(run_dir))) == (8, 7.75, 8)
    said = [record.message for record in caplog.records]
    assert said == [
        f"{run_dir} was deleted during the run: its record is written again",
        "the report cannot be shown: ZeroDivisionError: division by zero",
    ]


def test_a_summary_that_finds_no_room_is_said_in_a_line(
    track: Callable[..., Tracker],
    run_dir: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full_disk(folder: Path, summary: Mapping[str, object]) -> None:
        raise OSError(28, "No space left on device")

    tracker = track()
    log_steps(tracker)
    rows = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(rows[:2]))  # there was none for rows either
    monkeypatch.setattr(record, "write_summary", full_disk)
    tracker.finish()
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("summary.json cannot be written (No space left on device); it is {")
    assert json.loads(line.partition("it is ")[2])["train/loss"] == 7.75


def test_what_cannot_be_written_at_the_end_is_found_at_the_start(
    track: Callable[..., Tracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tpresearch.track.tracker.report", no_report)
    with pytest.raises(ZeroDivisionError):
        track()


def test_a_run_that_may_not_resume_keeps_its_record(
    track: Callable[..., Tracker], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(track())
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    with pytest.raises(ConfigError), track(start_step=STEPS, plan="another"):
        raise ConfigError("resume", run_dir, "none of its checkpoints can be loaded", "a run that has one")
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before
    with pytest.raises(ZeroDivisionError), track(start_step=STEPS, plan="another"):
        no_report()
    assert (run_dir / "plan.txt").read_text() == "another\n"
    assert read_summary(run_dir)["status"] == "failed"
    with pytest.raises(ZeroDivisionError), track(start_step=4):
        no_report()
    found, row = read_summary(run_dir), read_metrics(run_dir)[3]
    told = found["steps"], found["tokens"], found["train/loss"]
    assert told == (4, row["train/tokens"], row["train/loss"]), "not of the rows after it"
    resumed = track(start_step=STEPS)
    resumed.resume_from(STEPS)
    with pytest.raises(ConfigError), resumed:
        raise ConfigError("train.micro_batch_size", 8, "a device is out of memory", "fewer rows at a time")
    assert read_summary(run_dir)["status"] == "failed", "it was not refused: it ran, and had no room"
