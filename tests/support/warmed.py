"""Imported once, by the server that the tests' ranks and commands are forked from: what they would do again in each fork.

Python 3.11 does not hand the server a path (3.12 does): conftest.py puts this folder first in PYTHONPATH, and none of
its forks shall find it there.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
from importlib.util import find_spec
from pathlib import Path

from support import parsed_once
from tpresearch.launch.composition import conf_dir

IMPORTED = (
    "pytest",
    *("wandb", "wandb.sdk.launch.inputs.internal", "requests"),
    *("rich.ansi", "rich.file_proxy", "rich.progress", "hydra._internal.logging_config"),
    *("tpresearch.train.main", "tpresearch.train.profile", "tpresearch.track.console"),
    *("tpresearch.compare.report", "tpresearch.compare.workspace"),
    *("tpresearch.planner.report", "tpresearch.simulate.run_files"),
    *(
        f"support.{name}"
        for name in ("composed", "commands", "traces", "counted_steps", "checkpointed", "nets")
    ),
    "tpresearch.verify.warm",
)
"""What ranks would import with the function that they run, and commands when they need it."""
HUGE_BYTES = 1 << 21
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25


def import_all() -> None:
    """All but what needs a library that is not installed, such as wandb on a machine that is there for its GPU.

    Raises:
        RuntimeError: for what else is missing, which multiprocessing would pass over in silence.
    """
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            library = (error.name or "").partition(".")[0]
            if library not in ("", "support", "tpresearch") and find_spec(library) is None:
                continue
            raise RuntimeError(f"ranks are forked from a server that cannot import {name}") from error


def parse_configs() -> None:
    """Each config file once."""
    for path in conf_dir().rglob("*.yaml"):
        with path.open(encoding="utf-8") as file:
            parsed_once.load(file)


def collapse_pages() -> None:
    """Put this process's memory into pages of 2 MB: a fork copies an entry per page, and its end removes them.

    That halves the 60 ms of a fork from 350 MB. Only advice, from Linux 6.1 on; elsewhere nothing changes.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in maps.read_text().splitlines():
        span, access, _, _, file, *_ = line.split()
        start, end = (int(address, 16) for address in span.split("-"))
        start, end = -(-start // HUGE_BYTES) * HUGE_BYTES, end // HUGE_BYTES * HUGE_BYTES
        if access == "rw-p" and file == "0" and start < end:
            for advice in (MADV_HUGEPAGE, MADV_COLLAPSE):
                madvise(start, end - start, advice)


_, _, path = os.environ["PYTHONPATH"].partition(os.pathsep)
os.environ["PYTHONPATH"] = path
if not path:
    del os.environ["PYTHONPATH"]
import_all()
parse_configs()
gc.collect()
gc.freeze()  # so that reference counts do not make each fork copy these pages
collapse_pages()
