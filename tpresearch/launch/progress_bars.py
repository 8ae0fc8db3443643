"""Progress bars of libraries, in processes that may be killed."""

from __future__ import annotations

import threading


def keep_bars_in_process() -> None:
    """Give tqdm a lock among the threads of this process. Its own is also a semaphore among processes, which torch's compiler makes
    even where it shows no bar; of each process that is killed, multiprocessing would report it as leaked."""
    from tqdm import tqdm  # late: torch has imported it

    tqdm.set_lock(threading.RLock())
