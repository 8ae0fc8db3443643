"""Which device a rank gets, on machines that are not there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support.composed import config

from tpresearch.config import ConfigError
from tpresearch.config.world import World
from tpresearch.parallel.device import CPU, Device, check_device, choose_device, device_notes

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


CARD = Device(torch.device("cuda", 3), "nccl", "card 3")
OLD, UNABLE = lambda: (6, 1), lambda *_, **__: False


@pytest.mark.parametrize(
    ("device", "words", "patches", "sentence"),
    [
        (
            CPU,
            ["parallel.fsdp.cpu_offload=true"],
            {},
            "CPU offload needs a CUDA device; false on this device",
        ),
        (
            CARD,
            ["train.dtype=bfloat16"],
            {"is_bf16_supported": UNABLE},
            "card 3 does not support bfloat16; float32",
        ),
        (
            dataclasses.replace(CARD, shared=True),
            ["parallel.async_tp=true"],
            {},
            "ranks share a device here; one device per rank",
        ),
        (
            CARD,
            ["parallel.async_tp=true"],
            {"device_count": lambda: 2, "can_device_access_peer": lambda a, b: a < b},
            "GPU 1 cannot read the memory of GPU 0, as symmetric memory asks; false on this machine",
        ),
        (CARD, ["parallel.compile=true"], {"get_device_capability": OLD}, "the GPU is older than triton"),
        (CARD, ["optimizer.compile=true"], {"get_device_capability": OLD}, "the GPU is older than triton"),
    ],
)
def test_what_a_device_lacks_is_refused(
    visible: pytest.MonkeyPatch, device: Device, words: list[str], patches: dict[str, Any], sentence: str
) -> None:
    visible.setattr("importlib.util.find_spec", lambda name: True)
    for name, of_this in patches.items():
        visible.setattr(torch.cuda, name, of_this)
    plan = "tp" if "parallel.async_tp=true" in words else "fsdp"
    with pytest.raises(ConfigError, match=f"^{words[0]}: {sentence}"):
        check_device(config("model=llama2_debug", f"parallel={plan}", *words), device)
    check_device(config("model=llama2_debug", f"parallel={plan}"), device)


def test_triton_is_needed_for_what_a_gpu_computes(visible: pytest.MonkeyPatch) -> None:
    visible.setattr("importlib.util.find_spec", lambda name: None)
    visible.setattr("shutil.which", lambda name: name)
    for key in ("parallel.compile", "optimizer.compile"):
        with pytest.raises(ConfigError, match=f"^{key}=true: triton is not installed; "):
            check_device(config("model=toy_mlp", "parallel=fsdp", f"{key}=true"), CARD)
    offloaded = ("parallel.fsdp.cpu_offload=true", "optimizer.compile=true")
    check_device(config("model=toy_mlp", "parallel=fsdp", *offloaded), CARD)


@pytest.mark.parametrize("device", [CPU, CARD])
def test_what_compiled_code_is_built_with_is_looked_for(
    visible: pytest.MonkeyPatch, device: Device, tmp_path: Path
) -> None:
    cfg = config("model=toy_mlp", "parallel=fsdp", "parallel.compile=true")
    visible.setattr("importlib.util.find_spec", lambda name: True)
    visible.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    visible.setattr("shutil.which", lambda name: name)
    visible.setattr("sysconfig.get_path", lambda name, scheme: str(tmp_path / "python3.11"))
    lacks = rf"the header files of Python are not installed \({tmp_path}/python3.11/Python.h; apt install python3.11-dev"
    with pytest.raises(ConfigError, match=f"^parallel.compile=true: {lacks}"):
        check_device(cfg, device)
    (tmp_path / "python3.11").mkdir()
    (tmp_path / "python3.11/Python.h").touch()
    check_device(cfg, device)
    visible.delenv("CC", raising=False)
    visible.delenv("CXX", raising=False)
    visible.setattr("shutil.which", lambda name: None)
    language, compiler = ("C", "gcc") if device is CARD else (r"C\+\+", r"g\+\+")
    with pytest.raises(
        ConfigError, match=rf"^parallel.compile=true: no {language} compiler is found \({compiler}\)"
    ):
        check_device(cfg, device)


def test_float32_on_a_gpu_is_said_to_be_slow() -> None:
    (note,) = device_notes(CARD, config("model=toy_mlp"))
    assert note.startswith("float32 runs without TF32, ")
    assert device_notes(CARD, config("model=toy_mlp", "train.dtype=bfloat16")) == []
