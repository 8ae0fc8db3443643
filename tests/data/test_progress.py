"""Progress is a line for each stage, and a bar only for those who asked and can see it."""

from __future__ import annotations

import io
import logging
import sys

import pytest

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
