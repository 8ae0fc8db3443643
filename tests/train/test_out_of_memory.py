"""Where a device is full, a run ends with one sentence and what to change, not with torch's traceback."""

from __future__ import annotations

import json
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.composed import config

from tpresearch.config import ConfigError
from tpresearch.config.axes import MeshSizes
from tpresearch.config.world import World
from tpresearch.launch import Run
from tpresearch.train import main
from tpresearch.train.observe import Observer
from tpresearch.train.out_of_memory import out_of_memory, refusing_out_of_memory
from tpresearch.train.preflight import preflight
from tpresearch.verify.ranks import Ranks

SAID = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.11 GiB of which 1.38 GiB is free. Including "
    "non-PyTorch memory, this process has 77.71 GiB memory in use. Of the allocated memory 76.00 GiB is allocated by PyTorch, and "
    "0.5 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF"
)
WHY = "a device is out of memory (Tried to allocate 2.00 GiB, GPU 1 has a total capacity of 79.11 GiB of which 1.38 GiB is free)"
KIND, FULL = "parallel.activation_checkpointing", "parallel.activation_checkpointing=full"


@pytest.mark.parametrize(
    ("words", "dp", "trains", "named", "fix"),
    [
        ([], 2, True, "train.micro_batch_size=4", {"train.micro_batch_size": 2}),  # half of its 8 rows
        (["train.global_batch_size=9"], 1, True, "train.micro_batch_size=9", {"train.micro_batch_size": 3}),
        (["train.micro_batch_size=1"], 2, True, "activation_checkpointing=none", {KIND: "full"}),
        (["train.micro_batch_size=1", FULL], 2, True, "parallel=fsdp", {}),
        ([], 2, False, "parallel=fsdp", {}),  # its state alone does not fit
    ],
)
def test_it_proposes_what_takes_less(
    words: list[str], dp: int, trains: bool, named: str, fix: dict[str, object]
) -> None:
    error = out_of_memory(config("parallel=fsdp", *words), MeshSizes(dp_shard=dp), SAID, trains)
    assert f"{named}: {WHY}; " in str(error)
    assert str(error).endswith("python -m tpresearch.planner shows plans that fit")
    assert error.fix == fix


def test_another_host_whose_torchrun_reports_for_itself_keeps_torchs_error() -> None:
    error = torch.OutOfMemoryError(SAID)
    away = World(rank=8, size=16, local_rank=0, local_size=8, elastic=True)
    refusing = refusing_out_of_memory(config("parallel=fsdp"), MeshSizes(dp_shard=16), away, trains=True)
    with pytest.raises(torch.OutOfMemoryError), refusing:
        raise error


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_libraries_without_room_are_told_from_other_errors(said: str, refused: bool) -> None:
    ends = pytest.raises(ConfigError if refused else RuntimeError, match=re.escape(said))
    with ends, refusing_out_of_memory(config("parallel=none"), MeshSizes(), World(), trains=True):
        raise RuntimeError(said)


NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details), "
    "NCCL version 2.28.9\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
)


def test_where_groups_are_made_it_is_refused_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def init(*_: object, **__: object) -> None:
        raise dist.DistBackendError(NCCL)

    monkeypatch.setattr(dist, "init_process_group", init)
    job = preflight(config("model=toy_mlp", "parallel=none", "data=random_tokens"), World())
    why = r"^parallel=none: a device is out of memory \(Cuda failure 2 'out of memory'\); one that shards more, "
    with pytest.raises(ConfigError, match=why):
        main.train(job, Run(tmp_path, World()))


def train_beyond(world: World, folder: Path) -> str:
    class Full(Observer):
        def phase(self, name: str) -> AbstractContextManager[object]:
            if name == "backward":
                raise torch.OutOfMemoryError(SAID)
            return nullcontext()

    cfg = config("model=toy_mlp", "parallel=ddp", "data=random_tokens", "train.eval_rows=0")
    with pytest.raises(ConfigError) as error:
        main.train(preflight(cfg, world), Run(folder, world), [Full()])
    return str(error.value)


def test_a_run_ends_with_it(ranks: Ranks, tmp_path: Path) -> None:
    (said,) = set(ranks.run(2, train_beyond, tmp_path))
    assert said.startswith(f"train.micro_batch_size=4: {WHY}; ")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("failed", f"ConfigError: {said}")
