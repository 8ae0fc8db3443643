"""What tests share: composed configs, a corpus that needs no files, and a pool of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tpresearch.verify.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()
