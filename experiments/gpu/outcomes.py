"""A plugin of pytest: the outcome of each test is a line of results.jsonl at once, with what a failed one said.

OUT=FOLDER python -m pytest -p outcomes ...
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from gpu.rows import append


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return  # pytest-xdist repeats a worker's reports in the process that started it
    said = {"said": str(report.longrepr)[-1500:]} if report.failed else {}
    taken = round(report.duration, 1)
    append(
        Path(os.environ["OUT"]),
        stage="correctness",
        test=report.nodeid,
        outcome=report.outcome,
        seconds=taken,
        **said,
    )
