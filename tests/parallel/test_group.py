"""Ranks that torchrun starts again find nothing of their last start in the store that its agent keeps; and the end of a
failed process, over gloo in the place of NCCL."""

from __future__ import annotations

import resource
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from tpresearch.config.errors import ConfigError, RunFailed
from tpresearch.config.other_hosts import stopped_key
from tpresearch.config.world import World
from tpresearch.launch.agents_store import tell_stopped
from tpresearch.parallel import group
from tpresearch.parallel.device import CPU, Device
from tpresearch.parallel.group import ANNOUNCE_KEY, ANSWER_KEY, fresh_store, process_group
from tpresearch.verify.ranks import Ranks

SIZE = 3


def start(port: int, late: int, mark: str) -> list[bytes]:
    """All ranks of one start; what each finds under a key that every rank writes where it finds none."""

    def rank(number: int) -> bytes:
        time.sleep(0.3 * (number == late))
        agents = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(minutes=5))
        store = fresh_store(agents, World(number, SIZE, number, SIZE, elastic=True), "gloo")
        return store.compare_set("address", "", f"{mark} of {number}")

    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(rank, range(SIZE)))


def test_float32_is_without_tf32_on_a_gpu_in_convolutions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with process_group(Device(torch.device("cuda", 0), "gloo", "card"), World()):
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (False, False)


def test_a_process_by_itself_keeps_its_tracebacks_as_they_are() -> None:
    prints = sys.excepthook
    for _ in range(2):
        with process_group(CPU, World()):
            assert sys.excepthook is prints


def page_faults(world: World) -> int:
    """Of a rank that makes four tensors of 48 MiB again, as often as it takes to find their places in memory."""
    with process_group(CPU, world):
        for _ in range(8):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            gathered = [torch.ones(3 * 2**22) for _ in range(4)]
            del gathered
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_memory_that_a_rank_on_a_cpu_frees_is_there_for_its_next_tensors(ranks: Ranks) -> None:
    assert ranks.run(1, page_faults)[0] < 1000  # of the 49,152 pages that they have


@pytest.mark.parametrize("late", range(SIZE))
def test_each_start_has_a_store_of_its_own(late: int) -> None:
    agents = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agents.set(f"{ANNOUNCE_KEY}/1", "a rank that died before it was answered")
    first, again = start(agents.port, 0, "first"), start(agents.port, late, "second")
    assert len(set(first)) == len(set(again)) == 1, "not all ranks have met"
    assert first[0].startswith(b"first")
    assert again[0].startswith(b"second")


def test_a_rank_whose_host_prepares_data_is_waited_for_beyond_the_timeout_of_a_message(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    agents = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=0.1))
    monkeypatch.setattr(group, "LOG_JOIN_AFTER_S", 0)
    world = World(0, 2, 0, 1, elastic=True)
    threading.Timer(0.3, agents.set, [f"{ANNOUNCE_KEY}/1", "its request gloo"]).start()
    with caplog.at_level("INFO"):
        fresh_store(agents, world, "gloo")
    assert agents.get(f"{ANSWER_KEY}/its request gloo")
    assert caplog.messages == ["waiting for rank 1 of 2, whose host may be preparing data"]
    monkeypatch.setattr(group, "JOIN_S", 0)
    agents = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(RunFailed, match=r"rank 1 did not come in .*; to prepare data ahead: python -m tp"):
        fresh_store(agents, world, "gloo")


@pytest.mark.parametrize(
    ("limit", "why"),
    [("REJOIN_S", "its torchrun may have ended"), ("STOPPED_S", "a signal has stopped it, and its torchrun")],
)
def test_a_rank_that_does_not_come_again_is_not_waited_for_as_if_it_prepared_data(
    agent: TCPStore, monkeypatch: pytest.MonkeyPatch, limit: str, why: str
) -> None:
    """Its torchrun may have been stopped, while that of rank 0 starts the ranks again."""
    first, again = World(0, SIZE, 0, 1, elastic=True), "the same command on all hosts resumes the run"
    start(agent.port, 0, "first")
    if limit == "STOPPED_S":
        tell_stopped(World(1, SIZE, 0, 1, elastic=True))
    with monkeypatch.context() as short:
        short.setattr(group, limit, 0)
        for _ in range(2):
            with pytest.raises(RunFailed, match=f"^rank 1 did not come in 0 minutes: {why}; {again}$"):
                fresh_store(agent, first, "gloo")
    start(agent.port, 0, "come back")
    assert not agent.check([stopped_key(1)])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_for_another_can_be_stopped(rank: int) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    agents = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(KeyboardInterrupt):
        fresh_store(agents, World(rank, 2, 0, 1, elastic=True), "gloo", stop)


def test_a_host_that_falls_back_to_its_cpu_is_told_from_those_with_gpus() -> None:
    agents = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    threading.Timer(0.2, agents.set, [f"{ANNOUNCE_KEY}/1", "its request gloo"]).start()
    with pytest.raises(
        ConfigError, match="rank 0 would communicate by nccl, and rank 1 by gloo; a GPU for each"
    ):
        fresh_store(agents, World(0, 2, 0, 1, elastic=True), "nccl")


@pytest.fixture
def as_nccl(monkeypatch: pytest.MonkeyPatch) -> Device:
    init = dist.init_process_group
    monkeypatch.setattr(dist, "init_process_group", lambda _, device_id, **options: init("gloo", **options))
    return Device(torch.device("cpu"), "nccl", "cpu")


def test_a_failed_process_aborts_its_nccl_groups(as_nccl: Device) -> None:
    """Else C++ warns as it ends; and their orderly end would wait for ranks that wait for this one."""
    with pytest.raises(ValueError, match="no luck"), process_group(as_nccl, World()):
        raise ValueError("no luck")
    assert not dist.is_initialized()
    with process_group(as_nccl, World()):
        assert dist.is_initialized()
    assert not dist.is_initialized()


def test_an_abort_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch, as_nccl: Device) -> None:
    ends, abort = threading.Event(), dist.distributed_c10d._abort_process_group
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: (ends.wait(), abort()))
    monkeypatch.setattr(group, "ABORT_S", 0.01)
    with pytest.raises(ValueError, match="no luck"), process_group(as_nccl, World()):
        raise ValueError("no luck")
    assert dist.is_initialized()
    ends.set()
    for thread in threading.enumerate():
        if thread.name == "abort":
            thread.join()
    assert not dist.is_initialized()
