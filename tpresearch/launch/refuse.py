"""How a refused job ends: one line for all ranks, and exit code 2."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from tpresearch.config.errors import ConfigError, RunFailed
from tpresearch.config.world import World, agent_store
from tpresearch.launch.agents_store import tell_other_hosts
from tpresearch.launch.command import CommandCheck
from tpresearch.launch.proposal import command_to_try

EXIT_CODE = 2
TIMEOUT_S = 60
"""How long a rank waits for the reporting rank: torchrun ends that one as soon as another exits."""
POLL_S = 0.02
AS_TYPED = {"encoding": "utf-8", "errors": "surrogateescape"}
"""A word that was typed need not be UTF-8: its bytes stay what they are."""


def refuse(error: ConfigError, world: World, check_command: CommandCheck) -> NoReturn:
    """Print the error once per job, with a command that `check_command` has validated, and exit with code 2.

    torchrun itself exits with 1 whatever its workers do, and reports each failure; there ranks give the same sentence.
    """
    heard = _report_of_another_rank()
    if heard is None:
        proposed = command_to_try(error, world, check_command)
        heard = f"{error}; try: {proposed}" if proposed else str(error)
        print(f"error: {heard}", file=sys.stderr, flush=True)
        if path := _report_file():
            with suppress(OSError):
                path.write_text(heard, **AS_TYPED)
    _report_to_torchrun(heard or str(error))
    sys.exit(EXIT_CODE)


def exit_failed(error: RunFailed, world: World) -> NoReturn:
    """Exit with code 1 after a run whose report states what is wrong. That is shown on the first host; each other says it once."""
    tell_other_hosts(error, world)
    if os.environ.get("GROUP_RANK", "0") != "0":
        with suppress(OSError):  # another rank was first
            (Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[1] / "failed").touch(exist_ok=False)
            print(f"error: {error}", file=sys.stderr, flush=True)
    _report_to_torchrun(str(error))
    sys.exit(1)


def _report_to_torchrun(message: str) -> None:
    """Tell the agent what was reported, so that `tpresearch.agent` does not repeat it."""
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        report = {"message": f"refused: {message}", "timestamp": int(time.time())}
        with suppress(OSError):
            Path(error_file).write_text(json.dumps(report), encoding="utf-8")


def _report_of_another_rank() -> str | None:
    """The report of the rank that reports for all; None if this rank has to report.

    Under torchrun the first rank of the first host reports, over all restarts, also for other hosts, which tell it; under srun
    the first task.
    """
    path = _report_file()
    if path is None:
        tasks, task = os.environ.get("SLURM_STEP_NUM_TASKS"), os.environ.get("SLURM_PROCID")
        is_another = task is not None and task.isdecimal() and task != "0"
        return "" if tasks not in (None, "", "1") and is_another else None
    if os.environ.get("GROUP_RANK", "0") != "0" and agent_store() is not None:
        return ""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        until = time.monotonic() + TIMEOUT_S
        while not (said := path.read_text(**AS_TYPED)) and time.monotonic() < until:
            time.sleep(POLL_S)
        return said
    except OSError:  # no folder of torchrun's
        pass
    return None


def _report_file() -> Path | None:
    """A file where torchrun keeps its workers' error files (<job>/attempt_<n>/<rank>/error.json).

    It determines which rank reports: a refusal comes before there is a process group, and before torch is imported.
    """
    parents = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parents
    return parents[2] / "refused" if len(parents) > 2 else None
