"""Steps on a device that no machine has: fake tensors on it learn as others do, and an op that mixes them with those of the CPU raises.

    python -m support.card '[["fsdp_tp", 4, ["train.on_nonfinite=skip"]]]'     plan, ranks, options

A process of its own, which autograd has not begun in: its threads are those of the devices that are there then.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from support.composed import config, in_two_parts
from support.fake_steps import two_steps
from tpresearch.parallel.device import Device
from tpresearch.simulate.device_memory import note_propagation, propagating

Case = tuple[str, int, list[str]]
COMMON = "model=llama2_debug", "train.dtype=bfloat16", "train.loss_chunk=6", "train.clip_grad_norm=0.2"
NAME = "card"
FLAGGED = torch.ops.tpresearch.add_product_.default
"""Has a flag on the CPU, which it reads there."""


def register() -> Device:
    """For the rest of this process: the device, on which fake tensors say that they are those of CUDA.

    (Private, and experimental; the same in torch 2.11 to 2.14.)
    """
    module = MagicMock()  # with the streams and events of FSDP
    module.device_count.return_value, module.current_device.return_value = 1, 0
    module._is_in_bad_fork.return_value = False
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    setattr(FakeTensor, "is_cuda", property(lambda tensor: tensor.device.type == NAME))  # noqa: B010
    # FSDP makes an empty one while it is applied.
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", lambda size, **_: torch.empty(size, device="meta"), "PrivateUse1")
    module.library = library  # which ends what it has registered when it is collected
    dist.Backend.backend_capability["fake"].append(NAME)
    return Device(torch.device(NAME, 0), "fake", NAME)


class NoCopies(TorchDispatchMode):
    """Refuses an op with tensors on both sides, such as a copy from or to the device, for which the host would wait."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local ops come here
        result = func(*args, **(kwargs or {}))
        tensors = (t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor))
        devices = {t.device.type for t in tensors} - {"meta"}
        assert len(devices) < 2 or func is FLAGGED or propagating, f"{func} has tensors on {sorted(devices)}"
        return result


def main() -> None:
    device = register()
    for plan, world, options in json.loads(sys.argv[1]):
        cfg = config(*COMMON, f"parallel={plan}", *options)
        cfg = cfg if cfg.train.micro_batch_size else in_two_parts(cfg, world)
        with note_propagation():
            two_steps(cfg, world, device, NoCopies())


if __name__ == "__main__":
    main()
