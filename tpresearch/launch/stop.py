"""Stopping a run: signals set a flag, which the run polls where it can stop; and no process outlives its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from tpresearch.interrupt import INTERRUPTED

REPEATED_SIGNAL_S = 1.0
"""Time within which one Ctrl-C may reach a rank twice: from the terminal, and from torchrun's agent."""
PR_SET_PDEATHSIG = 1
"""Of linux/prctl.h."""
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
"""Loaded before any fork."""


class Stopped(SystemExit):
    """Raised where a process stops for a signal; the exit code is 128 and the signal's number, as shells have it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"


class StopFlag:
    """While entered, SIGTERM, Ctrl-C and SIGHUP (its terminal has closed) do not end the process: they set `requested`.

        with StopFlag() as stop:
            for document in documents:
                stop.check()

    A second Ctrl-C ends the process at once; signals that are ignored already stay ignored, as under `nohup`. Signals are read in a
    thread, from the file descriptor that Python writes them to, since a handler would have to wait while the main thread
    is inside a collective.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        """The first of these signals that arrived."""
        self._interrupted_at: float | None = None
        self._calls: list[Callable[[], object]] = []

    def check(self) -> None:
        """Stop here (`Stopped`), if that was asked for. Between ranks that wait for each other, use `AgreedStop`."""
        if self.requested is not None:
            raise Stopped(self.requested)

    @contextmanager
    def calling(self, call: Callable[[], object]) -> Iterator[None]:
        """Context in which each signal also calls this, from the thread that hears it."""
        self._calls.append(call)
        try:
            yield
        finally:
            self._calls.remove(call)

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        heard = [number for number in self.NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]
        self._handlers_before = {number: signal.signal(number, _ignore) for number in heard}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def _listen(self) -> None:
        while arrived := self._reader.recv(1):
            if arrived[0] in self._handlers_before:
                self._record(signal.Signals(arrived[0]), time.monotonic())

    def _record(self, number: signal.Signals, now: float) -> None:
        self.requested = self.requested or number
        for call in self._calls:
            call()
        if number is not signal.SIGINT:
            return
        if self._interrupted_at is None:
            self._interrupted_at = now
        elif now - self._interrupted_at > (REPEATED_SIGNAL_S if "TORCHELASTIC_RUN_ID" in os.environ else 0):
            os._exit(INTERRUPTED)


def _ignore(number: int, frame: object) -> None:
    """A handler must be set for Python to write the signal to the file descriptor above."""


def end_with_parent(number: signal.Signals = signal.SIGKILL, parent: int | None = None) -> None:
    """Make the kernel send this process a signal when its parent ends, even if that was killed or has ended already. Linux only."""
    if LIBC is None:
        return
    parent = parent or os.getppid()
    LIBC.prctl(PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:  # it ended before that
        os._exit(128 + number)
