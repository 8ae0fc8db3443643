"""Ctrl-C while a command starts: one line and exit code 130, instead of a traceback from whatever is being imported.

Nothing exists by then that would need cleaning up. Imported as a library, for example in a notebook, Ctrl-C is
unchanged.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

INTERRUPTED = 128 + signal.SIGINT
"""The exit code after Ctrl-C."""


def exit_on_interrupt() -> None:
    """Make Ctrl-C end this process at once, if it is a command of ours: train.py, `python -m tpresearch.*` (which has `-m`
    for its name while the package is imported) or the console script."""
    name = sys.argv[0] if sys.argv else ""
    ours = Path(__file__).parents[1] / "train.py"
    is_command = name == "-m" or Path(name).name == "tpresearch" or Path(name).absolute() == ours
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def restore_interrupt() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again, since there is something to clean up."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def print_stopped() -> None:
    """Print one line per job."""
    if os.environ.get("RANK") in (None, "", "0"):
        print("stopped by SIGINT", file=sys.stderr, flush=True)


def _end(number: int, frame: object) -> None:
    print_stopped()
    os._exit(INTERRUPTED)
