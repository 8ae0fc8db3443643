"""The hub, as far as it can be had without a network: refused at once, or served from what was downloaded."""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from support.corpora import Configure, Decode, prepared

from tpresearch.config import ConfigError
from tpresearch.config.schema import DataConfig, DataSource, TokenizerConfig
from tpresearch.data import hub as hub_room
from tpresearch.data.check import check_data
from tpresearch.data.hub import check_hub, open_hub
from tpresearch.data.tokenizer import tokenizer_size, train_bpe

datasets = pytest.importorskip("datasets")
import huggingface_hub.constants  # noqa: E402

TEXTS = [f"story {index}: " + f"once{index} " * 30 for index in range(150)]


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture(autouse=True)
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A hub at a port where nobody listens, and caches of the test's own (the folder returned)."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        for proxy in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(proxy, raising=False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
        hub_room.offline_unless_reachable.cache_clear()
        yield tmp_path
        hub_room.offline_unless_reachable.cache_clear()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_that_cannot_be_reached_is_not_asked_again(configure: Configure, streaming: bool) -> None:
    data = configure("owner/stories", DataSource.hf, streaming=streaming, max_tokens=1000)
    for use in (check_data, prepared):
        with pytest.raises(ConfigError, match="cannot be reached") as refusal:
            use(data, TokenizerConfig())
        assert refusal.value.field == "data.path"
    assert huggingface_hub.constants.HF_HUB_OFFLINE, "its library would try each file for 25 s"


def test_a_hub_that_can_be_reached_is_asked_and_what_it_says_is_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_room, "is_reachable", lambda _: True)
    monkeypatch.setattr(hub_room, "_snapshot", Mock(side_effect=OSError("404: no owner/tokeniser")))
    with pytest.raises(ConfigError, match=r"^tokenizer\.path=owner/tokeniser: 404: no owner/tokeniser"):
        tokenizer_size("owner/tokeniser")
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_tokenizer_on_a_hub_that_cannot_be_reached_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^tokenizer\.path=owner/tokenizer: .* cannot be reached"):
        tokenizer_size("owner/tokenizer")
    assert huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_downloaded_tokenizer_needs_no_network(unreachable: Path) -> None:
    snapshot = unreachable / "hub/models--owner--tokenizer/snapshots/0123abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0123abc")
    train_bpe(TEXTS, 300).save(snapshot / "tokenizer.json")
    assert tokenizer_size("owner/tokenizer") == 300


@pytest.fixture
def downloaded(unreachable: Path) -> Path:
    """The cache folder of `owner/stories` at one commit, as a download by `datasets` would have left it."""
    folder = unreachable / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(lines(*TEXTS))
    datasets.load_dataset(str(folder), split="train", cache_dir=str(unreachable / "made"))
    [info] = (unreachable / "made").rglob("dataset_info.json")
    content = json.loads(info.read_text())
    commit = unreachable / "datasets/owner___stories/default/0.0.0/0123abc"
    shutil.copytree(info.parent, commit)
    for arrow in commit.glob("*.arrow"):
        arrow.rename(commit / "stories-train.arrow")
    content |= {"config_name": "default", "dataset_name": "stories"}
    (commit / "dataset_info.json").write_text(json.dumps(content))
    return commit


def test_a_downloaded_data_set_needs_no_network(
    downloaded: Path, configure: Configure, bpe: TokenizerConfig, decoded: Decode
) -> None:
    data = configure("owner/stories", DataSource.hf)
    check_data(data, bpe)
    first = prepared(data, bpe)
    assert sum(first.meta[part]["documents"] for part in ("train", "held_out")) == len(TEXTS)
    assert "once7 once7 once7" in decoded(first, "train") + decoded(first, "held_out")
    for other in (dataclasses.replace(data, text_field="body"), dataclasses.replace(data, split="other")):
        assert open_hub(other).content_hash != first.corpus_hash
    with pytest.raises(ConfigError, match="no such field") as refusal:
        check_data(configure("owner/stories", DataSource.hf, text_field="body"), bpe)
    assert refusal.value.fix == {"data.text_field": "text"}
    # another commit is another corpus
    shutil.move(downloaded, downloaded.with_name("4567def"))
    second = prepared(data, bpe)
    assert second.corpus_hash != first.corpus_hash
    assert (second.train == first.train).all()


def test_folders_that_datasets_saved_are_read(
    tmp_path: Path, configure: Configure, bpe: TokenizerConfig
) -> None:
    saved = datasets.Dataset.from_dict({"text": TEXTS})
    saved.save_to_disk(str(tmp_path / "one"))
    many = datasets.DatasetDict({"train": saved, "other": saved.select(range(5))})
    many.save_to_disk(str(tmp_path / "many"))
    one = prepared(configure(str(tmp_path / "one"), DataSource.hf), bpe)
    many = prepared(configure(str(tmp_path / "many"), DataSource.hf), bpe)
    assert one.meta["train"]["documents"] + one.meta["held_out"]["documents"] == len(TEXTS)
    assert (one.train == many.train).all()
    for folder, splits in (("one", "train"), ("many", "train, other")):
        data = dataclasses.replace(configure(str(tmp_path / folder), DataSource.hf), split="validation")
        with pytest.raises(ConfigError, match=rf"^data.split=validation: not a split .*; one of {splits}$"):
            check_hub(data)


def test_a_changed_local_folder_is_read_anew(
    tmp_path: Path, configure: Configure, bpe: TokenizerConfig, decoded: Decode
) -> None:
    """The datasets library's own cache would go by the time of change, which is the same here."""
    file = tmp_path / "folder/train.jsonl"
    file.parent.mkdir()
    data: DataConfig = configure(str(file.parent), DataSource.hf)
    for word in ("before", "after_"):
        file.write_bytes(lines(*(f"{word} {text}" for text in TEXTS)))
        os.utime(file, (1e9, 1e9))
        text = decoded(prepared(data, bpe), "train")
        assert text.startswith(f"{word} story 0")


def test_a_folder_of_links_to_folders_is_what_these_hold(
    tmp_path: Path, configure: Configure, bpe: TokenizerConfig, decoded: Decode
) -> None:
    for word in ("first", "other"):
        saved = datasets.Dataset.from_dict({"text": [f"{word} {text}" for text in TEXTS]})
        datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / f"disk/{word}"))
        (tmp_path / word).mkdir()
        for inside in ("dataset_dict.json", "train"):
            (tmp_path / word / inside).symlink_to(tmp_path / f"disk/{word}/{inside}")
        corpus = prepared(configure(str(tmp_path / word), DataSource.hf), bpe)
        assert decoded(corpus, "train").startswith(f"{word} story 0")


def test_files_that_the_library_puts_in_no_split_are_told(
    tmp_path: Path, configure: Configure, bpe: TokenizerConfig, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "trains"
    folder.mkdir()
    for name in ("train-1.jsonl", "2.jsonl", "test.jsonl", "3.jsonl"):
        (folder / name).write_bytes(lines(*(f"{name} {text}" for text in TEXTS)))
    data = configure(str(folder), DataSource.hf)
    meta = prepared(data, bpe).meta
    assert meta["train"]["documents"] + meta["held_out"]["documents"] == len(TEXTS), (
        "those of one file of four"
    )
    said = f"2 files of {folder} are in no split, such as 2.jsonl: "
    assert [text for text in caplog.messages if text.startswith(said) and "data=jsonl" in text]
    caplog.clear()
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: 2.jsonl\n---\n")
    prepared(data, bpe)  # the files that the card lists
    assert not [text for text in caplog.messages if "in no split" in text]


@pytest.mark.parametrize("name", ["crawl [2024]", "a*", "what?", "a::b"])
def test_a_folder_that_the_library_takes_for_a_pattern_is_refused(
    tmp_path: Path, configure: Configure, name: str
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "x.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(ConfigError, match=r"^data\.path=.* would take .* for a pattern; a folder without "):
        check_data(configure(str(tmp_path / name), DataSource.hf), TokenizerConfig())


def test_checking_a_local_folder_reads_one_record_of_it(
    tmp_path: Path, configure: Configure, bpe: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder/.git").mkdir(parents=True)
    (tmp_path / "folder/train.jsonl").write_bytes(lines(*TEXTS))
    data: DataConfig = configure(str(tmp_path / "folder"), DataSource.hf)
    with monkeypatch.context() as patched:
        patched.setattr(hub_room, "hash_files", lambda *_: pytest.fail("hashed the whole folder"))
        check_data(data, bpe)
    before = prepared(data, bpe)
    (tmp_path / "folder/.git/index").write_text("not part of the data")
    assert prepared(data, bpe).folder == before.folder
    for key in ("text_field", "split", "name"):
        other = dataclasses.replace(data)
        setattr(other, key, "another")
        assert open_hub(other).content_hash != before.corpus_hash


def test_files_of_different_columns_are_refused_with_both_lists(
    tmp_path: Path, configure: Configure, bpe: TokenizerConfig, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "folder").mkdir()
    for name, column in (("a", "id"), ("b", "body")):
        table = datasets.Dataset.from_dict({"text": TEXTS, column: range(len(TEXTS))})
        table.to_parquet(str(tmp_path / f"folder/{name}.parquet"))
    logging.getLogger("datasets").addHandler(caplog.handler)
    with pytest.raises(ConfigError) as refusal:
        prepared(configure(str(tmp_path / "folder"), DataSource.hf), bpe)
    assert refusal.value.why.endswith("differ in columns: some have body, text, the first has id, text")
    logging.getLogger("datasets").removeHandler(caplog.handler)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("datasets")]
    assert not said, "the library tells the same in its own words"


WRONG = {
    "a line that is no JSON": ("b.jsonl", b'{"text": "half\n', "b.jsonl, line 1: not JSON"),
    "cut short": ("b.jsonl.gz", gzip.compress(lines(*TEXTS))[:-20], "b.jsonl.gz, line "),
    "half a character": ("b.jsonl", b'{"text": "half \\ud83d"}', "b.jsonl, line 1: not Unicode text"),
    "of no encoding": ("b.jsonl", b'{"text": "caf\xe9"}', "b.jsonl, line 1: not UTF-8 text: byte 13 is 0xe9"),
    "no Parquet": ("b.parquet", b"PAR1", "b.parquet: not Parquet"),
    "a row too long": ("a.csv", b"text,id\na,1\na,1,2\n", "a.csv: Error tokenizing data"),
    "empty": ("a.jsonl", b"", "a.jsonl: has no text in it"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_the_library_cannot_read_is_named_by_file_and_record(
    tmp_path: Path, configure: Configure, bpe: TokenizerConfig, what: str
) -> None:
    name, content, sentence = WRONG[what]
    (tmp_path / "folder").mkdir()
    if name.startswith("b"):
        good = tmp_path / f"folder/a{'.parquet' if 'parquet' in name else '.jsonl'}"
        data_set = datasets.Dataset.from_dict({"text": TEXTS})
        data_set.to_parquet(str(good)) if "parquet" in name else good.write_bytes(lines(*TEXTS))
    (tmp_path / "folder" / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"^data.path=.*/folder/{re.escape(sentence)}"):
        prepared(configure(str(tmp_path / "folder"), DataSource.hf), bpe)
