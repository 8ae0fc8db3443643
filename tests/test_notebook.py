"""docs/notebook.ipynb shows what its cells give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import ROOT, environment, execute_warm

from tpresearch.verify.ranks import Ranks

NOTEBOOK = ROOT / "docs/notebook.ipynb"
RUNNER = Path(__file__).parent / "support/notebook.py"


@pytest.mark.cli
def test_every_cell_gives_the_output_that_it_shows(ranks: Ranks, pytestconfig: pytest.Config) -> None:
    env = environment(PYTHONPATH=str(ROOT))
    done = execute_warm(ranks, None, [str(RUNNER), str(NOTEBOOK)], NOTEBOOK.parent, env)
    assert done.code == 0, done.err
    if pytestconfig.getoption("--write-golden"):
        NOTEBOOK.write_text(done.out)
    shown, given = outputs(json.loads(NOTEBOOK.read_text())), outputs(json.loads(done.out))
    assert shown == given
    assert len([output for output in shown if output]) >= 5


def outputs(notebook: dict[str, Any]) -> list[Any]:
    return [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
