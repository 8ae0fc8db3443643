"""A rank of measure.py: our step beside those of the peers under one plan, with the same Llama, initial weights, batches, AdamW,
clipping and learning rate, in one job, in turns.

Those whose library is missing are left out. Appends a row per contender to results.csv (record.py says where).
"""

from __future__ import annotations

import ast
import gc
import importlib.metadata
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tpresearch.config import Config
from tpresearch.data.pipeline import prepare
from tpresearch.data.rows import AnyCorpus
from tpresearch.hf.export import write_config, write_weights
from tpresearch.launch import Run, entrypoint
from tpresearch.parallel import group
from tpresearch.parallel.device import Device
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh, data_rank
from tpresearch.plan.meta import plain_model, settings_with_defaults
from tpresearch.track.tracker import RunFacts, Tracker
from tpresearch.train.assemble import assemble, weight_source
from tpresearch.train.loop import Loop
from tpresearch.train.main import build_observers
from tpresearch.train.preflight import Preflight, preflight

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from record import place, write_rows

HERE = Path(__file__).parent
PLANS = {
    "tutorial": ("sp", "fsdp", "fsdp_tp"),
    "fabric": ("ddp", "sp", "fsdp", "fsdp_tp"),
    "transformers": ("ddp", "tp", "fsdp", "fsdp_tp"),
}
"""Which of our plans each has: Fabric's example and the tutorial have tensor parallelism with a sharded sequence alone,
transformers without one alone."""
ALONE = "PEERS_ALONE"
"""Names the one contender of a job, which then has a process's memory as its own: `measure.py --apart`."""
WARM_UP, BLOCK = 3, 2
"""Steps of each before anything is timed, and before it is the next one's turn."""


@dataclass
class Contender:
    name: str
    steps: Iterator[float]
    """Each trains once more and is the loss of this rank's rows."""
    losses: list[float] = field(default_factory=list)
    """Of the global batches."""
    wall: list[float] = field(default_factory=list)
    """Seconds per step, a number per block."""
    cpu: list[float] = field(default_factory=list)
    """Of processor time of the ranks' main threads, together."""
    wire_bytes: list[int] = field(default_factory=list)
    """What all ranks sent per step, as the kernel counts it at the loopback interface."""
    peak_bytes: int = 0
    """Of the CPU allocator on rank 0, at most at once, from before its model was built to the end of its second step."""

    def run(self, count: int) -> None:
        for _ in range(count):
            mean = torch.tensor(next(self.steps), dtype=torch.float64)
            dist.all_reduce(mean)  # equal numbers of tokens on each data-parallel rank
            self.losses.append(mean.item() / dist.get_world_size())

    def take_turn(self) -> None:
        """One block, timed; what lies between the barriers is this contender's alone."""
        dist.barrier()
        sent, began, used = loopback_bytes(), time.perf_counter(), time.thread_time()
        found = [next(self.steps) for _ in range(BLOCK)]
        used = time.thread_time() - used
        dist.barrier()
        self.wall.append((time.perf_counter() - began) / BLOCK)
        self.wire_bytes.append((loopback_bytes() - sent) // BLOCK)
        both = torch.tensor([used / BLOCK, *found], dtype=torch.float64)
        dist.all_reduce(both)
        self.cpu.append(both[0].item())
        self.losses += (both[1:] / dist.get_world_size()).tolist()


def loopback_bytes() -> int:
    """What this network namespace's ranks have sent each other. It says something where nothing else is in there."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    (line,) = [line for line in lines if line.strip().startswith("lo:")]
    return int(line.partition(":")[2].split()[8])


@entrypoint("train", preflight=preflight)
def main(job: Preflight, run: Run) -> None:
    cfg, sizes, device = job.cfg, job.sizes, job.device
    assert device
    assert cfg.train.steps
    alone = os.environ.get(ALONE)
    if alone not in (None, "ours"):
        group.keep_freed_memory = lambda: None  # a user's script has glibc's defaults
    rounds = (cfg.train.steps - WARM_UP) // BLOCK
    cfg.train.steps, cfg.train.eval_every = cfg.train.steps + 1, None  # the last one is never reached
    corpus = prepare(cfg.data, cfg.tokenizer, run.world)
    with process_group(device, run.world), tempfile.TemporaryDirectory() as scratch:
        mesh = build_mesh(sizes, device.type)
        made = makers(job, device, run, mesh, corpus, Path(scratch))
        every = {name: make for name, make in made if name == "ours" or alone in (None, name)}
        contenders = [measured(name, make) for name, make in every.items()]
        if alone:
            contenders = contenders[-1:]
        check_same_work(contenders)
        gc.disable()
        for turn in range(rounds):
            for nth in range(len(contenders)):
                contenders[(turn + nth) % len(contenders)].take_turn()
        check_same_work(contenders)
        if run.world.rank == 0:
            report(job, contenders)


def makers(
    job: Preflight, device: Device, run: Run, mesh: DeviceMesh, corpus: AnyCorpus, scratch: Path
) -> Iterator[tuple[str, Callable[[], Iterator[float]]]]:
    """Those that have this plan and are installed: what makes the steps of each."""
    cfg, sizes = job.cfg, job.sizes
    weights = whole_weights(job)
    folder = [str(scratch)]
    dist.broadcast_object_list(folder)
    loop = None

    def batches(step: int) -> tuple[Tensor, Tensor]:
        assert loop
        batch = loop.batches.batch(step, data_rank(mesh), sizes.dp)
        return batch.inputs, batch.targets

    def ours() -> Iterator[float]:
        nonlocal loop
        observers = build_observers(job, mesh, device, None)
        loop = assemble(job, mesh, device, corpus, observers)
        return our_steps(loop, job, device, run)

    yield "ours", ours
    given = (cfg.parallel.name, sizes.dp, sizes.tp)
    taught = (batches, adamw_of(cfg), cfg.train.clip_grad_norm)
    for name in ("tutorial", "fabric"):
        if cfg.parallel.name in PLANS[name] and (train := train_of(name)):
            yield name, partial(train, *given, cfg.model.args, weights, *taught)
    if cfg.parallel.name in PLANS["transformers"] and (train := train_of("transformers")):
        if run.world.rank == 0:
            as_hugging_face(Path(folder[0]), weights, settings_with_defaults(cfg.model))
        dist.barrier()
        yield "transformers", partial(train, *given, Path(folder[0]), *taught)


def adamw_of(cfg: Config) -> dict[str, Any]:
    """The config's settings of torch's AdamW."""
    settings = {name: getattr(cfg.optimizer, name) for name in ("lr", "eps", "weight_decay")}
    return {**settings, "betas": tuple(cfg.optimizer.betas), "fused": True}


def train_of(name: str) -> Callable[..., Iterator[float]] | None:
    try:
        return importlib.import_module(f"{name}_llama").train
    except ImportError as error:
        print(f"{name} is left out: {error}", file=sys.stderr)
        return None


def whole_weights(job: Preflight) -> dict[str, Tensor]:
    """The run's initial weights by name, as one process has them."""
    model = plain_model(job.cfg.model)
    weight_source(job.cfg, job.plan.initializers)(model)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def as_hugging_face(
    folder: Path, weights: dict[str, Tensor], settings: dict[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    counts = {name: weight.numel() for name, weight in weights.items()}
    head_dim = settings["dim"] // settings["n_heads"]
    write_weights(folder, counts, lambda names: ((n, weights[n]) for n in names), head_dim, dtype)
    write_config(folder, settings, dtype, None, None)


def our_steps(loop: Loop, job: Preflight, device: Device, run: Run) -> Iterator[float]:
    """With a logged row per step, on disk and on the terminal, as every run has it."""
    facts = RunFacts(run.world.size, job.sizes.nontrivial(), job.parameters, device.name)
    tracker = Tracker(job.cfg, run.folder, facts, loop.setup.steps) if run.world.rank == 0 else None
    for row in loop.rows():
        if tracker:
            tracker.log(row)
        loss = row["train/loss"]
        assert loss is not None
        yield loss


def measured(name: str, make: Callable[[], Iterator[float]]) -> Contender:
    """A contender after its warm-up, the first two steps of which were watched by torch's profiler of allocations."""
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        contender = Contender(name, make())
        contender.run(2)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # pyrefly: ignore[missing-attribute]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    contender.peak_bytes = peak
    contender.run(WARM_UP - 2)
    return contender


def check_same_work(contenders: list[Contender]) -> None:
    """The first losses agree to rounding, which training then makes larger.

    Raises:
        SystemExit: naming the contender whose losses are others.
    """
    ours = contenders[0].losses
    for contender in contenders[1:]:
        for step, (a, b) in enumerate(zip(ours, contender.losses, strict=True)):
            if abs(a - b) > (1e-5 if step < WARM_UP else 1e-2) * abs(a):
                raise SystemExit(f"{contender.name}: loss {b} at step {step + 1}, where ours is {a}")


def report(job: Preflight, contenders: list[Contender]) -> None:
    ours = contenders[0]
    tokens = job.cfg.train.global_batch_size * job.cfg.data.seq_len
    rows = []
    for contender in contenders:
        wall = statistics.quantiles([a / b for a, b in zip(contender.wall, ours.wall, strict=True)], n=4)
        cpu = statistics.quantiles([a / b for a, b in zip(contender.cpu, ours.cpu, strict=True)], n=4)
        differences = [abs(a - b) for a, b in zip(contender.losses, ours.losses, strict=True)]
        plan = job.cfg.parallel.name + ("" if job.cfg.model.blocks else "_one_unit")
        row: dict[str, object] = {"plan": plan, "ranks": job.sizes.world, "model": job.cfg.model.name}
        row |= {"contender": contender.name, "version": version(contender.name)}
        row["tokens_per_second"] = round(tokens / statistics.median(contender.wall))
        for kind, (low, middle, high) in {"wall": wall, "cpu": cpu}.items():
            row |= {f"{kind}_ratio": round(middle, 3)}
            row |= {f"{kind}_quartile_1": round(low, 3), f"{kind}_quartile_3": round(high, 3)}
        row["cpu_ms"] = round(1e3 * statistics.median(contender.cpu))
        row["wire_mib"] = round(statistics.median(contender.wire_bytes) / 2**20, 2)
        row["peak_mib"] = round(contender.peak_bytes / 2**20, 1)
        row["lines"] = lines(contender.name)
        row |= {"loss": round(contender.losses[-1], 6)}
        row |= {"first_steps_differ_by": f"{max(differences[:WARM_UP]):.1e}"}
        row |= {"all_steps_differ_by": f"{max(differences):.1e}"}
        row |= {"torch": torch.__version__, "date": date.today().isoformat()}
        rows.append(row)
        print(row)
    write_rows(place(HERE) / ("apart.csv" if ALONE in os.environ else "results.csv"), rows, append=True)


def lines(name: str) -> int:
    """Of code in a user's script, without docstrings, comments and blank lines. Ours is a command."""
    if name == "ours":
        return 1
    tree = ast.parse((HERE / f"{name}_llama.py").read_text())  # unparsed, it has no comments and one style
    for node in ast.walk(tree):
        if isinstance(node, ast.Module) and ast.get_docstring(node):
            node.body.pop(0)
    return sum(bool(line.strip()) for line in ast.unparse(tree).splitlines())


def version(name: str) -> str:
    installed = {found.name for found in importlib.metadata.distributions()}
    # The second contains the first.
    fabric = "lightning-fabric" if "lightning-fabric" in installed else "pytorch-lightning"
    packages = {"fabric": (fabric,), "transformers": ("transformers", "accelerate")}.get(name, ())
    return " ".join(importlib.metadata.version(package) for package in packages)


if __name__ == "__main__":
    main()
