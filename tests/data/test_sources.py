"""Every source gives its documents in a fixed order, under names that say where they come from."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tpresearch.config import ConfigError
from tpresearch.config.schema import DataConfig, DataSource, TokenizerConfig
from tpresearch.data import corpus as corpora
from tpresearch.data import prepare
from tpresearch.data.corpus import hash_files, open_corpus

TEXTS = [f"document {index}: " + f"words{index} " * 30 for index in range(250)]


def names_and_texts(data: DataConfig) -> list[tuple[str, str]]:
    return [tuple(document) for document in open_corpus(data).documents()]


def write_jsonl(path: Path, texts: list[str | None], field: str = "text") -> None:
    lines = [json.dumps({"id": index, field: text}) for index, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n \n")  # a blank line at the end is usual


def write_parquet(path: Path, texts: list[str | None], field: str = "text") -> None:
    pq.write_table(pa.table({"id": list(range(len(texts))), field: texts}), path)


def test_text_files_are_documents_by_relative_path(texts: Path, configure) -> None:
    read = names_and_texts(configure(f"{texts}/**/*.txt"))
    assert [name for name, _ in read] == sorted(f"part{index % 2}/{index:03}.txt" for index in range(120))
    assert dict(read)["part1/007.txt"] == (texts / "part1/007.txt").read_text()


def test_a_list_of_files_and_globs_is_read_once_each_in_order(texts: Path, configure) -> None:
    paths = [f"{texts}/part1/*.txt", f"{texts}/part0/004.txt", f"{texts}/part0/00*.txt"]
    names = [name for name, _ in names_and_texts(configure(paths))]
    assert names == sorted(set(names))
    assert len(names) == 60 + 5
    assert names_and_texts(configure(paths)) == names_and_texts(configure(paths[::-1]))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_records_are_documents_by_file_and_index(tmp_path: Path, configure, kind: str) -> None:
    source = DataSource.parquet if kind == "parquet" else DataSource.jsonl
    for file, part in (("a", [TEXTS[0], None, TEXTS[1], ""]), ("b", TEXTS[2:4])):
        path = tmp_path / f"{file}.{kind}"
        (write_parquet if kind == "parquet" else write_jsonl)(path, part, field="body")
        if kind.endswith("gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
    read = names_and_texts(configure(f"{tmp_path}/*.{kind}", source, text_field="body"))
    names = [f"a.{kind}:0", f"a.{kind}:2", f"b.{kind}:0", f"b.{kind}:1"]
    assert read == list(zip(names, TEXTS[:4], strict=True))


def test_every_source_of_the_same_texts_packs_the_same_rows(
    tmp_path: Path, configure, bpe: TokenizerConfig
) -> None:
    """Fewer than 5 x 60 documents give their tails to be held out, whatever they are called."""
    (tmp_path / "text").mkdir()
    for index, text in enumerate(TEXTS):
        (tmp_path / f"text/{index:04}.txt").write_text(text)
    write_jsonl(tmp_path / "data.jsonl", TEXTS)
    write_parquet(tmp_path / "data.parquet", TEXTS)
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder/train.jsonl", TEXTS)
    configs = [
        configure(f"{tmp_path}/text/*.txt", DataSource.text, held_out_every=60),
        configure(str(tmp_path / "data.jsonl"), DataSource.jsonl, held_out_every=60),
        configure(str(tmp_path / "data.parquet"), DataSource.parquet, held_out_every=60),
        configure(str(tmp_path / "folder"), DataSource.hf, held_out_every=60),
        configure(
            str(tmp_path / "folder"), DataSource.hf, held_out_every=60, streaming=True, max_tokens=10**6
        ),
    ]
    packed = [prepare(config, bpe) for config in configs]
    assert len({corpus.train.tobytes() for corpus in packed}) == 1
    assert len({corpus.held_out.tobytes() for corpus in packed}) == 1
    assert packed[0].meta["train"]["documents"] == 250


@pytest.mark.parametrize("source", ["text", "jsonl", "hf"])
def test_max_tokens_stops_at_the_end_of_the_document_that_reaches_it(
    tmp_path: Path, configure, bpe: TokenizerConfig, source: str
) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data/train.jsonl", TEXTS)
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index:04}.txt").write_text(text)
    paths = {"text": f"{tmp_path}/*.txt", "jsonl": f"{tmp_path}/data/*", "hf": f"{tmp_path}/data"}
    corpus = prepare(configure(paths[source], DataSource(source), max_tokens=2000), bpe)
    parts = [corpus.meta["train"], corpus.meta["held_out"]]
    tokens = sum(part["tokens"] for part in parts)
    assert 2000 <= tokens < 2000 + 200
    assert all(part["rows"] > 0 for part in parts), "a short reading still holds something out"
    more = prepare(configure(paths[source], DataSource(source), max_tokens=4000), bpe)
    assert more.folder != corpus.folder
    assert more.corpus_hash == corpus.corpus_hash


def test_this_python_s_source_is_a_corpus_of_its_own(configure) -> None:
    stdlib = open_corpus(configure(source=DataSource.pystdlib))
    names = [document.name for document in stdlib.documents()]
    assert names == sorted(names)
    assert {"json/decoder.py", "ast.py"} <= set(names)
    skipped = {"test", "tests", "idle_test", "lib2to3", "site-packages"}
    assert not [name for name in names if skipped & set(name.split("/")[:-1])]
    both = open_corpus(configure(source=DataSource.pysource))
    assert both.content_hash != stdlib.content_hash
    assert both.size_bytes > 3 * stdlib.size_bytes
    assert {"torch/nn/functional.py", "ast.py"} <= {document.name for document in both.documents()}


def test_the_hash_is_over_names_contents_and_field_but_not_the_split(tmp_path: Path, configure) -> None:
    write_jsonl(tmp_path / "data.jsonl", TEXTS[:3])

    def content(**settings: object) -> str:
        return open_corpus(configure(str(tmp_path / "data.jsonl"), DataSource.jsonl, **settings)).content_hash

    before = content()
    assert content(seq_len=99, held_out_every=7, max_tokens=5) == before
    assert content(text_field="other") != before
    write_jsonl(tmp_path / "data.jsonl", TEXTS[:2] + TEXTS[3:4])
    assert content() != before


def test_the_hash_of_a_large_corpus_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "large.txt"
    file.write_text("one")
    plain = hash_files([("large.txt", file)], "text")
    monkeypatch.setattr(corpora, "REMEMBER_ABOVE_BYTES", 0)
    assert hash_files([("large.txt", file)], "text", tmp_path / "cache") == plain
    with monkeypatch.context() as patched:
        patched.setattr(corpora, "_hash_contents", lambda *_: pytest.fail("read the files again"))
        assert hash_files([("large.txt", file)], "text", tmp_path / "cache") == plain
    file.write_text("two")
    assert hash_files([("large.txt", file)], "text", tmp_path / "cache") != plain


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{broken", "not JSON"),
        ("[1, 2]", "a JSON list"),
        ('{"body": "text"}', "no such field"),
        ('{"text": 7}', "holds int, not text"),
    ],
)
def test_a_bad_line_far_down_is_refused_when_it_is_met(
    tmp_path: Path, configure, bpe: TokenizerConfig, line: str, why: str
) -> None:
    write_jsonl(tmp_path / "data.jsonl", TEXTS[:200])
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ConfigError, match=f"{why}.*") as refusal:
        prepare(configure(str(tmp_path / "data.jsonl"), DataSource.jsonl), bpe)
    assert "line 202" in str(refusal.value)
    assert not list((tmp_path / "cache").glob("*/jsonl-*"))


def test_a_corpus_without_text_is_refused(tmp_path: Path, configure, bpe: TokenizerConfig) -> None:
    write_jsonl(tmp_path / "data.jsonl", ["", None])
    with pytest.raises(ConfigError, match="no text in it"):
        prepare(configure(str(tmp_path / "data.jsonl"), DataSource.jsonl), bpe)
