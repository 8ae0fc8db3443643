"""Memory that one rank needs to read initial weights from a Hugging Face folder: measured at 1B, computed at 70B.

    python experiments/hf_memory/measure.py

It writes a folder of llama2_1b's sizes in bfloat16 (2.2 GB, in a temporary folder), then starts a process for each row
that is rank 0 of as many ranks as the row says, on a process group that sends nothing. RssAnon is the memory that is the
process's own; pages of the mapped files are the page cache's, shared by all ranks of a host and given back on demand.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpresearch.api import load
from tpresearch.config.schema import Config
from tpresearch.config.validate import validate
from tpresearch.config.world import World
from tpresearch.hf.export import write_config, write_weights
from tpresearch.hf.llama import has_rotary_rows
from tpresearch.hf.read import check_weights, from_hugging_face
from tpresearch.parallel.apply import parallelize
from tpresearch.parallel.device import FAKE
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh
from tpresearch.parallel.weights import local_part, materialize
from tpresearch.plan.compiler import fsdp_local_shape
from tpresearch.plan.meta import meta_model, settings_with_defaults
from tpresearch.train.preflight import plan_model

sys.path.append(str(Path(__file__).parents[1]))
from record import place, write_rows

CELLS = [(1, "none"), (8, "fsdp"), (4, "tp"), (4, "sp"), (8, "fsdp_tp mesh.tp=4"), (8, "hsdp_tp mesh.tp=4")]
LARGE = [(8, "fsdp_tp mesh.tp=8"), (16, "fsdp_tp mesh.tp=8"), (64, "fsdp_tp mesh.tp=8"), (64, "fsdp")]
FILE_BYTES = 10**9


def config(model: str, plan: str) -> Config:
    typed_words = [f"model={model}", "tokenizer=bpe_32k", "data=random_tokens", "data.seq_len=16"]
    return load(*typed_words, "train.global_batch_size=64", *f"parallel={plan}".split())


def by_arithmetic(cfg: Config, ranks: int) -> tuple[int, int]:
    """Bytes of a rank's float32 weights, and of the room for its largest part of a query or key projection."""
    model, plan = plan_model(cfg, validate(cfg, ranks))
    held = {
        name: torch.Size(fsdp_local_shape(name, model, plan)).numel() for name, _ in model.named_parameters()
    }
    return 4 * sum(held.values()), 4 * max(size for name, size in held.items() if has_rotary_rows(name))


def write_folder(folder: Path, model: str) -> None:
    """A folder of random weights of these sizes, a file in memory at a time."""
    cfg = config(model, "none")
    shapes = {name: parameter.shape for name, parameter in meta_model(cfg.model).named_parameters()}
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            numbers = shapes[name].numel()
            yield name, noise.repeat(-(-numbers // len(noise)))[:numbers].view(shapes[name])

    settings = settings_with_defaults(cfg.model)
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    head_dim = settings["dim"] // settings["n_heads"]
    write_weights(folder, sizes, read, head_dim, torch.bfloat16, FILE_BYTES)
    write_config(folder, settings, torch.bfloat16, None, None)


def memory(kind: str) -> int:
    """RssAnon or RssFile of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


class Peak(threading.Thread):
    """The most memory of each kind, looked at every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = {kind: memory(kind) for kind in ("RssAnon", "RssFile")}
        self.most, self.over = dict(self.before), threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.003):
            self.sample()

    def sample(self) -> None:
        self.most = {kind: max(most, memory(kind)) for kind, most in self.most.items()}

    def end(self) -> dict[str, int]:
        self.over.set()
        self.join()
        self.sample()
        return {kind: most - self.before[kind] for kind, most in self.most.items()}


def one_rank(folder: str, ranks: int, plan: str) -> None:
    """Print what rank 0 of a cell measures: its bytes, the peaks and the seconds."""
    cfg = config("llama2_1b", plan)
    sizes = validate(cfg, ranks)
    model, _plan = plan_model(cfg, sizes)
    check_weights(folder, cfg.model, model)
    with process_group(FAKE, World(size=ranks, local_size=ranks)):
        parallelize(model, _plan, cfg.parallel, build_mesh(sizes, "cpu"), cfg.train.dtype)
        peak, began = Peak(), time.perf_counter()
        peak.start()
        materialize(model, torch.device("cpu"), from_hugging_face(folder, cfg.model))
        seconds, found = time.perf_counter() - began, peak.end()
    held = sum(local_part(parameter).nbytes for parameter in model.parameters())
    print(held, found["RssAnon"], found["RssFile"], seconds)


def main() -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), "llama2_1b")
        for ranks, plan in CELLS:
            command = [sys.executable, __file__, folder, str(ranks), plan]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            held, own, mapped, seconds = map(float, said.split())
            weights, room = by_arithmetic(config("llama2_1b", plan), ranks)
            assert weights == held, (plan, weights, held)
            row = {"model": "llama2_1b", "ranks": ranks, "parallel": plan}
            row |= in_mb(weights_mb=weights, room_mb=room, measured_mb=own, mapped_mb=mapped)
            rows.append(row | {"seconds": f"{seconds:.1f}"})
    for ranks, plan in LARGE:
        weights, room = by_arithmetic(config("llama2_70b", plan), ranks)
        row = {"model": "llama2_70b", "ranks": ranks, "parallel": plan}
        rows.append(row | in_mb(weights_mb=weights, room_mb=room))
    write_rows(place(Path(__file__).parent) / "results.csv", rows)
    for row in rows:
        print("  ".join(f"{name} {cell}" for name, cell in row.items()))


def in_mb(**sizes: float) -> dict[str, str]:
    return {name: f"{size / 1e6:.1f}" for name, size in sizes.items()}


if __name__ == "__main__":
    main() if len(sys.argv) == 1 else one_rank(sys.argv[1], int(sys.argv[2]), sys.argv[3])
