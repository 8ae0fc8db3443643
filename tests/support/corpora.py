"""What makes and reads the corpora of tests: the types of their fixtures, and a corpus that is known to be of text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from tpresearch.config.schema import DataConfig, DataSource, TokenizerConfig
from tpresearch.config.world import SINGLE_PROCESS, World
from tpresearch.data.pipeline import prepare
from tpresearch.data.rows import PackedCorpus

Decode = Callable[[PackedCorpus, str], str]


class Configure(Protocol):
    """Makes a DataConfig: where it reads, and what differs from the fixture's."""

    def __call__(
        self, path: str | list[str] | None = None, source: DataSource = DataSource.text, **settings: Any
    ) -> DataConfig: ...


def prepared(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    world: World = SINGLE_PROCESS,
    check: Callable[[], None] = lambda: None,
) -> PackedCorpus:
    """`prepare`, for a config that reads text: packed rows, and no synthetic ones."""
    corpus = prepare(data, tokenizer, world, check)
    assert isinstance(corpus, PackedCorpus)
    return corpus
