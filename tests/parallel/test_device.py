"""Which device a rank gets, on machines that are not there."""

from __future__ import annotations

import pytest
import torch
from support.composed import config

from tpresearch.config import ConfigError
from tpresearch.config.world import World
from tpresearch.parallel.device import CPU, choose_device, device_notes

LAST_OF_FOUR = World(rank=3, size=4, local_rank=3, local_size=4, elastic=True)
OWN = World(rank=3, size=4, local_rank=3, local_size=4, elastic=True, own_device=True)


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    return monkeypatch


@pytest.mark.parametrize(
    ("gpus", "world", "kind", "chosen"),
    [
        (4, LAST_OF_FOUR, "auto", ("cuda:3", "nccl", False)),
        (8, LAST_OF_FOUR, "auto", ("cuda:3", "nccl", False)),
        (2, LAST_OF_FOUR, "auto", ("cpu", "gloo", False)),
        (2, LAST_OF_FOUR, "cuda", ("cuda:1", "nccl", True)),
        (1, OWN, "auto", ("cuda:0", "nccl", False)),
        (1, OWN, "cuda", ("cuda:0", "nccl", False)),
        (0, OWN, "auto", ("cpu", "gloo", False)),
    ],
)
def test_each_rank_gets_a_device_of_its_own_or_all_the_cpu(
    visible: pytest.MonkeyPatch, gpus: int, world: World, kind: str, chosen: tuple[str, str, bool]
) -> None:
    visible.setattr(torch.cuda, "device_count", lambda: gpus)
    device = choose_device(config("model=toy_mlp", "parallel=ddp", f"device={kind}"), world)
    assert (str(device.torch), device.backend, device.shared) == chosen


@pytest.mark.parametrize(("gpus", "kind", "said"), [(2, "auto", 1), (2, "cpu", 0), (0, "auto", 0)])
def test_gpus_that_are_left_idle_are_told_of(
    visible: pytest.MonkeyPatch, gpus: int, kind: str, said: int
) -> None:
    visible.setattr(torch.cuda, "device_count", lambda: gpus)
    cfg = config("model=toy_mlp", "parallel=ddp", f"device={kind}")
    note = "ranks are more than GPUs (2) and run on the CPU; device=cuda lets them share GPUs"
    assert device_notes(CPU, cfg) == [note] * said


def test_async_tp_is_refused_where_each_rank_sees_its_gpu_alone(visible: pytest.MonkeyPatch) -> None:
    visible.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"^parallel.async_tp=true.* torchrun without --virtual-local-rank"):
        choose_device(config("model=llama2_debug", "parallel=tp", "parallel.async_tp=true"), OWN)
