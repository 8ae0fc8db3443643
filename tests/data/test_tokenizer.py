"""Tokens stand for the text exactly, however it is cut, whatever is written in it."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.corpora import Configure, Decode, prepared
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import models, pre_tokenizers, processors

from tpresearch.config import ConfigError
from tpresearch.config.schema import TokenizerConfig, TokenizerKind
from tpresearch.data.tokenizer import (
    MAX_CUT_PIECES,
    Tokenizer,
    cut_text,
    load_hf,
    special_ids,
    tokenizer_size,
    train_bpe,
    without_long_words,
)

HARD = (
    "x = 'naïve'\r\n\tif  y:\n\n\n    pass # 数据🙂!!\n"
    + "\x1c\x85\u2028 a\u00a0b\n"
    + "don't <|endoftext|> stop  \n"
)


def wordlevel(folder: Path, words: list[str], **config: object) -> Path:
    """A tokenizer.json of whole words, and a tokenizer_config.json if it says anything."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = HfTokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_text_comes_back_from_its_tokens() -> None:
    tokenizer = train_bpe([HARD * 20], 300)
    [ids] = tokenizer.encode([HARD])
    assert tokenizer.decode(ids) == HARD
    assert tokenizer.eos_id not in ids, "the marker written in a document is text, not its end"
    assert tokenizer.size == 300
    assert int(ids.max()) < 300


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_is_the_systems_own_error_which_names_the_cache_in_a_refusal(tmp_path: Path) -> None:
    tokenizer = train_bpe([HARD * 20], 300)
    with pytest.raises(OSError, match="No space left on device"):
        tokenizer.save(Path("/dev/full"))
    tokenizer.save(tmp_path / "ours.json")
    tokenizer.backend.save(str(tmp_path / "theirs.json"))
    assert (tmp_path / "ours.json").read_bytes() == (tmp_path / "theirs.json").read_bytes()


def test_packed_rows_are_the_documents_end_to_end(
    texts: Path, configure: Configure, bpe: TokenizerConfig, decoded: Decode
) -> None:
    corpus = prepared(configure(str(texts / "part0/*.txt")), bpe)  # 60 documents: each gives its tail
    whole = decoded(corpus, "train")
    documents = [file.read_text() for file in sorted((texts / "part0").glob("*.txt"))]
    starts = whole.split("<|endoftext|>")
    assert len(starts) == 60
    assert all(full.startswith(head) for full, head in zip(documents[:-1], starts, strict=False))
    assert (corpus.train == corpus.eos_id).sum() == 59 + (corpus.meta["train"]["tokens"] % 17 == 0)


def test_cutting_a_text_changes_none_of_its_tokens() -> None:
    text = HARD * 50
    tokenizer = train_bpe([text], 400)
    [whole] = tokenizer.encode([text])
    for piece_chars in (7, 64, 999):
        pieces = cut_text(text, piece_chars)
        assert len(pieces) > 3
        assert "".join(pieces) == text
        np.testing.assert_array_equal(np.concatenate(tokenizer.encode(pieces)), whole)


def test_training_twice_gives_the_same_tokenizer_in_every_process() -> None:
    code = (
        "from tpresearch.data.tokenizer import train_bpe\n"
        "print(train_bpe([f'{i} {i * i} word{i % 7}\\n' * 9 for i in range(500)], 600).hash)"
    )
    hashes = set()
    for threads in ("1", "2", "2"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads}
        ran = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        hashes.add(ran.stdout)
    assert len(hashes) == 1


def test_a_tokenizer_that_drops_merges_at_random_gives_a_text_the_same_tokens_each_time(
    tmp_path: Path,
) -> None:
    trained = train_bpe([HARD * 20], 300)
    dropping = json.loads(trained.backend.to_str())
    dropping["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(dropping))
    loaded = load_hf(str(tmp_path / "tokenizer.json"))
    for text in [HARD] * 5:
        np.testing.assert_array_equal(loaded.encode([text])[0], trained.encode([text])[0])


def test_the_end_of_text_is_the_one_the_tokenizer_names(tmp_path: Path) -> None:
    words = ["<unk>", "</s>", "<stop>", "a"]
    assert load_hf(str(wordlevel(tmp_path / "common", words))).eos_id == 1
    assert load_hf(str(wordlevel(tmp_path / "named", words, eos_token="<stop>"))).eos_id == 2
    assert load_hf(str(wordlevel(tmp_path / "object", words, eos_token={"content": "<stop>"}))).eos_id == 2
    assert load_hf(str(wordlevel(tmp_path / "file", words) / "tokenizer.json")).eos_id == 1
    hashes = [load_hf(str(tmp_path / name)).hash for name in ("common", "file", "named")]
    assert hashes[0] == hashes[1] != hashes[2], "another end of text makes other tokens of a corpus"


@pytest.mark.parametrize(
    ("file", "said", "eos_id"),
    [
        ("special_tokens_map.json", {"eos_token": {"content": "a"}}, 3),
        ("config.json", {"eos_token_id": 2}, 2),  # as GPT-2's, whose tokenizer_config.json names no token
        ("generation_config.json", {"eos_token_id": [2, 3]}, 2),
        ("config.json", {"eos_token_id": None}, None),
        ("config.json", {"eos_token_id": 4}, None),
    ],
)
def test_the_end_of_text_is_the_one_that_a_file_beside_the_tokenizer_names(
    texts: Path, configure: Configure, tmp_path: Path, file: str, said: dict[str, object], eos_id: int | None
) -> None:
    words = ["<unk>", "</s>", "<|endoftext|>", "a"]
    path = wordlevel(tmp_path / "own", words, model_max_length=1024)
    (path / file).write_text(json.dumps(said))
    if eos_id is None:
        with pytest.raises(ConfigError, match="nothing says which token ends a text"):
            load_hf(str(path))
        return
    foreign = TokenizerConfig(kind=TokenizerKind.hf, vocab_size=4, path=str(path))
    corpus = prepared(configure(str(texts / "part0/*.txt")), foreign)
    corpus.save_tokenizer(foreign, tmp_path)
    assert corpus.eos_id == eos_id
    assert load_hf(str(tmp_path / "tokenizer")).hash == corpus.tokenizer_hash
    kept = json.loads((tmp_path / "tokenizer/tokenizer_config.json").read_text())
    assert kept["model_max_length"] == 1024


def test_the_end_of_text_need_not_be_ascii_in_any_locale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eos = "<｜end▁of▁sentence｜>"
    path = wordlevel(tmp_path, ["<unk>", "</s>", eos])
    said = json.dumps({"eos_token": eos}, ensure_ascii=False)
    (path / "tokenizer_config.json").write_text(said, encoding="utf-8")
    monkeypatch.setattr(io, "text_encoding", lambda encoding, level=2: encoding or "ascii")
    assert load_hf(str(path)).eos_id == 2


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["<unk>", "a"], "it has no end-of-text token"),
        (["<unk>", "</s>", "<|endoftext|>"], "nothing says which token ends a text: </s> <|endoftext|>"),
        (["</s>", "a"], r"cannot encode .* Missing \[UNK\] token"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused(tmp_path: Path, words: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why) as refusal:
        load_hf(str(wordlevel(tmp_path, words)))
    assert (refusal.value.field, refusal.value.fix["tokenizer"]) == ("tokenizer.path", "bpe")


def test_lost_characters_are_those_without_a_token_or_with_the_unknown_one(tmp_path: Path) -> None:
    words = load_hf(str(wordlevel(tmp_path, ["<unk>", "</s>", "ab", "c"])))
    assert words.lost_chars("ab  xyz c\nab") == 3
    no_fallback = HfTokenizer(models.BPE({"</s>": 0, "a": 1, "b": 2}, []))  # leaves out what it does not know
    assert Tokenizer(no_fallback, 0).lost_chars("axyb xyz a") == 5
    pieces = HfTokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    assert Tokenizer(pieces, 0).lost_chars("axya") == 2
    assert train_bpe([HARD], 300).lost_chars(HARD) == 0


@pytest.mark.parametrize("max_tokens", [None, 50])
def test_a_tokenizer_that_loses_text_is_warned_about_with_how_much(
    tmp_path: Path, configure: Configure, caplog: pytest.LogCaptureFixture, max_tokens: int | None
) -> None:
    path = str(wordlevel(tmp_path, ["<unk>", "</s>", "known"]))
    (tmp_path / "text.txt").write_text("known strange " * 200)
    settings = TokenizerConfig(TokenizerKind.hf, vocab_size=3, path=path)
    prepared(configure(str(tmp_path / "text.txt"), max_tokens=max_tokens), settings)
    of = "1,400 of the first 2,800 characters (50 %)"
    if max_tokens:  # about 200 characters will be read
        of = "102 of the first 200 characters (51 %)"
    assert f"loses text that it has no tokens for: {of}" in caplog.text
    caplog.clear()
    (tmp_path / "text.txt").write_text("known known " * 200)
    prepared(configure(str(tmp_path / "text.txt")), settings)
    assert "loses" not in caplog.text


def test_a_document_that_a_tokenizer_ends_within_is_told(
    tmp_path: Path, configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    """A model of words, or a unigram model, has the end of text among its words."""
    words = wordlevel(tmp_path / "words", ["<unk>", "</s>", "a"])
    settings = TokenizerConfig(TokenizerKind.hf, 3, str(words))
    for text, warned in (("a a " * 99, False), ("a </s> a " * 7 + "a " * 99, True)):
        (tmp_path / "text.txt").write_text(text)
        prepared(configure(str(tmp_path / "text.txt")), settings)
        said = "this tokenizer takes the text </s> for the end of a document: 7 times here"
        assert (said in caplog.text) == warned


def test_truncation_padding_and_added_tokens_of_a_file_do_not_touch_documents(tmp_path: Path) -> None:
    folder = wordlevel(tmp_path / "bert", ["<unk>", "</s>", "[CLS]", "a", "b"])
    tokenizer = HfTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A </s>", special_tokens=[("[CLS]", 2), ("</s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    [ids] = load_hf(str(folder)).encode(["a b a b a b a b a b a b"])
    assert ids.tolist() == [3, 4] * 6


def test_the_size_counts_added_tokens_and_gaps(tmp_path: Path) -> None:
    folder = wordlevel(tmp_path / "words", ["<unk>", "</s>", "a"])
    assert tokenizer_size(str(folder)) == 3
    tokenizer = HfTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<pad>", "<extra>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert tokenizer_size(str(folder)) == 5
    gaps = HfTokenizer(models.WordLevel({"<unk>": 0, "</s>": 9}, unk_token="<unk>"))
    gaps.save(str(tmp_path / "gaps.json"))
    assert tokenizer_size(str(tmp_path / "gaps.json")) == 10


def test_older_formats_are_converted(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    own = train_bpe([HARD * 20], 300)
    loaded = transformers.GPT2TokenizerFast(tokenizer_object=own.backend, eos_token="<|endoftext|>")
    loaded.save_pretrained(tmp_path / "gpt2")
    saved = json.loads((tmp_path / "gpt2/tokenizer.json").read_text())["model"]
    (tmp_path / "gpt2/vocab.json").write_text(json.dumps(saved["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in saved["merges"])
    (tmp_path / "gpt2/merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (tmp_path / "gpt2/tokenizer.json").unlink()
    converted = load_hf(str(tmp_path / "gpt2"))
    assert converted.size == 300
    assert converted.encode([HARD])[0].tolist() == own.encode([HARD])[0].tolist()
    (tmp_path / "gpt2/tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match=r"cannot convert.* installed to .*with a tokenizer_class"):
        load_hf(str(tmp_path / "gpt2"))


def test_code_that_comes_with_a_tokenizer_is_never_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "own.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="transformers cannot convert"):
        load_hf(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_run_keeps_its_tokenizer_as_transformers_reads_it(
    texts: Path, configure: Configure, bpe: TokenizerConfig, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="the reader comes with the hf extra")
    corpus = prepared(configure(str(texts / "part0/*.txt")), bpe)
    corpus.save_tokenizer(bpe, tmp_path)
    text = HARD.replace("<|endoftext|>", "")  # written in a text, theirs is the token and ours is text
    kept = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    [ids] = load_hf(str(corpus.folder)).encode([text])
    assert kept(text)["input_ids"] == ids.tolist()
    assert kept.decode(ids.tolist()) == text
    assert (kept.eos_token_id, kept.bos_token_id) == (corpus.eos_id, None)
    assert special_ids(tmp_path / "tokenizer") == (None, corpus.eos_id)


def test_of_a_foreign_tokenizer_a_run_keeps_every_file(
    texts: Path, configure: Configure, tmp_path: Path
) -> None:
    words = ["<unk>", "Document", "<s>", "<end>"]
    path = wordlevel(tmp_path / "foreign", words, bos_token={"content": "<s>"}, eos_token="<end>", more=1)
    (path / "chat_template.jinja").write_text("{{ messages }}")
    foreign = TokenizerConfig(kind=TokenizerKind.hf, vocab_size=4, path=str(path))
    corpus = prepared(configure(str(texts / "part0/*.txt")), foreign)
    corpus.save_tokenizer(foreign, tmp_path)
    kept = tmp_path / "tokenizer"
    corpus.save_tokenizer(dataclasses.replace(foreign, path=str(kept)), tmp_path)  # which it has already
    one, other = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in (kept, path))
    assert one == other
    assert special_ids(kept) == (2, 3)


def test_a_run_keeps_the_tokenizer_file_that_is_named_and_not_one_beside_it(
    texts: Path, configure: Configure, tmp_path: Path
) -> None:
    train_bpe([HARD], 270).save(tmp_path / "tokenizer.json")
    train_bpe([HARD[::-1]], 280).save(tmp_path / "tokenizer-2.json")
    named = TokenizerConfig(kind=TokenizerKind.hf, vocab_size=280, path=str(tmp_path / "tokenizer-2.json"))
    corpus = prepared(configure(str(texts / "part0/*.txt")), named)
    (tmp_path / "run").mkdir()
    corpus.save_tokenizer(named, tmp_path / "run")
    assert load_hf(str(tmp_path / "run/tokenizer")).hash == corpus.tokenizer_hash


def test_no_word_to_learn_from_is_long_whatever_it_is_of() -> None:
    text = "a word" + " " * 5000 + "x" * 5000 + "\n" * 999 + "end"
    words = list(without_long_words(text))
    assert "".join(words) == text
    assert max(len(run) for word in words for run in re.split(r"(\s+)", word)) <= 1000


def test_a_word_of_a_megabyte_costs_what_as_much_text_does() -> None:
    """Learning from it whole would take hours, and encoding it whole gigabytes."""
    rng = random.Random(0)
    blob = "".join(rng.choices("abcdefghijklmnop", k=1 << 20))
    tokenizer = train_bpe(["some words of a text"] * 9 + [blob], 300)
    pieces = cut_text(blob, 1 << 16)
    assert max(map(len, pieces)) == (1 + MAX_CUT_PIECES) << 16
    assert tokenizer.decode(np.concatenate(tokenizer.encode(pieces))) == blob
