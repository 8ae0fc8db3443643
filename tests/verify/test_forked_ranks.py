"""Ranks are forked for each job and end with it, whatever goes wrong in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import parsed_once
from support.commands import ROOT, environment, on_path
from support.composed import config, corpus
from tqdm import tqdm

from tpresearch.config import Config
from tpresearch.config.world import World
from tpresearch.verify.ranks import RankError, Ranks
from tpresearch.verify.trace import trace_run


def rank(world: World) -> tuple[int, int]:
    return world.rank, os.getpid()


def die_on_rank_one(world: World) -> None:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)


def raise_on_rank_one(world: World) -> None:
    if world.rank == 1:
        raise ValueError("not today")
    time.sleep(3600)


def sleep_a_while(world: World) -> None:
    time.sleep(1)


def sleep_on_rank_one(world: World) -> None:
    if world.rank == 1:
        time.sleep(3600)


def compute_now_and_then(world: World, seconds: float) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        next_rest = time.process_time() + 0.15
        while time.process_time() < next_rest:
            pass
        time.sleep(0.5)


def warmth(_: World) -> tuple[bool, int, bool]:
    """Of the tests' own server, before a rank of it has done anything."""
    tests = str(Path(__file__).parents[1])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return "support.warmed" in sys.modules, parsed_once._parsed.cache_info().currsize, tests in paths


def lock_of_bars(_: World) -> str:
    """As torch's compiler makes one, in a rank that will be killed."""
    return type(tqdm.get_lock()).__module__


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_server_of_the_tests_is_warm_and_its_path_is_its_own(ranks: Ranks) -> None:
    """multiprocessing passes over in silence what the server cannot import."""
    ((warmed, config_files, on_its_path),) = ranks.run(1, warmth)
    assert warmed
    assert config_files > 50
    assert not on_its_path


def test_results_come_in_rank_order_from_processes_that_have_ended(ranks: Ranks) -> None:
    found = ranks.run(3, rank)
    assert [number for number, _ in found] == [0, 1, 2]
    again = ranks.run(3, rank)
    assert len({process for _, process in found + again}) == 6
    assert not [process for _, process in found + again if alive(process)]


def test_a_rank_that_is_killed_leaves_no_semaphore_of_a_progress_bar(ranks: Ranks) -> None:
    assert ranks.run(1, lock_of_bars) == ["_thread"]


@pytest.mark.parametrize(
    ("job", "said"),
    [(die_on_rank_one, "its process died"), (raise_on_rank_one, "Traceback (?s:.*)ValueError: not today")],
)
def test_a_rank_that_fails_is_said_at_once_and_later_jobs_run(
    ranks: Ranks, job: Callable[[World], None], said: str
) -> None:
    with pytest.raises(RankError, match=f"rank 1 of 2:\n{said}"):
        ranks.run(2, job)
    assert [number for number, _ in ranks.run(2, rank)] == [0, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="what a process has computed is read from /proc")
def test_ranks_that_compute_nothing_have_hung() -> None:
    with pytest.raises(RankError, match=r"ranks \[1\] hung: they have computed nothing for 4 s"):
        Ranks(timeout_s=4).run(2, sleep_on_rank_one)


@pytest.mark.skipif(sys.platform != "linux", reason="what a process has computed is read from /proc")
def test_ranks_that_compute_have_not_hung() -> None:
    assert Ranks(timeout_s=4).run(1, compute_now_and_then, 6) == [None]


def test_ranks_have_not_hung_where_nothing_tells_what_they_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpresearch.verify.ranks.TELLS_PROCESSOR_TIME", False)
    assert Ranks(timeout_s=0.2).run(1, sleep_a_while) == [None]


def threads_after_a_step(world: World, cfg: Config) -> tuple[float, int, int]:
    """Processor time and threads of a fresh rank; the time of a short job."""
    before = time.process_time(), len(os.listdir("/proc/self/task"))
    trace_run(cfg, corpus(), world, 1)
    return time.process_time() - before[0], before[1], torch.get_num_threads()


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_no_job_leaves_a_thread_or_a_process_to_the_next(ranks: Ranks) -> None:
    cfg = config("model=toy_mlp", "parallel=fsdp_tp")
    first, *_, last = [ranks.run(2, threads_after_a_step, cfg) for _ in range(4)]
    assert [threads for _, threads, _ in first] == [threads for _, threads, _ in last]
    assert all(threads <= 3 and of_torch == 1 for _, threads, of_torch in last)


def sleep_and_tell(world: World, folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(3600)


CALLER = """
import sys
from pathlib import Path
from verify.test_forked_ranks import sleep_and_tell
from tpresearch.verify.ranks import Ranks
if __name__ == "__main__":
    Ranks().run(2, sleep_and_tell, Path(sys.argv[1]))
"""


@pytest.mark.exhaustive
@pytest.mark.cli
def test_ranks_end_with_a_caller_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "caller.py").write_text(CALLER)
    (told := tmp_path / "told").mkdir()
    command = [sys.executable, str(tmp_path / "caller.py"), str(told)]
    with subprocess.Popen(command, env=environment(tmp_path, **on_path(ROOT / "tests"))) as caller:
        while len(list(told.iterdir())) < 2 and caller.poll() is None:
            time.sleep(0.1)
        caller.kill()
    processes = [int(path.name) for path in told.iterdir()]
    assert len(processes) == 2
    while any(alive(process) for process in processes):
        time.sleep(0.1)


def test_where_torch_is_built_for_cuda_the_server_asks_no_driver_for_a_gpu() -> None:
    """After which no fork of it could use one. NVML, which torch could ask in its stead, is not everywhere."""
    program = (
        "import torch\n"
        "torch.backends.cuda.is_built = lambda: True\n"
        "def ask(*_): raise AssertionError('asked')\n"
        "torch.cuda.is_available = torch.cuda.device_count = ask\n"
        "import tpresearch.verify.warm\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ, capture_output=True)
