"""What tests share: composed configs, a corpus that needs no files, and a pool of ranks."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tpresearch.verify.ranks import Ranks

# A shell starts jobs in the background with Ctrl-C ignored, which tests of Ctrl-C would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()
