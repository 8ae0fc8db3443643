"""Progress is a line for each stage, and a bar only for those who asked and can see it."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest
from support.corpora import Configure, prepared

from tpresearch.config.schema import TokenizerConfig
from tpresearch.data.pipeline import log_stage


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("terminal", "bar", "drawn"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_a_bar_is_drawn_on_a_terminal_that_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, terminal: bool, bar: bool, drawn: bool
) -> None:
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    with caplog.at_level(logging.INFO), log_stage("tokenizing", 4_000_000, bar) as advance:
        advance(1_500_000)
        advance(2_500_000)
    assert ("tokenizing" in stderr.getvalue()) == drawn
    assert drawn or not stderr.getvalue()
    [line] = caplog.messages
    assert line.startswith("tokenizing: 4.0 MB in 0.")


def test_each_stage_is_told_in_bytes(
    tmp_path: Path, configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    """100,000 letters of two bytes and as many ends of lines, of which a twentieth is held out."""
    (tmp_path / "text.txt").write_text("ä\n" * 100_000, encoding="utf-8")
    with caplog.at_level(logging.INFO):
        prepared(configure(str(tmp_path / "text.txt")), TokenizerConfig(vocab_size=260))
    told = [line.partition(" in ")[0] for line in caplog.messages if " MB in " in line]
    assert told == ["training a BPE of 260 entries: 0.3 MB", "tokenizing: 0.3 MB"]
