"""A store for the process group of this start of the ranks, in which nothing of an earlier start is found.

torchrun's agent keeps one store over restarts, and its ranks begin there as if it were new (torch 2.13; pytorch issues
135712, 167288): one that starts before another finds where that one listened before it died, and fails. The restart count
is no remedy, since each agent has its own.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from uuid import uuid4

from torch.distributed import PrefixStore, Store, TCPStore

from tpresearch.config.world import World

PATIENCE = timedelta(minutes=10)
ASKS_AGAIN_S = 0.05
"""Slept, and not waited for at the store, whose client writes a warning for each wait that ends without an answer."""
HERE, ANSWER = "tpresearch/here", "tpresearch/answer"


def agent_store() -> TCPStore | None:
    """The store that torchrun's agent keeps for its ranks; None where it keeps none."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=PATIENCE)


def fresh_store(store: TCPStore, world: World) -> Store:
    """The part of the agent's store that belongs to this start. All ranks call it; it returns once all have.

    Rank 0 names the part, and tells it to each rank that says it is here. What a rank of an earlier start said, rank 0
    deletes; who is alive says it again until it is answered.
    """
    if world.rank == 0:
        name = uuid4().hex
        for rank in range(1, world.size):
            store.delete_key(f"{HERE}/{rank}")
        for rank in range(1, world.size):
            asked = store.get(f"{HERE}/{rank}").decode()  # waits for it
            store.set(f"{ANSWER}/{asked}", name)
        return PrefixStore(name, store)
    asks = uuid4().hex
    while not store.check([f"{ANSWER}/{asks}"]):
        store.set(f"{HERE}/{world.rank}", asks)
        time.sleep(ASKS_AGAIN_S)
    return PrefixStore(store.get(f"{ANSWER}/{asks}").decode(), store)
