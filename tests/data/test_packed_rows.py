"""Rows on disk: exact, half the size where they can be, seen without a copy."""

from __future__ import annotations

import dataclasses
import logging
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray
from support.composed import corpus
from support.corpora import Configure, prepared
from tokenizers import Tokenizer, models, pre_tokenizers

from tpresearch.config import ConfigError
from tpresearch.config.schema import TokenizerConfig, TokenizerKind
from tpresearch.data import documents, streams
from tpresearch.data import tokenizer as data_tokenizer
from tpresearch.data.rows import PackedCorpus, check_enough_rows, described
from tpresearch.data.streams import read_rows, token_dtype, unigram_entropy, write_streams


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_rows_come_back_as_they_were_and_the_rest_is_dropped(tmp_path: Path, dtype: type) -> None:
    tokens = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, 5003 * 7 + 3).astype(dtype)
    tokens.tofile(tmp_path / "train.bin")
    rows = read_rows(tmp_path / "train.bin", tokens.dtype.name, 7)
    assert rows.dtype == dtype
    assert rows.shape == (5003, 7)
    np.testing.assert_array_equal(rows.ravel(), tokens[: 5003 * 7])
    assert not rows.flags.owndata
    assert not rows.flags.writeable


def test_no_rows_are_rows_too(tmp_path: Path) -> None:
    for tokens in ([], range(6)):
        np.array(tokens, np.uint16).tofile(tmp_path / "train.bin")
        assert read_rows(tmp_path / "train.bin", "uint16", 7).shape == (0, 7)


def test_no_held_out_tokens_have_no_entropy(tmp_path: Path) -> None:
    """As where a document reached the most tokens before the first that is held out."""
    for split, tokens in (("train", range(8)), ("held_out", ())):
        np.array(tokens, np.uint16).tofile(tmp_path / f"{split}.bin")
    facts = {"corpus_hash": "c", "tokenizer_hash": "t", "vocab_size": 9, "eos_id": 0, "dtype": "uint16"}
    found = PackedCorpus.open(tmp_path, facts | {"unigram_entropy_nats": {"held_out": None}}, seq_len=3)
    assert (found.train.shape, found.held_out.shape) == ((2, 4), (0, 4))
    assert str(found) == "2 train and 0 held-out rows of 3 tokens"
    assert described(found, 2) == str(found)
    assert described(found, 5) == f"{found}, the former read 2.5 times"
    assert np.isnan(found.unigram_entropy)


def test_two_bytes_reach_as_far_as_they_can() -> None:
    assert [token_dtype(size).name for size in (257, 65_536, 65_537)] == ["uint16", "uint16", "uint32"]


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path: Path, configure: Configure) -> None:
    vocabulary = {f"t{number}": number for number in range(70_000)} | {"</s>": 70_000}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "large.json"))
    (tmp_path / "text.txt").write_text(" ".join(f"t{number}" for number in range(69_000, 70_000)))
    settings = TokenizerConfig(TokenizerKind.hf, vocab_size=70_001, path=str(tmp_path / "large.json"))
    packed = prepared(configure(str(tmp_path / "text.txt")), settings)
    assert packed.vocab_size == 70_001
    assert packed.train.dtype == np.uint32
    np.testing.assert_array_equal(packed.train.ravel()[:900], np.arange(69_000, 69_900))


def test_a_long_document_is_encoded_a_part_at_a_time(
    tmp_path: Path, configure: Configure, bpe: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token takes about a hundred bytes until it is written."""
    (tmp_path / "long.txt").write_text("".join(f"line {number} of one long file\n" for number in range(999)))
    at_once, encode = list[int](), data_tokenizer.Tokenizer.encode

    def counted(self: data_tokenizer.Tokenizer, texts: list[str]) -> list[NDArray[np.uint32]]:
        at_once.append(sum(map(len, texts)))
        return encode(self, texts)

    monkeypatch.setattr(data_tokenizer.Tokenizer, "encode", counted)
    monkeypatch.setattr(streams, "ENCODE_CHARS", 5000)
    whole = prepared(configure(str(tmp_path / "long.txt")), bpe)
    monkeypatch.setattr(data_tokenizer, "PIECE_CHARS", 100)
    parts = prepared(configure(str(tmp_path / "long.txt"), cache_dir=str(tmp_path / "again")), bpe)
    assert max(at_once) > 20_000  # of one piece
    assert max(at_once[2:]) < 5200
    assert parts.meta == whole.meta
    assert (parts.train == whole.train).all()


def test_a_text_file_read_in_parts_is_the_same_corpus(
    tmp_path: Path, texts: Path, configure: Configure, bpe: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut within words, line ends and letters of several bytes."""
    text = "".join(file.read_text() for file in sorted((texts / "part0").iterdir()))
    (tmp_path / "long.txt").write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    (tmp_path / "short.txt").write_text("short")
    for max_tokens in (None, 2000):
        found = []
        for part_bytes in (1 << 20, 97, 4):
            monkeypatch.setattr(documents, "PART_BYTES", part_bytes)
            monkeypatch.setattr(data_tokenizer, "PIECE_CHARS", 1000)
            cache = str(tmp_path / f"{part_bytes}")
            found.append(
                prepared(configure(f"{tmp_path}/*.txt", cache_dir=cache, max_tokens=max_tokens), bpe)
            )
        assert found[0].meta == found[1].meta == found[2].meta
        assert found[0].train.tobytes() == found[1].train.tobytes() == found[2].train.tobytes()


def test_tokens_are_counted_without_a_pass_over_the_vocabulary(tmp_path: Path) -> None:
    """Which for short documents would take longer than their tokens."""
    size, peaks = 1 << 20, list[int]()
    words = SimpleNamespace(
        size=size, eos_id=0, piece_chars=99, encode=lambda texts: [np.array([1, 2, 2]) for _ in texts]
    )

    def note(_: int) -> None:
        peaks.append(tracemalloc.get_traced_memory()[1])

    tracemalloc.start()
    meta = write_streams(tmp_path, [(["a text"], [])] * 3, cast(data_tokenizer.Tokenizer, words), None, note)
    tracemalloc.stop()
    assert max(peaks) < 2.1 * 8 * size  # of both splits' counts
    assert meta["unigram_entropy_nats"]["train"] == pytest.approx(1.5 * np.log(2))


def test_the_document_that_reaches_the_most_tokens_is_whole(tmp_path: Path) -> None:
    """Of three of nine pieces, each of two tokens."""
    words = SimpleNamespace(
        size=9, eos_id=0, piece_chars=6, encode=lambda texts: [np.array([1, 2]) for _ in texts]
    )
    tokenizer, text = cast(data_tokenizer.Tokenizer, words), "a text" + " a text" * 8
    for most, whole in ((1, 1), (19, 1), (20, 2), (None, 3)):
        found = write_streams(tmp_path, [([text], [])] * 3, tokenizer, most, lambda _: None)["train"]
        assert (found["documents"], found["tokens"]) == (whole, whole * (9 * 2 + 1))


def test_unigram_entropy_is_that_of_the_formula() -> None:
    entropy = unigram_entropy(np.array([1, 1, 2, 0]), np.array([0, 0, 1, 3]))
    assert entropy["train"] == pytest.approx(1.5 * np.log(2))
    assert entropy["held_out"] == pytest.approx(-(np.log(3 / 8) + 3 * np.log(1 / 8)) / 4)
    assert unigram_entropy(np.array([1, 1]), np.array([0, 0]))["held_out"] is None


def test_a_corpus_shorter_than_a_global_batch_is_refused(
    texts: Path, configure: Configure, bpe: TokenizerConfig, caplog: pytest.LogCaptureFixture
) -> None:
    packed = prepared(configure(f"{texts}/**/*.txt"), bpe)
    rows = len(packed.train)
    check_enough_rows(packed, rows)
    with pytest.raises(ConfigError, match=f"has {rows} rows of 17 tokens") as few:
        check_enough_rows(packed, rows + 1)
    assert (few.value.field, few.value.fix) == ("train.global_batch_size", {"train.global_batch_size": rows})
    with caplog.at_level(logging.WARNING):
        none = prepared(configure(f"{texts}/**/*.txt", seq_len=10**6), bpe)
    assert "nothing to evaluate on" in caplog.text
    with pytest.raises(ConfigError, match="fewer than one row of 1000001") as short:
        check_enough_rows(none, 24)
    fix = short.value.fix["data.seq_len"]
    assert isinstance(fix, int)
    assert short.value.field == "data.seq_len"
    check_enough_rows(prepared(configure(f"{texts}/**/*.txt", seq_len=fix), bpe), 24)


@pytest.mark.parametrize(
    ("rows", "tokens", "sentence", "fix"),
    [
        (0, 47, "data.seq_len=16: the train split has 47 tokens, fewer than one row of 17; ", {}),
        (0, 48, "data.seq_len=16: .* more text", {"data.seq_len": 1}),
        (7, 200, "train.global_batch_size=24: .*; at most 4, a shorter", {"train.global_batch_size": 4}),
        (3, 200, "train.global_batch_size=24: .*; more text", {}),
    ],
)
def test_what_is_proposed_for_few_rows_is_legal(
    rows: int, tokens: int, sentence: str, fix: dict[str, int]
) -> None:
    """On 4 data-parallel ranks, each of which reads at least a row, of a token and its target."""
    few = dataclasses.replace(corpus(rows), meta={"train": {"tokens": tokens}})
    with pytest.raises(ConfigError, match=sentence) as refused:
        check_enough_rows(few, 24, multiple_of=4)
    assert refused.value.fix == fix
