"""A small corpus of files, and the configs that read it into a cache of the test's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.corpora import Configure, Decode
from tokenizers import Tokenizer

from tpresearch.config.schema import DataConfig, DataSource, TokenizerConfig
from tpresearch.data.rows import PackedCorpus


def text_of_document(index: int) -> str:
    """Text that no other document has, with line ends, blanks and letters of several bytes."""
    words = [f"w{index}x{position}" for position in range(40)]
    return f"Document {index}:\n\n" + "  ".join(words) + "\n\tnaïve 数据 🙂\n" * 3


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of 120 text files in two folders: enough for whole documents to be held out."""
    folder = tmp_path / "texts"
    for index in range(120):
        file = folder / f"part{index % 2}" / f"{index:03}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text_of_document(index))
    return folder


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Makes a DataConfig for `path` with rows of 16 + 1 tokens and a cache below tmp_path."""

    def make(
        path: str | list[str] | None = None, source: DataSource = DataSource.text, **settings: Any
    ) -> DataConfig:
        values: dict[str, Any] = {"seq_len": 16, "cache_dir": str(tmp_path / "cache"), **settings}
        return DataConfig(source=source, path=path, **values)

    return make


@pytest.fixture
def bpe() -> TokenizerConfig:
    return TokenizerConfig(vocab_size=400)


@pytest.fixture
def decoded() -> Decode:
    """Makes the text of all rows of `train` or `held_out`, end to end, end-of-text tokens included."""

    def decode(corpus: PackedCorpus, part: str) -> str:
        tokenizer = Tokenizer.from_file(str(corpus.folder / "tokenizer.json"))
        return tokenizer.decode(getattr(corpus, part).ravel().tolist(), skip_special_tokens=False)

    return decode
