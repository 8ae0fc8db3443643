"""Cases of a test that only `make test-all` runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def exhaustive(*values: Any) -> Any:
    """A case for `parametrize` beside others that stand for it every day."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


def on_card(*values: Any) -> Any:
    """A case for `parametrize` that needs a CUDA device, which ranks share."""
    no_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
    return pytest.param(*values, marks=[pytest.mark.gpu, no_card, pytest.mark.xdist_group("one card")])
