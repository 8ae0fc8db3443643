"""The device a rank computes on, and whether it supports what the config asks for."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend

from tpresearch.config.choices import Checkpointing
from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config, DeviceKind, Dtype
from tpresearch.config.world import World


@dataclass(frozen=True)
class Device:
    """A rank's device and the backend that its collectives use."""

    torch: torch.device
    backend: str
    name: str
    """Name in the run's record: `cpu`, or the accelerator's."""
    shared: bool = False
    """Whether ranks of this host share the device."""
    is_alone: bool = False
    """Whether this rank sees no other's device (`World.own_device`)."""

    @property
    def type(self) -> str:
        return self.torch.type


CPU = Device(torch.device("cpu"), "gloo", "cpu")
FAKE = Device(torch.device("cpu"), "fake", "cpu")
"""Of one rank among others that are not there: collectives return at once and send nothing. Tensors are fake ones of the CPU: a build
of torch without CUDA has no autograd for others."""


def choose_device(cfg: Config, world: World) -> Device:
    """The configured device; by default CUDA if every local rank can have its own device, else the CPU.

    With device=cuda and fewer devices than ranks, ranks share them: to test correctness on one GPU, not for speed.

    Raises:
        ConfigError: for a device, dtype or option that this machine does not support.
    """
    count = gpu_count()
    if cfg.device is DeviceKind.cuda and count == 0:
        raise ConfigError("device", "cuda", "torch sees no CUDA device", "cpu or auto", fix={"device": "cpu"})
    ranks, place = (1, 0) if world.own_device else (world.local_size, world.local_rank)
    wants_cuda = cfg.device is DeviceKind.cuda or (cfg.device is DeviceKind.auto and count >= ranks)
    if wants_cuda and count:
        index = place % count
        name = torch.cuda.get_device_name(index)
        device = Device(torch.device("cuda", index), "nccl", name, count < ranks, world.own_device)
    else:
        device = CPU
    check_device(cfg, device)
    return device


M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Parameters of `mallopt`, by glibc's malloc.h."""


def keep_freed_memory() -> None:
    """Let glibc keep what this process frees for its next tensors, as torch's allocator does on CUDA; elsewhere, nothing.

    By default it returns most of it to the kernel. FSDP frees each unit that it has gathered: a step of llama2_small on two
    ranks took 250,000 page faults, a tenth of its time, and one of layers twice as wide 700,000, a third. No tensor is mapped by
    itself, and threads that begin later share the main one's memory.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for parameter, value in ((M_TRIM_THRESHOLD, -1), (M_MMAP_MAX, 0), (M_ARENA_MAX, 1)):
            mallopt(parameter, value)


def gpu_count() -> int:
    """CUDA devices that torch can use. (`device_count` alone also counts those whose driver is too old for it.)"""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_device(cfg: Config, device: Device) -> None:
    """Refuse options that the device does not support."""
    on_cuda, narrow = device.type == "cuda", cfg.train.dtype is Dtype.bfloat16
    if narrow and on_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        why, fix = f"{device.name} does not support bfloat16", {"train.dtype": "float32"}
        raise ConfigError("train.dtype", "bfloat16", why, "float32", fix=fix)
    if cfg.parallel.async_tp and (refusal := _missing_for_async_tp(device)):
        raise ConfigError("parallel.async_tp", True, *refusal)
    if cfg.parallel.fsdp.cpu_offload and not on_cuda:
        why, legal = "CPU offload needs a CUDA device", "false on this device"
        raise ConfigError("parallel.fsdp.cpu_offload", True, why, legal)
    if cfg.profiler.memory and not on_cuda:
        why, legal = "a snapshot is of the CUDA allocator, and this is a CPU", "profiler=trace on this device"
        without: dict[str, object] = {"profiler": "trace", "profiler.memory": None}
        raise ConfigError("profiler.memory", True, why, legal, fix=without)
    if cfg.parallel.compile and (missing := _missing_for_compile(on_cuda)):
        raise ConfigError("parallel.compile", True, missing, "false on this machine")
    updates_on_cuda = on_cuda and not cfg.parallel.fsdp.cpu_offload
    if cfg.optimizer.compile and (missing := _missing_for_compile(updates_on_cuda)):
        raise ConfigError("optimizer.compile", True, missing, "false on this machine")
    heads, kv_heads = (cfg.model.args.get(name) for name in ("n_heads", "n_kv_heads"))
    mode = cfg.parallel.activation_checkpointing
    if (
        mode is Checkpointing.budget
        and on_cuda
        and kv_heads not in (None, heads)
        and torch.__version__ < "2.13"
    ):
        why = "torch below 2.13 cannot count the FLOPs of attention whose heads share keys (n_kv_heads)"
        fix = {"parallel.activation_checkpointing": "selective"}
        raise ConfigError("parallel.activation_checkpointing", mode, why, "none, selective or full", fix=fix)


def device_notes(device: Device, cfg: Config) -> list[str]:
    """Notes on how this device computes the config: attention kernel, TF32; and on GPUs that are left idle."""
    args, notes = cfg.model.args, []
    if device.type == "cpu" and cfg.device is DeviceKind.auto and (idle := gpu_count()):
        notes.append(
            f"ranks are more than GPUs ({idle}) and run on the CPU; device=cuda lets them share GPUs"
        )
    heads, kv_heads, dim = (args.get(name) for name in ("n_heads", "n_kv_heads", "dim"))
    if isinstance(heads, int) and isinstance(dim, int):
        dtype = getattr(torch, cfg.train.dtype)
        if device.type == "cuda" and cfg.train.dtype is Dtype.float32:
            kv_heads = heads  # as models.llama2 repeats its keys
        kind = attention_backend(device.torch, dtype, heads, kv_heads or heads, dim // heads)
        notes.append(f"attention: torch chooses its {kind} kernel for {cfg.train.dtype} on this device")
    if device.type == "cuda" and cfg.train.dtype is Dtype.float32:
        notes.append("float32 runs without TF32, at a tenth or less of the speed of train.dtype=bfloat16")
    return notes


def attention_backend(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> str:
    """Which kernel torch chooses for causal attention of this form: cudnn, flash, efficient or math.

    (torch._fused_sdp_choice is private; seen in torch 2.11, 2.13 and 2.14.)
    """
    q, k = (
        torch.empty(1, n, 128, head_dim, device=device, dtype=dtype, requires_grad=True)
        for n in (heads, kv_heads)
    )
    choice = torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=heads != kv_heads)
    names = {kind.value: name for name, kind in SDPBackend.__members__.items()}
    return names[choice].removesuffix("_ATTENTION").lower()


def _missing_for_async_tp(device: Device) -> tuple[str, str] | None:
    """What async TP lacks here, and what would be legal; or None."""
    if device.type != "cuda":
        return "async TP needs CUDA devices with peer access, and this is a CPU", "false on this device"
    if device.shared:
        return "ranks share a device here", "one device per rank"
    if device.is_alone:
        why = "symmetric memory tells ranks by the number of their device, and each sees its own as 0"
        return why, "torchrun without --virtual-local-rank"
    for a, b in itertools.permutations(range(torch.cuda.device_count()), 2):
        if not torch.cuda.can_device_access_peer(a, b):
            why = f"GPU {a} cannot read the memory of GPU {b}, as symmetric memory asks"
            return why, "false on this machine"
    return None


def _missing_for_compile(on_cuda: bool) -> str | None:
    """What torch.compile lacks here, or None."""
    if on_cuda:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if torch.cuda.get_device_capability() < (7, 0):
            return "the GPU is older than triton supports (compute capability 7.0)"
    # What triton builds its launcher with, and inductor the kernels of a CPU.
    variable, default, other, language = (
        ("CC", "gcc", "clang", "C") if on_cuda else ("CXX", "g++", "clang++", "C++")
    )
    compiler = os.environ.get(variable, default)
    if shutil.which(compiler) is None and shutil.which(other) is None:
        return f"no {language} compiler is found ({compiler})"
    headers = Path(sysconfig.get_path("include", "posix_prefix"))
    if not (headers / "Python.h").is_file():
        package = f"apt install {headers.name}-dev, or what it is called on this system"
        return f"the header files of Python are not installed ({headers}/Python.h; {package})"
    return None
