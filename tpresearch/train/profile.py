"""profiler=trace: a Chrome trace of a few steps on each rank, and the time in each class of kernel."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tpresearch.config.choices import ProfilerName
from tpresearch.config.schema import ProfilerConfig
from tpresearch.track.record import write_json
from tpresearch.train.observe import Observer
from tpresearch.train.state import TrainState

log = logging.getLogger(__name__)

KERNEL_CLASSES = {
    "collective": r"nccl|c10d|gloo",
    "attention": r"attention|flash|fmha|sdpa",
    "matmul": r"gemm|cutlass|nvjet|xmma|cublas|aten::(mm|addmm|bmm|linear)\b|\bmkldnn",
    "optimizer": r"adam|sgd|lerp|foreach",
    "copy": r"memcpy|memset|aten::(copy_|cat|clone|fill_|zero_)\b|split_with_sizes_copy|chunk_cat",
}
"""Regular expressions for names of kernels, or of a CPU's ops; the first class that matches counts. All others are pointwise."""


class Profiler(Observer):
    """Profiles some consecutive steps of this process, and writes:

    trace-rank<r>.json.gz     for chrome://tracing or ui.perfetto.dev, with the phases of each step marked
    kernels-rank<r>.json      milliseconds per step and calls by class of kernel, and of the slowest kernels
    memory-rank<r>.pickle     allocations of those steps, for pytorch.org/memory_viz (profiler.memory, on CUDA)

    Args:
        folder: created if it does not exist.
    """

    def __init__(self, config: ProfilerConfig, folder: Path, rank: int, on_cuda: bool) -> None:
        self._config, self._folder, self._rank, self._on_cuda = config, folder, rank, on_cuda
        self._steps = 0
        self._profile: profile | None = None

    @contextmanager
    def step(self, state: TrainState) -> Iterator[None]:
        self._steps += 1
        if self._steps == self._config.first_step:
            self._start()
        yield
        if self._profile and self._steps == self._config.first_step + self._config.steps - 1:
            self._stop(self._profile)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._profile is None:
            yield
            return
        with record_function(name):
            yield

    def _start(self) -> None:
        if self._config.memory:
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        # Else it writes lines of its own on each rank (torch 2.13).
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_cuda else [])]
        # acc_events, or torch 2.11 warns of further cycles.
        self._profile = profile(activities=activities, acc_events=True)
        self._profile.start()

    def _stop(self, profiled: profile) -> None:
        self._profile = None
        if self._on_cuda:
            torch.cuda.synchronize()
        profiled.stop()
        try:
            self._write(profiled)
        except OSError as problem:  # which costs no run
            log.warning("the profile cannot be written: %s", problem.strerror)
        if self._config.memory:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, profiled: profile) -> None:
        where = self._folder
        where.mkdir(parents=True, exist_ok=True)
        profiled.export_chrome_trace(str(where / f"trace-rank{self._rank}.json.gz"))
        found = summarize(profiled.key_averages(), self._on_cuda, self._config.steps)
        write_json(where / f"kernels-rank{self._rank}.json", found)
        if self._config.memory:
            torch.cuda.memory._dump_snapshot(str(where / f"memory-rank{self._rank}.pickle"))
        classes = ", ".join(f"{name} {row['ms']:.1f}" for name, row in found["classes"].items())
        log.info("profile of %d steps in %s: ms per step: %s", self._config.steps, where, classes)
        if not classes:
            log.warning("the profile has no kernels: CUPTI, from which torch has them, cannot be used here")


def profiled_steps(config: ProfilerConfig) -> range:
    """Steps of a process, counted from 1; none where it is off."""
    steps = 0 if config.name is ProfilerName.none else config.steps
    return range(config.first_step, config.first_step + steps)


def kernel_class(kernel: str) -> str:
    """The class of a kernel, or of an op on a CPU, by its name."""
    return next(
        (name for name, words in KERNEL_CLASSES.items() if re.search(words, kernel, re.I)), "pointwise"
    )


def summarize(events: Iterable[Any], on_cuda: bool, steps: int) -> dict[str, Any]:
    """Milliseconds per step, and calls: of kernels on CUDA, else of ops without the ops that they call."""
    rows, events = [], list(events)
    # Phases and the optimizer's step are ranges: on the device each has a row with the time of kernels that have rows too. It is
    # known by its mark, or by the host's mark on the same name. (A host's row alone is no sign: inductor names one after each
    # Triton kernel that it launches.)
    ranges = {event.key for event in events if event.is_user_annotation}
    for event in events:
        if on_cuda != (event.device_type == torch.autograd.DeviceType.CUDA) or event.key in ranges:
            continue
        micros = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        marks = not on_cuda and not event.key.startswith(("aten::", "c10d::", "gloo", "nccl", "mkldnn"))
        if micros > 0 and not marks:
            rows.append({"name": event.key, "ms": micros / 1000 / steps, "calls": event.count / steps})
    rows.sort(key=lambda row: -row["ms"])
    classes: dict[str, dict[str, float]] = {}
    for row in rows:
        into = classes.setdefault(kernel_class(row["name"]), {"ms": 0.0, "calls": 0.0})
        into["ms"] += row["ms"]
        into["calls"] += row["calls"]
    ordered = dict(sorted(classes.items(), key=lambda item: -item[1]["ms"]))
    return {"steps": steps, "device": "cuda" if on_cuda else "cpu", "classes": ordered, "slowest": rows[:60]}
