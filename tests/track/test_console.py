"""What a person reads: human units, one line at a time, and a report that says where things are."""

from __future__ import annotations

import io
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from rich.console import Console
from support.example_run import row

from tpresearch.config.choices import Loss
from tpresearch.config.errors import ConfigError
from tpresearch.launch.command import Command, program_words
from tpresearch.track.console import ProgressLine, report
from tpresearch.track.names import complete_row
from tpresearch.track.next_steps import NextSteps
from tpresearch.track.record import summary_figures
from tpresearch.track.text import (
    bytes_text,
    count_text,
    decimal_bytes_text,
    duration_text,
    figures_text,
    loss_text,
    path_text,
    share_text,
)
from tpresearch.track.wandb_run import WandbRun

REFUSED = ConfigError("parallel", "fsdp_tp", "it is not for this model", "another")


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (bytes_text(0), "0 B"),
        (bytes_text(1536), "1.5 KiB"),
        (decimal_bytes_text(12_340_000_000), "12.34 GB"),
        (decimal_bytes_text(99_000_000), "99.00 MB"),
        (decimal_bytes_text(1536), "1.54 kB"),
        (bytes_text(1.2 * 2**30), "1.2 GiB"),
        (bytes_text(1000 * 2**20), "1.0 GiB"),
        (bytes_text(139 * 2**30), "139 GiB"),
        (bytes_text(999.7 * 2**10), "1.0 MiB"),
        (bytes_text(139 * 2**40), "139 TiB"),
        (bytes_text(None), "–"),
        (count_text(34_512), "34.5k"),
        (count_text(999.7), "1k"),
        (count_text(18_089_216), "18.1M"),
        (count_text(7), "7"),
        (count_text(1_234e15), "1,234,000T"),
        (figures_text(1034.2), "1,034"),
        (figures_text(0.85123), "0.851"),
        (duration_text(83.4), "1:23"),
        (duration_text(3723), "1:02:03"),
        (duration_text(0.2), "0:00"),
        (loss_text(6.12345), "6.123"),
        (loss_text(0.00123), "0.00123"),
        (share_text(0.4712), "47.1%"),
        (share_text(None), "–"),
    ],
)
def test_units(shown: str, text: str) -> None:
    assert shown == text


def test_a_path_is_shown_as_it_would_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert path_text(tmp_path / "outputs" / "a") == "outputs/a"
    assert path_text(Path("outputs/a")) == "outputs/a"
    assert path_text(Path("/elsewhere/a")) == "/elsewhere/a"


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def test_off_a_terminal_lines_are_two_seconds_apart_with_the_first_and_the_last() -> None:
    out, clock = io.StringIO(), Clock()
    line = ProgressLine(Console(file=out, width=200), total_steps=100, clock=clock)
    for step in range(1, 101):
        line.show(complete_row(row(step)))
        clock.now += 0.1
    line.stop()
    printed = out.getvalue().splitlines()
    assert [text.split("/")[0].split()[1] for text in printed] == ["1", "21", "41", "61", "81", "100"]
    assert printed[0] == "step   1/100  loss 8.188  300 tok/s  977 KiB"
    assert printed[1] == "step  21/100  loss 6.938  val 7.500  6.02k tok/s  977 KiB  0:08 left"
    assert printed[-1].startswith("step 100/100  loss 2.000  val 7.500")


def test_a_run_that_stops_early_still_prints_its_last_row_once() -> None:
    out, clock = io.StringIO(), Clock()
    line = ProgressLine(Console(file=out, width=200), total_steps=100, clock=clock)
    for step in (1, 2, 3):
        line.show(complete_row(row(step)))
    line.stop()
    line.stop()
    assert [text.split("/")[0] for text in out.getvalue().splitlines()] == ["step   1", "step   3"]


def test_on_a_terminal_one_line_lives() -> None:
    out, clock = io.StringIO(), Clock()
    line = ProgressLine(Console(file=out, width=120, force_terminal=True), total_steps=8, clock=clock)
    for step in range(1, 6):
        line.show(complete_row(row(step)))
        clock.now += 20
    line.stop()
    last = out.getvalue().split("\x1b[2K")[-1]  # each drawing first erases the one before
    for part in ("step 5/8", "loss 7.938", "val 7.500", "300 tok/s", "977 KiB", "1:00 left"):
        assert part in last
    assert out.getvalue().count("\n") == 1


def test_the_report_tells_results_place_and_what_to_type_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [complete_row(row(step)) for step in range(1, 9)]
    summary = {"run_name": "m/tp2", "status": "completed", "steps": 8, "tokens": 24_576, "world_size": 2}
    summary |= {"parallel": "tp", "unigram_entropy": 6.71}
    summary |= summary_figures(rows, warmup_steps=5)
    out = io.StringIO()
    typed = Command(("model=mine", "parallel=tp", "train.steps=3", "hydra.run.dir=outputs/r"), ranks=2)
    next_steps = NextSteps(typed, lambda judged: REFUSED if "parallel=fsdp_tp" in judged.arguments else None)
    wandb = "wandb sync outputs/r/wandb/x"
    report(Console(file=out, width=120), summary, tmp_path / "outputs/r", wandb, next_steps=next_steps)
    text = out.getvalue()
    for part in (
        "m/tp2: completed",
        "8 (24.6k tokens, 2 ranks)",
        "7.500 (unigram entropy 6.710)",
        "6.01k tok/s",
        "11.8 MiB",
        "run    outputs/r\n",
        "W&B    wandb sync outputs/r/wandb/x\n",
        "torchrun --nproc-per-node=2 PROGRAM model=mine parallel=fsdp train.steps=3  # ",
        "python PROGRAM -m model=mine parallel=none,tp,fsdp train.steps=3 world_size=2  # ",
        "python PROGRAM plan_only=true ",
        "  cat outputs/r/plan.txt  # ",
    ):
        assert part.replace("PROGRAM", shlex.join(program_words())) in text
    assert "MFU" not in text  # undefined on a CPU


def test_commands_on_a_folder_with_a_space_in_its_name_are_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = {"parallel": "tp", "world_size": 2}
    *_, (cat, _) = NextSteps(Command(), lambda _: REFUSED).after(ended, tmp_path / "a b")
    assert cat == "cat 'a b/plan.txt'"
    run = SimpleNamespace(url=None, id="x", folder=tmp_path / "a b")
    assert WandbRun.page_or_sync_command(cast(WandbRun, run)) == "wandb sync 'a b'"


def test_the_report_of_a_failed_run_says_why_and_suggests_nothing(tmp_path: Path) -> None:
    summary = {"run_name": "m/tp2", "status": "failed", "error": "ValueError: no [luck]", "steps": 0}
    summary |= {"world_size": 1, "tokens": 0} | summary_figures([], 5)
    out = io.StringIO()
    report(Console(file=out, width=120), summary, tmp_path, None)
    assert "error  ValueError: no [luck]" in out.getvalue()
    assert "next" not in out.getvalue()
    assert "W&B" not in out.getvalue()


def test_the_report_says_why_a_sum_of_outputs_falls_without_end(tmp_path: Path) -> None:
    summary = {"run_name": "toy_net/tp4", "status": "completed", "steps": 8, "tokens": 200, "world_size": 4}
    summary |= {"parallel": "tp"} | summary_figures([complete_row(row(8) | {"train/loss": -17430.2})], 5)
    texts = {}
    for loss in Loss:
        out = io.StringIO()
        report(Console(file=out, width=160), summary, tmp_path, None, loss=loss)
        texts[loss] = out.getvalue()
    assert "-17430.2" in texts[Loss.sum].replace(",", "")
    assert "the sum of all outputs, which has no targets and no minimum" in texts[Loss.sum]
    assert "minimum" not in texts[Loss.next_token]


@pytest.mark.parametrize(
    ("folder", "checkpoint", "typed"),
    [
        ("r", True, "resume=r"),
        ("r", False, "model=mine"),
        ("r é", True, shlex.quote("resume='r é'")),  # for the shell, and for Hydra's grammar
    ],
)
def test_a_stopped_run_ends_in_the_command_that_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, checkpoint: bool, typed: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if checkpoint:
        (tmp_path / folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    summary = {"run_name": "m/tp2", "status": "interrupted", "error": "stopped by SIGINT", "steps": 4}
    summary |= {"world_size": 2, "tokens": 9, "parallel": "tp"} | summary_figures([], 5)
    out = io.StringIO()
    next_steps = NextSteps(Command(("model=mine",), ranks=2), lambda _: None)
    report(Console(file=out, width=120), summary, tmp_path / folder, None, next_steps=next_steps)
    box, _, after = out.getvalue().rpartition("┘\n")
    assert "m/tp2: interrupted" in box
    program = shlex.join(program_words())
    assert after.startswith("stopped by SIGINT after step 4; to resume: ")
    assert after.endswith(f"torchrun --nproc-per-node=2 {program} {typed}\n")
