"""Every refusal names its field, says what is wrong in one line, and costs next to nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tpresearch.config import ConfigError
from tpresearch.config.schema import DataConfig, DataSource, TokenizerConfig, TokenizerKind
from tpresearch.data.check import check_data
from tpresearch.data.sources import expand_paths
from tpresearch.data.tokenizer import train_bpe


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with one good and several bad files of each kind."""
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "empty.txt").write_text("")
    for packed in ("packed.jsonl.zst", "packed.txt.gz"):
        (tmp_path / packed).write_bytes(b"(\xb5/\xfd")
    (tmp_path / "good.jsonl").write_text('{"text": "one"}\n')
    pq.write_table(pa.table({"texts": ["one"]}), tmp_path / "texts.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "numbers.parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "folder/train.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank/train.jsonl").write_text('{"text": ""}\n')
    train_bpe(["text"], 260).save(tmp_path / "tokenizer.json")
    (tmp_path / "broken.json").write_text("{}")
    return tmp_path


REFUSED_DATA = [
    ("text", "absent.txt", {}, "data.path", "there is no such file"),
    ("text", "*.csv", {}, "data.path", "matches no file"),
    ("text", ["good.txt", "absent.txt"], {}, "data.path", "there is no such file"),
    ("text", "folder", {}, "data.path", "is a folder"),
    ("text", "empty.txt", {}, "data.path", "is empty"),
    ("text", "packed.txt.gz", {}, "data.path", "compressed as .gz"),
    ("jsonl", "packed.jsonl.zst", {}, "data.path", "compressed as .zst"),
    ("text", None, {}, "data.path", "no file is named"),
    ("text", [], {}, "data.path", "no file is named"),
    ("text", ["good.txt", ""], {}, "data.path", "no file is named"),
    ("jsonl", "good.txt", {}, "data.path", "not JSON"),
    ("parquet", "good.jsonl", {}, "data.path", "not Parquet"),
    ("parquet", "texts.parquet", {}, "data.text_field", "no such field"),
    ("parquet", "numbers.parquet", {}, "data.text_field", "holds int64, not text"),
    ("pystdlib", "good.jsonl", {}, "data.path", "data=pystdlib reads no path"),
    ("random_tokens", "good.txt", {}, "data.path", "data=random_tokens reads no path"),
    ("hf", "folder", {"streaming": True}, "data.streaming", "without data.max_tokens has no end"),
    ("hf", "folder", {"text_field": "body"}, "data.text_field", "no such field"),
    ("hf", "folder", {"split": "validation"}, "data.split", "Bad split: validation"),
    ("hf", "folder", {"name": "german"}, "data.name", "german"),
    ("hf", "bare", {}, "data.path", "doesn't contain any"),
    ("hf", "blank", {}, "data.path", "has no text in it"),
    ("hf", "good.jsonl", {}, "data.path", "is a file"),
    ("hf", "./absent", {}, "data.path", "there is no such folder"),
    ("hf", None, {}, "data.path", "no dataset is named"),
    ("hf", "", {}, "data.path", "no dataset is named"),
    ("hf", ["folder"], {}, "data.path", "no dataset is named"),
    ("jsonl", "good.jsonl", {"streaming": True}, "data.streaming", "not read over the network"),
    ("text", "good.txt", {"held_out_every": 1}, "data.held_out_every", "too small"),
    ("text", "good.txt", {"seq_len": 0}, "data.seq_len", "too small"),
    ("text", "good.txt", {"max_tokens": 0}, "data.max_tokens", "too small"),
    ("text", "good.txt", {"cache_dir": "good.txt"}, "data.cache_dir", "is a file"),
    ("text", "good.txt", {"cache_dir": "good.txt/below"}, "data.cache_dir", "good.txt is a file"),
]


@pytest.mark.parametrize(("source", "path", "settings", "field", "why"), REFUSED_DATA)
def test_data_is_refused(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    path: object,
    settings: dict[str, Any],
    field: str,
    why: str,
) -> None:
    monkeypatch.chdir(here)
    settings = {"cache_dir": str(here / "cache"), **settings}
    data = DataConfig(DataSource(source), path, **settings)
    with pytest.raises(ConfigError) as refusal:
        check_data(data, TokenizerConfig())
    assert refusal.value.field == field
    assert why in refusal.value.why
    assert refusal.value.legal
    if why in ("there is no such file", "matches no file", "no dataset is named"):
        assert refusal.value.fix == {"data.path": "VALUE"}, "and no run on another corpus"
    assert not (here / "cache").exists()


def test_the_files_of_a_folder_are_proposed_whatever_its_name(tmp_path: Path) -> None:
    file = tmp_path / "crawl [2024]" / "more" / "a.txt"
    file.parent.mkdir(parents=True)
    file.write_text("text")
    with pytest.raises(ConfigError, match="is a folder") as refusal:
        expand_paths(f"{tmp_path}/crawl [2024]/")
    assert expand_paths(str(refusal.value.fix["data.path"]).strip("'")) == [file]


def test_a_file_is_meant_whatever_its_name(tmp_path: Path) -> None:
    for name in ("a[1].txt", "a1.txt"):
        (tmp_path / name).write_text("text")
    assert expand_paths(f"{tmp_path}/a[1].txt") == [tmp_path / "a[1].txt"]
    assert expand_paths(f"{tmp_path}/a[2-9,1].txt") == [tmp_path / "a1.txt"]


@pytest.mark.parametrize(
    ("path", "kind"),
    [("a.jsonl.gz", "jsonl"), (["a.parquet", "b.parquet"], "parquet"), ("a.md", "text"), ([], "text")],
)
def test_the_kind_of_a_path_that_is_not_read_is_proposed_by_its_name(path: object, kind: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_data(DataConfig(path=path), TokenizerConfig())
    assert refusal.value.fix == {"data": kind}


REFUSED_TOKENIZERS = [
    ({"vocab_size": 256}, "tokenizer.vocab_size", "256 bytes and the end of text"),
    ({"path": "tokenizer.json"}, "tokenizer.path", "tokenizer=bpe reads no path"),
    ({"kind": "hf"}, "tokenizer.path", "no tokenizer is named"),
    ({"kind": "hf", "path": "./absent.json"}, "tokenizer.path", "there is no such file"),
    ({"kind": "hf", "path": "absent/tokenizer.json"}, "tokenizer.path", "there is no such file"),
    ({"kind": "hf", "path": "broken.json"}, "tokenizer.path", "no tokenizer could be loaded"),
    ({"kind": "hf", "path": "bare"}, "tokenizer.path", "holds no tokenizer.json"),
    ({"kind": "hf", "path": "tokenizer.json", "vocab_size": 259}, "tokenizer.vocab_size", "has 260 entries"),
]


@pytest.mark.parametrize(("settings", "field", "why"), REFUSED_TOKENIZERS)
def test_tokenizers_are_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], field: str, why: str
) -> None:
    monkeypatch.chdir(here)
    settings["kind"] = TokenizerKind(settings.get("kind", "bpe"))
    with pytest.raises(ConfigError) as refusal:
        check_data(DataConfig(DataSource.text, "good.txt", cache_dir=str(here)), TokenizerConfig(**settings))
    assert refusal.value.field == field
    assert why in refusal.value.why


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("text", "good.txt"),
        ("text", ["good.txt", "*.jsonl"]),
        ("jsonl", "good.jsonl"),
        ("parquet", "texts.parquet"),
        ("hf", "folder"),
        ("pystdlib", None),
    ],
)
def test_good_data_passes(here: Path, monkeypatch: pytest.MonkeyPatch, source: str, path: object) -> None:
    monkeypatch.chdir(here)
    field = "texts" if source == "parquet" else "text"
    data = DataConfig(DataSource(source), path, text_field=field, cache_dir=str(here / "not/yet/there"))
    check_data(data, TokenizerConfig(vocab_size=257))
    check_data(data, TokenizerConfig(TokenizerKind.hf, vocab_size=260, path="tokenizer.json"))
    check_data(data, TokenizerConfig(TokenizerKind.hf, vocab_size=512, path="tokenizer.json"))  # padded
    assert not (here / "not").exists()


@pytest.mark.parametrize("denied", ["is not readable", "cannot be read: Input/output error"])
def test_a_file_that_cannot_be_read_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, denied: str
) -> None:
    """Root may read everything, so the denial is made up."""
    if denied.startswith("is not"):
        monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(here / "good.txt"))
    else:

        def fail(path: Path, mode: str) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(ConfigError, match=denied) as refusal:
        check_data(
            DataConfig(DataSource.text, str(here / "good.txt"), cache_dir=str(here)), TokenizerConfig()
        )
    assert refusal.value.field == "data.path"


def test_a_cache_that_cannot_be_written_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="is not writable") as refusal:
        check_data(DataConfig(cache_dir=str(here / "cache")), TokenizerConfig())
    assert refusal.value.field == "data.cache_dir"
    assert refusal.value.fix == {"data.cache_dir": Path(tempfile.gettempdir()) / "tpresearch"}


@pytest.mark.cli
def test_refusing_a_missing_path_loads_nothing_heavy() -> None:
    code = """
import json, sys
from tpresearch.config import ConfigError
from tpresearch.config.schema import DataConfig, DataSource, TokenizerConfig
from tpresearch.data.check import check_data
try:
    check_data(DataConfig(DataSource.text, "/absent.txt"), TokenizerConfig())
except ConfigError as error:
    heavy = {"torch", "datasets", "transformers", "tokenizers", "pyarrow"}
    print(json.dumps([error.field, sorted(heavy & set(sys.modules))]))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == ["data.path", []]
