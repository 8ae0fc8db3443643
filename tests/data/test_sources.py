"""Every source gives its documents in a fixed order, under names that say where they come from."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.corpora import Configure, prepared

from tpresearch.config import ConfigError
from tpresearch.config.schema import DataConfig, DataSource, TokenizerConfig
from tpresearch.data import documents, sources
from tpresearch.data.pipeline import split_document
from tpresearch.data.sources import hash_files, open_files
from tpresearch.data.tokenizer import cut_parts

TEXTS = [f"document {index}: " + f"words{index} " * 30 for index in range(250)]


def names_and_texts(data: DataConfig) -> list[tuple[str, str]]:
    return [(document.name, "".join(document.parts)) for document in open_files(data).documents()]


def write_jsonl(path: Path, texts: Sequence[str | None], field: str = "text") -> None:
    lines = [json.dumps({"id": index, field: text}) for index, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n \n")  # a blank line at the end is usual


def write_parquet(path: Path, texts: Sequence[str | None], field: str = "text") -> None:
    pq.write_table(pa.table({"id": list(range(len(texts))), field: texts}), path)


def test_text_files_are_documents_by_relative_path(texts: Path, configure: Configure) -> None:
    others = ["part2/below/below.txt", "top.txt"]
    for name in others:
        (texts / name).parent.mkdir(parents=True, exist_ok=True)
        (texts / name).write_text("text")
    read = names_and_texts(configure(f"{texts}/**/*.txt"))
    names = [*others, *(f"part{index % 2}/{index:03}.txt" for index in range(120))]
    assert [name for name, _ in read] == sorted(names)
    assert dict(read)["part1/007.txt"] == (texts / "part1/007.txt").read_text()


def test_a_file_may_have_a_name_that_is_not_utf8(
    tmp_path: Path, configure: Configure, bpe: TokenizerConfig
) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("words of a text\n" * 100)
    assert len(prepared(configure(f"{tmp_path}/*.txt"), bpe).train)


def test_a_list_of_files_and_globs_is_read_once_each_in_order(
    texts: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [f"{texts}/part1/*.txt", f"{texts}/part0/004.txt", f"{texts}/part0/00*.txt"]
    names = [name for name, _ in names_and_texts(configure(paths))]
    assert names == sorted(set(names))
    assert len(names) == 60 + 5
    assert names_and_texts(configure(paths)) == names_and_texts(configure(paths[::-1]))
    monkeypatch.chdir(texts)
    relative = ["part1/*.txt", "./part0/../part0/004.txt", paths[2]]
    for same in ([*paths, *relative], relative):
        assert open_files(configure(same)).content_hash == open_files(configure(paths)).content_hash
        assert [name for name, _ in names_and_texts(configure(same))] == names


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_records_are_documents_by_file_and_index(tmp_path: Path, configure: Configure, kind: str) -> None:
    source = DataSource.parquet if kind == "parquet" else DataSource.jsonl
    for file, part in (("a", [TEXTS[0], None, TEXTS[1], ""]), ("b", TEXTS[2:4])):
        path = tmp_path / f"{file}.{kind}"
        (write_parquet if kind == "parquet" else write_jsonl)(path, part, field="body")
        if kind.endswith("gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
    bounded = configure(f"{tmp_path}/*.{kind}", source, text_field="body", max_record_bytes=400)
    read = names_and_texts(
        bounded
    )  # each: a group of Parquet's may have more than one, as real text is packed
    names = [f"a.{kind}:0", f"a.{kind}:2", f"b.{kind}:0", f"b.{kind}:1"]
    assert read == list(zip(names, TEXTS[:4], strict=True))


def test_every_source_of_the_same_texts_packs_the_same_rows(
    tmp_path: Path, configure: Configure, bpe: TokenizerConfig
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
    packed = [prepared(config, bpe) for config in configs]
    assert len({corpus.train.tobytes() for corpus in packed}) == 1
    assert len({corpus.held_out.tobytes() for corpus in packed}) == 1
    assert packed[0].meta["train"]["documents"] == 250


@pytest.mark.parametrize("source", ["text", "jsonl", "hf"])
def test_max_tokens_stops_at_the_end_of_the_document_that_reaches_it(
    tmp_path: Path, configure: Configure, bpe: TokenizerConfig, source: str
) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data/train.jsonl", TEXTS)
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index:04}.txt").write_text(text)
    paths = {"text": f"{tmp_path}/*.txt", "jsonl": f"{tmp_path}/data/*", "hf": f"{tmp_path}/data"}
    corpus = prepared(configure(paths[source], DataSource(source), max_tokens=2000), bpe)
    parts = [corpus.meta["train"], corpus.meta["held_out"]]
    tokens = sum(part["tokens"] for part in parts)
    assert 2000 <= tokens < 2000 + 200
    assert min(len(corpus.train), len(corpus.held_out)) > 0, "a short reading still holds something out"
    more = prepared(configure(paths[source], DataSource(source), max_tokens=4000), bpe)
    assert more.folder != corpus.folder
    assert more.corpus_hash == corpus.corpus_hash


def test_max_tokens_reads_the_beginning_of_a_long_file(
    tmp_path: Path, configure: Configure, bpe: TokenizerConfig
) -> None:
    (tmp_path / "long.txt").write_text("\n".join(TEXTS))
    corpus = prepared(configure(str(tmp_path / "long.txt"), max_tokens=2000), bpe)
    assert corpus.meta["train"]["bytes"] + corpus.meta["held_out"]["bytes"] == 4 * 2000
    assert min(len(corpus.train), len(corpus.held_out)) > 0, "a short reading still holds something out"


def test_this_python_s_source_is_a_corpus_of_its_own(configure: Configure) -> None:
    stdlib = open_files(configure(source=DataSource.pystdlib))
    names = [document.name for document in stdlib.documents()]
    assert names == sorted(names)
    assert {"json/decoder.py", "ast.py"} <= set(names)
    skipped = {"test", "tests", "idle_test", "lib2to3", "site-packages"}
    assert not [name for name in names if skipped & set(name.split("/")[:-1])]
    both = open_files(configure(source=DataSource.pysource))
    assert both.content_hash != stdlib.content_hash
    assert stdlib.size_bytes
    assert both.size_bytes
    assert both.size_bytes > 3 * stdlib.size_bytes
    assert {"torch/nn/functional.py", "ast.py"} <= {document.name for document in both.documents()}


def test_the_hash_is_over_names_contents_and_field_but_not_the_split(
    tmp_path: Path, configure: Configure
) -> None:
    write_jsonl(tmp_path / "data.jsonl", TEXTS[:3])

    def content(**settings: Any) -> str:
        return open_files(configure(str(tmp_path / "data.jsonl"), DataSource.jsonl, **settings)).content_hash

    before = content()
    assert content(seq_len=99, held_out_every=7, max_tokens=5) == before
    assert content(text_field="other") != before
    write_jsonl(tmp_path / "data.jsonl", TEXTS[:2] + TEXTS[3:4])
    assert content() != before


def test_the_hash_of_a_large_corpus_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "large.txt"
    file.write_text("one")
    plain = hash_files([("large.txt", file)], "text")
    monkeypatch.setattr(sources, "CACHE_HASH_ABOVE_BYTES", 0)
    assert hash_files([("large.txt", file)], "text", tmp_path / "cache") == plain
    with monkeypatch.context() as patched:
        patched.setattr(sources, "_hash_contents", lambda *_: pytest.fail("read the files again"))
        assert hash_files([("large.txt", file)], "text", tmp_path / "cache") == plain
    for name, salt in (("other.txt", "text"), ("large.txt", "jsonl:text")):
        assert hash_files([(name, file)], salt, tmp_path / "cache") != plain
    before = file.stat()
    file.write_text("two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as of a copy: its time of change tells
    assert hash_files([("large.txt", file)], "text", tmp_path / "cache") != plain


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{broken", "not JSON"),
        ("[1, 2]", "a JSON list"),
        ("null", "a JSON NoneType"),
        ('{"body": "text"}', "no such field"),
        ('{"text": 7}', "holds int, not text"),
        pytest.param("[" * 200_000, "JSON nested too deep to be read", id="deep"),
        (r'{"text": "half \ud83d"}', "character 6 is 0xd83d, half of a surrogate pair"),
    ],
)
def test_a_bad_line_far_down_is_refused_when_it_is_met(
    tmp_path: Path, configure: Configure, bpe: TokenizerConfig, line: str, why: str
) -> None:
    write_jsonl(tmp_path / "data.jsonl", TEXTS[:200])
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ConfigError, match=f"{why}.*") as refusal:
        prepared(configure(str(tmp_path / "data.jsonl"), DataSource.jsonl), bpe)
    assert f"{tmp_path / 'data.jsonl'}, line 202" in str(refusal.value)
    assert not list((tmp_path / "cache").glob("*/jsonl-*"))


def read_until_refused(data: DataConfig) -> tuple[int, ConfigError]:
    """How many documents come before the refusal, which is one line."""
    read = []
    with pytest.raises(ConfigError) as refusal:
        read.extend(open_files(data).documents())
    assert refusal.value.field == "data.path"
    return len(read), refusal.value


def test_text_that_is_not_utf8_is_refused_by_file_or_line(tmp_path: Path, configure: Configure) -> None:
    latin = "naïve".encode("latin-1")
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(latin)
    count, refusal = read_until_refused(configure(f"{tmp_path}/*.txt"))
    assert (count, refusal.value) == (1, tmp_path / "b.txt")
    assert refusal.why == "not UTF-8 text: byte 2 is 0xef"
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "good"}\n\n{"text": "' + latin + b'"}\n')
    count, refusal = read_until_refused(configure(f"{tmp_path}/c.jsonl", DataSource.jsonl))
    assert (count, refusal.value) == (1, f"{tmp_path / 'c.jsonl'}, line 3")
    assert refusal.why == "not UTF-8 text: byte 12 is 0xef"


def test_a_bad_byte_far_into_a_text_file_is_named(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also within a letter that begins in the part before, and at the end of the file."""
    monkeypatch.setattr(documents, "PART_BYTES", 4)
    for content, at in ((b"\xef\xbb\xbfgood t\xe4xt", 9), (b"123\xc3456", 3), (b"1234567\xc3", 7)):
        (tmp_path / "a.txt").write_bytes(content)
        [document] = open_files(configure(f"{tmp_path}/a.txt")).documents()
        with pytest.raises(ConfigError, match=f"not UTF-8 text: byte {at} is {content[at]:#x}"):
            list(document.parts)


def test_a_text_file_is_in_memory_a_part_at_a_time(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PART_BYTES", 1 << 18)
    (tmp_path / "long.txt").write_text("a line of text\n" * 1_000_000)
    tracemalloc.start()
    [document] = open_files(configure(f"{tmp_path}/long.txt")).documents()
    splits = split_document(document, 20, whole=False)
    sizes = [sum(map(len, cut_parts(parts, 1 << 16))) for parts in splits]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sizes == [14_250_000, 750_000]
    assert peak < 3_000_000


def test_a_compressed_file_cut_short_is_refused_by_line(tmp_path: Path, configure: Configure) -> None:
    path = tmp_path / "cut.jsonl.gz"
    write_jsonl(path, TEXTS)
    whole = gzip.compress(path.read_bytes())
    path.write_bytes(whole[: len(whole) // 2])
    count, refusal = read_until_refused(configure(str(path), DataSource.jsonl))
    assert 0 < count < len(TEXTS)
    assert refusal.value == f"{path}, line {count + 1}"
    assert "ended before the end-of-stream marker" in refusal.why


@pytest.mark.parametrize("name", ["bomb.jsonl", "bomb.jsonl.gz", "bomb.parquet"])
def test_a_record_larger_than_its_bound_is_not_read(tmp_path: Path, configure: Configure, name: str) -> None:
    path, source = tmp_path / name, DataSource.parquet if "parquet" in name else DataSource.jsonl
    texts = ["short", "a" * 30_000_000]
    if source is DataSource.parquet:
        pq.write_table(pa.table({"text": texts}), path, compression="zstd", row_group_size=1)
        where = f"{path}, row group 1"
    else:
        write_jsonl(path, texts)
        where = f"{path}, line 2"
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    bounded = configure(str(path), source, max_record_bytes=1_000_000)
    tracemalloc.start()
    count, refusal = read_until_refused(bounded)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (count, refusal.value) == (1, where)
    assert refusal.why == "longer than data.max_record_bytes=1000000"
    assert peak < 5_000_000
    bounded.max_record_bytes = 40_000_000
    assert [len(text) for _, text in names_and_texts(bounded)] == [5, 30_000_000]


def test_a_corrupt_parquet_page_is_refused_by_row(tmp_path: Path, configure: Configure) -> None:
    path = tmp_path / "data.parquet"
    texts = [f"text {index} " * 5 for index in range(5000)]
    pq.write_table(pa.table({"text": texts}), path, use_dictionary=False, row_group_size=2048)
    page = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[page + 200 : page + 220] = b"\xff" * 20
    path.write_bytes(content)
    count, refusal = read_until_refused(configure(str(path), DataSource.parquet))
    assert (count, refusal.value) == (2048, f"{path}, row 2049")
    assert refusal.why == "cannot be read: Corrupt snappy compressed data."


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_a_parquet_column_is_text_however_it_is_laid_out(
    tmp_path: Path, configure: Configure, kind: pa.DataType
) -> None:
    column = pa.array(["one", "two", None, "one"]).cast(kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "data.parquet")
    assert pq.ParquetFile(tmp_path / "data.parquet").schema_arrow.field("text").type == kind
    read = names_and_texts(configure(str(tmp_path / "data.parquet"), DataSource.parquet))
    assert read == [("data.parquet:0", "one"), ("data.parquet:1", "two"), ("data.parquet:3", "one")]


def test_a_byte_order_mark_is_not_text_and_line_ends_are(tmp_path: Path, configure: Configure) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfmarked\r\n\rtext\n")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "c.txt").write_bytes("a\ufeffb".encode())
    read = names_and_texts(configure(f"{tmp_path}/*.txt"))
    assert read == [("a.txt", "marked\r\n\rtext\n"), ("c.txt", "a\ufeffb")]


def test_so_few_tokens_that_all_are_held_out_are_refused_by_their_number(
    texts: Path, configure: Configure, bpe: TokenizerConfig
) -> None:
    with pytest.raises(ConfigError, match="leaves none to train on") as refusal:
        prepared(configure(f"{texts}/**/*.txt", max_tokens=1), bpe)
    assert (refusal.value.field, refusal.value.fix) == ("data.max_tokens", {"data.max_tokens": None})


def test_a_corpus_without_text_is_refused(tmp_path: Path, configure: Configure, bpe: TokenizerConfig) -> None:
    write_jsonl(tmp_path / "data.jsonl", ["", None])
    with pytest.raises(ConfigError, match="no text in it"):
        prepared(configure(str(tmp_path / "data.jsonl"), DataSource.jsonl), bpe)
