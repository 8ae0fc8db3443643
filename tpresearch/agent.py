"""Keeps torchrun's agent quiet when our ranks have already reported why they end.

torch lets packages add rendezvous backends under the entry points `torchrun.handlers`, and asks for them as it starts;
ours adds none, but is thereby loaded in the agent's process. A refused config, which the first rank reports in one line,
and a stop by a signal, which the run's report states, would otherwise be followed by tracebacks and a report for each
rank; torchrun would exit with 1. Failures keep torchrun's report, with a sentence on a rank that was killed.

Ranks have SAVE_TIME_S to save after a signal, and not torchrun's 30 seconds, unless --shutdown-timeout says otherwise.
Under nohup they outlive their terminal, unless --signals-to-handle has SIGHUP. They are told of --virtual-local-rank,
which torchrun does not pass on, and of its options, for commands that they propose. Checked on torch 2.13, and against
the source of 2.11 and 2.14.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tpresearch import interrupt

SAVE_TIME_S = 120
"""Seconds for a run to save and close its files after it is told to stop. torch 2.11 always gives 30."""
AGENT_MODULES = ("torch.distributed.run", "torchrun")
TORCHRUN_OPTIONS = "TPRESEARCH_TORCHRUN_OPTIONS"
"""Set for each rank: torchrun's options as they were typed, but for the number of ranks per host."""
HEARD_SIGNALS = "PET_SIGNALS_TO_HANDLE"
"""torchrun's variable for its option --signals-to-handle."""
LOST_RENDEZVOUS = "its rendezvous does not answer: the host of it has ended, or the network to it is down"
SIGNALLED = (129, 130, 143)
"""Exit codes of ranks that stopped for SIGHUP, Ctrl-C and SIGTERM."""
LOGGERS = (
    *("run", "elastic.agent.server.api", "elastic.multiprocessing.api"),
    "elastic.multiprocessing.errors.error_handler",
)
REPEATED = (
    *("child error file", "skipping error code", "no error file defined", "failed (exitcode"),
    *("Sending process", "Closing process", "Received %s death signal"),
    "\n*****************************************\nSetting OMP_NUM_THREADS",
)
"""Beginnings of log lines to drop: they repeat what a rank has reported, or are noise."""


def handler() -> Callable[[Any], Any]:
    """The entry point: a rendezvous backend that is c10d under another name."""
    if _is_agent_of_ours():
        for name in LOGGERS:
            logging.getLogger(f"torch.distributed.{name}").addFilter(_is_news)
        sys.excepthook = _end
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVE_TIME_S))
        os.environ[TORCHRUN_OPTIONS] = typed_options(sys.argv[1:])
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup, which torchrun would undo
            os.environ.setdefault(HEARD_SIGNALS, "SIGTERM,SIGINT,SIGQUIT")
        if any(word.startswith("--virtual") for word in sys.argv[1:]):  # which may be abbreviated
            from tpresearch.config.world import OWN_DEVICE  # late: every torchrun here loads this module

            os.environ[OWN_DEVICE] = "1"
    return _c10d


def _c10d(params: Any) -> Any:
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

    backend, store = create_backend(params)
    return create_handler(store, backend, params)


def _is_agent_of_ours() -> bool:
    """Whether this process is torchrun, about to start a script or a module that is made with tpresearch."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    starter = spec.name if spec else Path(sys.argv[0]).name
    if starter not in AGENT_MODULES or "TORCHELASTIC_RUN_ID" in os.environ:
        return False
    return any(map(_is_ours, sys.argv[1:]))


def _is_ours(word: str) -> bool:
    """Whether a word of torchrun's command line is a script or a module that is made with tpresearch."""
    if word.startswith("tpresearch."):
        return True
    with suppress(OSError):
        return word.endswith(".py") and b"tpresearch" in Path(word).read_bytes()
    return False


def typed_options(words: Sequence[str]) -> str:
    """torchrun's options, as a shell reads them, without the program and the ranks per host: proposed commands state those."""
    options = itertools.takewhile(lambda word: not _is_ours(word), words)
    return re.sub(r"(?<!\S)(--nproc\S*?[= ]\S+|-m|--module)(\s|$)", "", shlex.join(options)).strip()


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(REPEATED)


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Exit with the ranks' exit code if they have reported why; otherwise as torchrun does."""
    code = _exit_code(error)
    if code is None:
        sys.__excepthook__(kind, error, trace)
        if said := silent_end(error):
            print(said, file=sys.stderr)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_code(error: BaseException) -> int | None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError

    if isinstance(error, KeyboardInterrupt):  # before there were ranks
        interrupt.print_stopped()
        return interrupt.INTERRUPTED
    if isinstance(error, RendezvousConnectionError):
        why = str(error.__cause__).partition("\n")[0]
        print(f"torchrun: {LOST_RENDEZVOUS} ({why})", file=sys.stderr)
        return 1
    if isinstance(error, SignalException):
        return 128 + int(error.sigval)
    if not isinstance(error, ChildFailedError):
        return None
    _, first = error.get_first_failure()
    reasons = [str(each.message) for each in error.failures.values() if each.error_file != "<N/A>"]
    if str(first.message).startswith("refused: ") and all(why.startswith("refused: ") for why in reasons):
        return max(int(first.exitcode), 1)  # torchrun may have ended it after it had said why
    return int(first.exitcode) if first.exitcode in SIGNALLED else None


def silent_end(error: BaseException) -> str | None:
    """A sentence on the rank that ended without an error of its own, of which other ranks may have one; None if none did.

    torchrun dates failures by the second, so that an error that follows from such an end may be the first that it names.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not isinstance(error, ChildFailedError):
        return None
    _, first = error.get_first_failure()
    for rank, failure in error.failures.items():
        killed = failure.exitcode == -signal.SIGKILL
        if failure.error_file != "<N/A>" or not (killed or failure is first):
            continue
        how = f"ended with exit code {failure.exitcode}, and no error"
        if failure.exitcode < 0:
            how = f"was ended by {failure.signal_name()}"
        if killed:
            how += ", as by the kernel where the host's memory or the job's share of it is used up"
        return f"rank {rank} {how}; errors of other ranks follow from that"
    return None
