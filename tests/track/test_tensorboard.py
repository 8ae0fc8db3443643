"""TensorBoard's event files hold the rows of the record, once each, and never decide a run's fate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.example_run import STEPS, log_steps, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tpresearch.config import Config, ConfigError
from tpresearch.config.schema import LoggerConfig
from tpresearch.track.record import read_metrics
from tpresearch.track.tensorboard import check_tensorboard
from tpresearch.track.tracker import Tracker


@pytest.fixture(autouse=True)
def tensorboard_alone(cfg: Config) -> None:
    cfg.logger.wandb, cfg.logger.tensorboard = False, True


def curve(run_dir: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_every_row_is_in_the_event_files(track: Callable[..., Tracker], run_dir: Path) -> None:
    train(track())
    for name in ("train/loss", "val/loss", "perf/step_time_s"):
        rows = [(r["train/step"], r[name]) for r in read_metrics(run_dir) if r[name] is not None]
        assert curve(run_dir, name) == [(step, pytest.approx(value)) for step, value in rows]
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    curves = events.Tags()["scalars"]
    assert isinstance(curves, list)
    assert "perf/mfu" not in curves  # undefined on a CPU


def test_a_run_that_resumes_shows_each_step_once(track: Callable[..., Tracker], run_dir: Path) -> None:
    first = track()
    log_steps(first, last=6)
    first.finish(status="preempted")
    second = track()
    second.resume_from(4)
    log_steps(second, first=5)
    second.finish()
    assert [step for step, _ in curve(run_dir, "train/loss")] == list(range(1, STEPS + 1))


def test_rows_between_the_checkpoint_and_the_first_new_row_are_hidden(
    track: Callable[..., Tracker], run_dir: Path
) -> None:
    """As where the resumed run logs more rarely."""
    first = track()
    log_steps(first, last=6)
    first.finish(status="preempted")
    second = track(start_step=4)
    second.resume_from(4)
    log_steps(second, first=STEPS)
    second.finish()
    assert [step for step, _ in curve(run_dir, "train/loss")] == [1, 2, 3, 4, STEPS]


def test_a_disk_that_is_full_ends_its_files_and_not_the_run(
    track: Callable[..., Tracker], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    train(track())
    assert len(read_metrics(run_dir)) == STEPS


def test_it_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_tensorboard(LoggerConfig(tensorboard=True))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"logger.tensorboard=true: .*'tpresearch\[tensorboard\]'"):
        check_tensorboard(LoggerConfig(tensorboard=True))
    check_tensorboard(LoggerConfig())
