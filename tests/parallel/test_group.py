"""Ranks that torchrun starts again find nothing of their last start in the store that its agent keeps."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from tpresearch.config.world import World
from tpresearch.parallel.group import HERE, fresh_store

SIZE = 3


def start(port: int, late: int, mark: str) -> list[bytes]:
    """All ranks of one start; what each finds under a key that every rank writes where it finds none."""

    def rank(number: int) -> bytes:
        time.sleep(0.3 * (number == late))
        agents = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(minutes=5))
        store = fresh_store(agents, World(number, SIZE, number, SIZE, elastic=True))
        return store.compare_set("address", "", f"{mark} of {number}")

    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(rank, range(SIZE)))


@pytest.mark.parametrize("late", range(SIZE))
def test_each_start_has_a_store_of_its_own(late: int) -> None:
    agents = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agents.set(f"{HERE}/1", "a rank that died before it was answered")
    first, again = start(agents.port, 0, "first"), start(agents.port, late, "second")
    assert len(set(first)) == len(set(again)) == 1, "not all ranks have met"
    assert first[0].startswith(b"first")
    assert again[0].startswith(b"second")
