"""The modes of torch in which every run computes, whatever a notebook or script has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def modes_of_a_run() -> Iterator[None]:
    """A context, or a decorator, in which a caller's grad mode, autocast, default dtype and default device are not in effect."""
    import torch  # late: a config needs none

    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":  # a mode of Python code around each op, which costs time
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield
