"""completion.bash completes what Hydra knows, however the program is started."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from support.commands import ROOT, environment, execute


@pytest.mark.cli
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("torchrun --nproc-per-node=4 train.py parallel=hs", "parallel=hsdp parallel=hsdp_tp"),
        (
            "torchrun --nproc-per-node=4 -m tpresearch.train model=toy_mlp optimizer.w",
            "optimizer.weight_decay=",
        ),
        ("python train.py -m schedule=", "schedule=constant schedule=cosine schedule=wsd"),
        ("python -m tpresearch.verify verify.st", "verify.steps="),
        ("python other.py par", ""),
    ],
)
def test_what_is_offered(typed: str, offered: str, tmp_path: Path) -> None:
    script = (
        f"source {ROOT}/tpresearch/completion.bash; COMP_LINE='{typed}'; COMP_POINT=${{#COMP_LINE}}; _tpresearch; "
        'echo "${COMPREPLY[*]}"'
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = execute(["bash", "-c", script], ROOT, environment(tmp_path, PATH=path, PYTHONPATH=str(ROOT)))
    assert done.out.split() == offered.split(), done.err
