"""Who is heard where; commands show it for whole runs, in test_ranks.py."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch  # noqa: F401  it gives its loggers handlers of their own, as in every run
from support.launches import Command

from tpresearch.launch import World
from tpresearch.launch.logs import IN_FILES_ONLY, start_logging, tolerate_print_errors


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers.clear()
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = before
    root.setLevel(level)
    logging.captureWarnings(False)


def test_a_librarys_warning_is_written_once_and_its_steps_never(tmp_path: Path) -> None:
    start_logging(tmp_path, World(rank=1, size=2))
    for _ in range(3):
        logging.getLogger("torch.distributed").warning("the same")
        logging.getLogger("tpresearch.train").warning("step is slow")
        logging.getLogger("torch.distributed").warning("its own mistake", FutureWarning)
    logging.getLogger("datasets.builder").info("a step of its own")
    logging.getLogger("wandb").warning("a step of its own")
    said = (tmp_path / "ranks" / "rank-00001.log").read_text()
    lines = ("the same", "step is slow", "its own mistake", "a step of its own")
    assert [said.count(line) for line in lines] == [1, 3, 1, 0]
    assert not (tmp_path / "train.log").exists()


def test_the_console_is_short_and_leaves_out_what_is_for_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start_logging(tmp_path, World())
    log = logging.getLogger("tpresearch.train")
    log.info("mesh ready")
    log.warning("slow disk")
    log.error("a long traceback", extra=IN_FILES_ONLY)
    logging.getLogger("torch._dynamo").warning("\nIn-place ops\nare not for this.\n")
    lines = [line[9:] for line in capsys.readouterr().err.splitlines()]  # without the time
    assert lines == ["mesh ready", "slow disk [warning]", "In-place ops are not for this. [warning]"]
    assert "ERROR tpresearch.train: a long traceback" in (tmp_path / "train.log").read_text()


def test_a_rank_that_crashes_leaves_its_stack_in_its_log(warm_python: Command, tmp_path: Path) -> None:
    rank_1 = World(1, 2, 1, 2).environment(port=1) | {"TORCHELASTIC_USE_AGENT_STORE": ""}
    warm_python("name=crashes", "hydra.run.dir=run", **rank_1, TORCHELASTIC_RUN_ID="any")
    log = (tmp_path / "run" / "ranks" / "rank-00001.log").read_text()
    assert "Segmentation fault" in log
    assert "in main" in log


def test_a_handler_of_an_earlier_import_writes_to_the_new_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(raw if name == "stderr" else io.BytesIO()))
    logger, handler = logging.getLogger("imported.before"), logging.StreamHandler()
    monkeypatch.setattr(logger, "handlers", [handler])
    tolerate_print_errors()
    logger.warning("still heard")
    sys.stderr.flush()
    assert raw.getvalue() == b"still heard\n"
