"""Cases of a test that only `make test-all` runs."""

from __future__ import annotations

from typing import Any

import pytest


def exhaustive(*values: Any) -> Any:
    """A case for `parametrize` beside others that stand for it every day."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)
