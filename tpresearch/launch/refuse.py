"""How a job ends in few words: one that should not have been started in a line for all ranks, and exit code 2."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from tpresearch.config.errors import ConfigError, RunFailed
from tpresearch.config.world import World
from tpresearch.launch.command import Objection, command_to_try

EXIT_CODE = 2
PATIENCE_S = 60
"""How long a rank waits for the one that speaks for all: torchrun ends that one as soon as another has left."""
POLL_S = 0.02


def refuse(error: ConfigError, world: World, objection: Objection) -> NoReturn:
    """Print the error once per job and leave with exit code 2.

    torchrun itself exits with 1 whatever its workers do, and reports each failure; there ranks give the same sentence.

    Args:
        objection: judges a command before it is proposed.
    """
    heard = _heard_from_another()
    if heard is None:
        heard = f"{error}; try: {command_to_try(error, world, objection)}"
        print(f"error: {heard}", file=sys.stderr, flush=True)
        if path := _said_on_this_host():
            with suppress(OSError):
                path.write_text(heard, encoding="utf-8")
    _report_to_torchrun(heard or str(error))
    sys.exit(EXIT_CODE)


def fail(error: RunFailed) -> NoReturn:
    """Leave with exit code 1 after a run whose report has said what is wrong."""
    _report_to_torchrun(str(error))
    sys.exit(1)


def _report_to_torchrun(said: str) -> None:
    """Tell the agent what has been said, which `tpresearch.agent` does not say again."""
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        report = {"message": f"refused: {said}", "timestamp": int(time.time())}
        with suppress(OSError):
            Path(error_file).write_text(json.dumps(report), encoding="utf-8")


def _heard_from_another() -> str | None:
    """What another rank says for all of them; None where that is up to this one.

    Under torchrun the first rank of the first host speaks, over all restarts; under srun the first task.
    """
    path = _said_on_this_host()
    if path is None:
        tasks, task = os.environ.get("SLURM_STEP_NUM_TASKS"), os.environ.get("SLURM_PROCID")
        is_another = task is not None and task.isdecimal() and task != "0"
        return "" if tasks not in (None, "", "1") and is_another else None
    if os.environ.get("GROUP_RANK", "0") != "0":
        return ""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        until = time.monotonic() + PATIENCE_S
        while not (said := path.read_text(encoding="utf-8")) and time.monotonic() < until:
            time.sleep(POLL_S)
        return said
    except OSError:  # no folder of torchrun's
        pass
    return None


def _said_on_this_host() -> Path | None:
    """A file where torchrun keeps its workers' error files (<job>/attempt_<n>/<rank>/error.json).

    It settles who speaks: a refusal comes before there is a process group, and before torch is imported.
    """
    parents = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parents
    return parents[2] / "refused" if len(parents) > 2 else None
