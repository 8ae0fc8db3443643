"""What is held out is decided by names, and never reaches the train split or the tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import pytest
from support.corpora import Configure, Decode, prepared

from tpresearch.config.schema import TokenizerConfig
from tpresearch.data import pipeline
from tpresearch.data.documents import Document
from tpresearch.data.pipeline import cut_out, holds_out_documents, split_document
from tpresearch.data.tokenizer import Tokenizer, train_bpe


def sha1_rule(name: str, every: int) -> bool:
    """The rule written out again, by the letter of the documentation."""
    return int.from_bytes(hashlib.sha1(name.encode()).digest(), "big") % every == 0


def test_whole_documents_are_held_out_by_the_hash_of_their_name(
    texts: Path, configure: Configure, bpe: TokenizerConfig, decoded: Decode
) -> None:
    corpus = prepared(configure(f"{texts}/**/*.txt"), bpe)
    names = {index: f"part{index % 2}/{index:03}.txt" for index in range(120)}
    expected = {index for index, name in names.items() if sha1_rule(name, 20)}
    assert 0 < len(expected) < 15
    train, held_out = decoded(corpus, "train"), decoded(corpus, "held_out")
    for index in names:
        marker = f"w{index}x20 "
        assert (marker in held_out, marker in train) == (index in expected, index not in expected)
    assert corpus.meta["held_out"]["documents"] == len(expected)
    assert corpus.meta["train"]["documents"] == 120 - len(expected)


def test_the_tokenizer_learns_nothing_from_held_out_text(
    texts: Path, configure: Configure, bpe: TokenizerConfig
) -> None:
    held_out = [file for file in texts.rglob("*.txt") if sha1_rule(file.relative_to(texts).as_posix(), 20)]
    before = prepared(configure(f"{texts}/**/*.txt"), bpe)
    for file in held_out:
        file.write_text("qzqzqz " * 500)
    after = prepared(configure(f"{texts}/**/*.txt"), bpe)
    assert before.corpus_hash != after.corpus_hash
    assert before.tokenizer_hash == after.tokenizer_hash
    train_file = next(file for file in texts.rglob("*.txt") if file not in held_out)
    train_file.write_text("qzqzqz " * 500)
    assert prepared(configure(f"{texts}/**/*.txt"), bpe).tokenizer_hash != before.tokenizer_hash


@pytest.mark.parametrize(("max_tokens", "most"), [(None, 1000), (100, 400)])
def test_a_tokenizer_learns_from_the_first_text_alone(
    texts: Path,
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    max_tokens: int | None,
    most: int,
) -> None:
    """No more than is worth it, nor than will be read."""
    learned = list[str]()

    def learn(texts: Iterable[str], vocab_size: int) -> Tokenizer:
        learned.extend(texts)
        return train_bpe(learned, vocab_size)

    monkeypatch.setattr(pipeline, "BPE_TRAIN_CHARS", 1000)
    monkeypatch.setattr(pipeline, "train_bpe", learn)
    data = configure(f"{texts}/**/*.txt", max_tokens=max_tokens)
    size = prepared(data, TokenizerConfig(vocab_size=4096)).vocab_size
    assert sum(map(len, learned)) == most
    assert f"the text yields only {size} of 4096 tokens requested" in caplog.messages


def test_a_text_is_read_no_further_than_it_is_taken() -> None:
    parts = iter(["ab"] * 9)
    assert "".join(cut_out(parts, 1, 4)) == "bab"
    assert len([*parts]) == 7


def test_one_file_gives_its_tail(
    tmp_path: Path, configure: Configure, bpe: TokenizerConfig, decoded: Decode
) -> None:
    lines = [f"line {number} of one long file\n" for number in range(1000)]
    (tmp_path / "one.txt").write_text("".join(lines))
    corpus = prepared(configure(str(tmp_path / "one.txt")), bpe)
    train, held_out = decoded(corpus, "train"), decoded(corpus, "held_out")
    assert train.startswith("".join(lines[:900]))
    assert held_out.startswith("line ")
    assert "line 995 " in held_out  # the last tokens fill no row
    assert corpus.meta["held_out"]["bytes"] / sum(map(len, lines)) == pytest.approx(1 / 20, abs=0.002)
    assert not set(held_out.split("\n")[:-1]) & set(train.split("\n"))


@pytest.mark.parametrize(
    "text", ["abcdefghij" * 10, "a\n" + "b" * 999, "ab\ncd\n" * 50, "x" * 99 + "\n", "ä\n" * 40, "a", ""]
)
def test_a_tail_and_its_head_are_the_text(text: str) -> None:
    parts = [text[at : at + 7] for at in range(0, len(text), 7)]
    train, held_out = map("".join, split_document(Document("name", parts), 20, whole=False))
    assert (train, held_out) == tuple(map("".join, split_document(Document("name", [text]), 20, whole=False)))
    assert train + held_out == text
    assert len(held_out) <= max(2 * len(text) // 20, 1)
    assert len(held_out) >= len(text) // 20


def test_few_documents_or_one_sided_names_give_tails() -> None:
    names = [f"{number}.txt" for number in range(3000)]
    inside = [name for name in names if not sha1_rule(name, 20)]
    outside = [name for name in names if sha1_rule(name, 20)]
    for few in (names[:99], inside[:100], outside[:100]):
        assert not holds_out_documents([Document(name, ["text"]) for name in few], 20)
    hundred = [Document(name, ["text"]) for name in names[:100]]
    assert holds_out_documents(hundred, 20)
    assert not holds_out_documents(hundred, 20, chars=120)  # 100 documents are there, and 30 will be read
    assert holds_out_documents(hundred, 20, chars=400)
    document = Document("0.txt", ["a" * 100])
    assert [len("".join(parts)) for parts in split_document(document, 20, whole=False)] == [95, 5]
    for name in names[:100]:
        train, held_out = map("".join, split_document(Document(name, ["a" * 100]), 20, whole=True))
        assert (len(train), len(held_out)) == ((0, 100) if sha1_rule(name, 20) else (100, 0))
