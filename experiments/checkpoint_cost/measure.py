"""Cost of a checkpoint, compared with what the same disk takes for as many bytes in the same minute.

python experiments/checkpoint_cost/measure.py [megabytes=240] [repeats=5] [folder=/tmp]    # writes results.csv (record.py says where)
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "tests")]
import torch
import torch.distributed as dist
from record import place, write_rows
from support.composed import config
from torch import nn

from tpresearch.checkpoint.disk import Manifest, read_checkpoint, step_folders
from tpresearch.checkpoint.load import load
from tpresearch.checkpoint.save import Saver
from tpresearch.checkpoint.state import state_of
from tpresearch.config.schema import CheckpointConfig
from tpresearch.config.world import World
from tpresearch.launch.options import command, read_options
from tpresearch.launch.stop import StopFlag
from tpresearch.parallel.device import CPU
from tpresearch.parallel.group import process_group
from tpresearch.train.optim import build_optimizer
from tpresearch.train.state import TrainState
from tpresearch.train.stopping import AgreedStop
from tpresearch.verify.ranks import Ranks

HERE = Path(__file__).parent
MIB, POLLS = 2**20, 2000
ABOUT = Manifest(0, 0, None, {}, 100, "c", "t", 0, "none", {}, 1, torch.__version__)


@dataclass
class Options:
    megabytes: int = 240
    repeats: int = 5
    folder: str = "/tmp"


def trained(megabytes: int) -> TrainState:
    """A state of this size: a third of it weights, the rest AdamW's moments, all different from 0."""
    side = 1024
    layers = max(1, megabytes * MIB // 3 // (side * side * 4))
    model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(layers)))
    optimizer = build_optimizer(model.parameters(), config("parallel=none").optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return TrainState(1, model, optimizer)


@contextmanager
def timed(into: list[float], clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
    began = clock()
    yield
    into.append(clock() - began)


def forget(folder: Path) -> None:
    """Have the kernel drop what it holds of these files in memory."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def written_by_dd(path: Path, size: int) -> None:
    words = ["dd", "if=/dev/zero", f"of={path}", "bs=4M", f"count={size // (4 * MIB)}", "conv=fsync"]
    subprocess.run(words, check=True, capture_output=True)


def read_by_dd(path: Path) -> None:
    subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=4M"], check=True, capture_output=True)


def polls(world: World) -> float:
    """Processor seconds of a poll of the stop flag, which waits for no one, with the work of a step between two."""
    spent: list[float] = []
    with process_group(CPU, world), StopFlag() as flag:
        stop = AgreedStop(flag)
        a = torch.randn(128, 128)
        for _ in range(POLLS):
            a = (a @ a).tanh()
            with timed(spent, time.thread_time):
                stop.poll()
        stop.settle()
        dist.barrier()
    return statistics.median(spent)


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    run = Path(tempfile.mkdtemp(prefix="cost-", dir=options.folder))
    state = trained(options.megabytes)
    with state_of(state) as tensors:
        size = sum(tensor.nbytes for tensor in tensors.values())
    times: dict[str, list[float]] = {
        name: [] for name in ("save", "dd write", "restore", "dd read", "stall", "stall, processor")
    }
    saver = Saver(run, CheckpointConfig(keep=1), ABOUT, None)
    beside = Saver(run, CheckpointConfig(keep=1), ABOUT, None, background=True)
    saver.start(0)
    for _ in range(options.repeats):
        state.step += 1
        with timed(times["save"]):
            saver.save(state, 0, None, last=True)
        with timed(times["dd write"]):
            written_by_dd(run / "dd", size)
        newest = step_folders(run)[-1]
        forget(newest)
        with timed(times["restore"]):
            load(read_checkpoint(newest), state, None)
        (run / "alone").mkdir()
        (run / "dd").rename(run / "alone" / "dd")
        forget(run / "alone")
        with timed(times["dd read"]):
            read_by_dd(run / "alone" / "dd")
        shutil.rmtree(run / "alone")
        state.step += 1
        with timed(times["stall"]), timed(times["stall, processor"], time.thread_time):
            beside.save(state, 0, None)
        beside.finish()
    shutil.rmtree(run)
    poll_s = max(Ranks().run(2, polls))
    median = {name: statistics.median(spent) for name, spent in times.items()}
    bars = {
        "save": 1.2 * median["dd write"] + 0.3,
        "restore": 1.3 * median["dd read"] + 1,
        "stall": size / 4e9 + 0.03,
        "stall, processor": size / 4e9 + 0.03,
        "stop flag": 1e-4,
    }
    found = median | {"stop flag": poll_s}
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{size / MIB:.0f} MiB of state; medians of {options.repeats}; load average {os.getloadavg()[0]:.1f}"
    )
    print(
        f"dd conv=fsync {median['dd write']:.2f} s, dd of a cold file {median['dd read']:.2f} s; peak memory {held / MIB:.0f} MiB"
    )
    rows = []
    for name, bar in bars.items():
        share = f"{found[name] / bar:.2f}"
        print(f"{name:18} {found[name]:10.5f} s   bar {bar:10.5f} s   {share} of it")
        rows.append(
            {"what": name, "seconds": f"{found[name]:.6f}", "bar_s": f"{bar:.6f}", "share_of_bar": share}
        )
    write_rows(place(HERE) / "results.csv", rows)


if __name__ == "__main__":
    command(main)
