"""How a job ends that should not have been started: one line on stderr for all ranks, exit code 2."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from tpresearch.config.errors import ConfigError
from tpresearch.config.world import World, slurm_tasks
from tpresearch.launch.command import command_to_try

EXIT_CODE = 2


def refuse(error: ConfigError, world: World) -> NoReturn:
    """Print the error once per job and leave with exit code 2.

    The first rank that comes here speaks, for torchrun kills the others as soon as one has left. torchrun
    itself exits with 1 whatever its workers do, and reports each failure; there ranks give the same sentence.
    """
    sentence = f"{error}; try: {command_to_try(error, world)}"
    if _is_first_to_report(world) and os.environ.get("GROUP_RANK", "0") == "0":
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        report = {"message": f"refused: {sentence}", "timestamp": int(time.time())}
        Path(error_file).write_text(json.dumps(report))
    sys.exit(EXIT_CODE)


def _is_first_to_report(world: World) -> bool:
    """Whether this is the first rank of its host to refuse, over all restarts.

    A file settles it, where torchrun keeps its workers' error files (<job>/attempt_<n>/<rank>/error.json):
    a refusal comes before there is a process group, and before torch is imported.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return world.rank == 0 and (slurm_tasks() == 1 or os.environ.get("SLURM_PROCID") == "0")
    try:
        (Path(error_file).parents[2] / "refused").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
