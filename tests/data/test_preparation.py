"""Prepared once, whole or not at all, again when the text changes, and mended when damaged."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from support.composed import config
from support.corpora import Configure, prepared
from support.nobody import as_nobody
from support.processes import HANG_GUARD_S, ended, forked

from tpresearch.config import ConfigError
from tpresearch.config.schema import DataConfig, DataSource, TokenizerConfig, TokenizerKind
from tpresearch.config.world import World
from tpresearch.data import cache, pipeline
from tpresearch.data.cache import SAMPLE_BYTES, SAMPLES, checksum
from tpresearch.data.check import check_data
from tpresearch.data.rows import PackedCorpus
from tpresearch.data.tokenizer import train_bpe
from tpresearch.launch import Run
from tpresearch.launch.stop import Stopped
from tpresearch.prepare import main
from tpresearch.verify.ranks import Ranks


def done(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The stages that this process went through since the log was cleared."""
    names = {"training": "learn", "tokenizing": "tokenize"}
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith(tuple(names))]
    return [names[line.split(":")[0].split()[0]] for line in lines]


def same(one: PackedCorpus, other: PackedCorpus) -> bool:
    return np.array_equal(one.train, other.train) and np.array_equal(one.held_out, other.held_out)


@pytest.fixture
def data(texts: Path, configure: Configure) -> DataConfig:
    return configure(f"{texts}/**/*.txt")


@pytest.fixture(autouse=True)
def _log_of_stages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tpresearch.data")


def prepare_alone(_: World, data: DataConfig, bpe: TokenizerConfig) -> tuple[Any, list[str]]:
    """What a process finds that knows of no other, and what it logs."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.log, "info", lambda text, *words: said.append(text % words))
        corpus = prepared(data, bpe)
    return (corpus.folder, corpus.train.tobytes(), corpus.held_out.tobytes()), said


def test_four_processes_at_once_prepare_once(
    ranks: Ranks, data: DataConfig, bpe: TokenizerConfig, tmp_path: Path
) -> None:
    found, said = zip(*ranks.run(4, prepare_alone, data, bpe), strict=True)
    assert len(set(found)) == 1
    for stage in ("training", "tokenizing"):
        assert sum(line.startswith(stage) for lines in said for line in lines) == 1
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["tokenizers", "tokens"]


@pytest.mark.parametrize("stage", ["train_bpe", "write_streams"])
def test_killed_midway_leaves_nothing_half_done(
    data: DataConfig, tmp_path: Path, bpe: TokenizerConfig, stage: str
) -> None:
    whole = getattr(pipeline, stage)

    def killed(*args: Any) -> None:
        whole(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    def prepare_in_part() -> None:
        setattr(pipeline, stage, killed)
        prepared(data, bpe)

    assert ended(forked(prepare_in_part)) == -signal.SIGKILL
    leftovers = list((tmp_path / "cache").glob("*/.*.tmp"))
    assert leftovers
    assert not list((tmp_path / "cache/tokens").glob("text-*"))

    corpus = prepared(data, bpe)
    elsewhere = dataclasses.replace(data, cache_dir=str(tmp_path / "other"))
    assert same(corpus, prepared(elsewhere, bpe))
    assert not list((tmp_path / "cache").glob("*/.*.tmp"))


def test_leftovers_of_others_go_unless_they_are_at_work(data: DataConfig, bpe: TokenizerConfig) -> None:
    tokens = Path(data.cache_dir) / "tokens"
    for name in ("text-dead", "text-alive"):
        (tokens / f".{name}.123.tmp").mkdir(parents=True)
    with FileLock(tokens / ".text-alive.lock"):
        prepared(data, bpe)
        assert [path.name for path in tokens.glob(".*.tmp")] == [".text-alive.123.tmp"]


def test_leftovers_of_another_user_stay(texts: Path, data: DataConfig, bpe: TokenizerConfig) -> None:
    prepared(data, bpe)  # imports what the other user may be unable to
    with tempfile.TemporaryDirectory() as folder:  # below tmp_path no other user could be
        text, home = Path(folder) / "text.txt", Path(folder) / "cache"
        text.write_text("words of a text\n" * 100)
        leftover, lock = home / "tokens/.text-dead.123.tmp", home / "tokens/.text-dead.lock"
        for made in (leftover, home / "tokenizers"):
            made.mkdir(parents=True)
        lock.touch(0)
        for path in (folder, home, home / "tokens", home / "tokenizers"):
            Path(path).chmod(0o777)
        with as_nobody():
            prepared(DataConfig(DataSource.text, str(text), seq_len=16, cache_dir=str(home)), bpe)
        assert leftover.is_dir()


def test_who_waits_for_a_lock_says_so_and_can_be_stopped(
    data: DataConfig, bpe: TokenizerConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "LOG_WAIT_AFTER_S", 0)
    folder = prepared(data, bpe).folder
    shutil.rmtree(folder)
    folder.with_name(f".{folder.name}.4711.tmp").mkdir()
    lock = folder.with_name(f".{folder.name}.lock")
    caplog.clear()

    def check() -> None:
        if caplog.records:
            raise SystemExit(143)

    with FileLock(lock), pytest.raises(SystemExit):
        prepared(data, bpe, check=check)
    assert [record.getMessage() for record in caplog.records] == [
        f"waiting for {lock}, which process 4711 holds: it prepares the same data"
    ]


def test_the_rank_whose_progress_is_seen_goes_first(data: DataConfig, bpe: TokenizerConfig) -> None:
    started = threading.Event()

    def check() -> None:
        started.set()

    other = World(1, 2, 1, 2)
    thread = threading.Thread(target=prepared, args=(data, bpe, other, check), name="the other rank")
    with pytest.MonkeyPatch.context() as patch:
        who: list[str] = []
        build = pipeline.build_once

        def noted(*args: Any) -> Any:
            return build(
                args[0],
                lambda growing: who.append(threading.current_thread().name) or args[1](growing),
                *args[2:],
            )

        patch.setattr(pipeline, "build_once", noted)
        thread.start()
        assert started.wait(HANG_GUARD_S)
        prepared(data, bpe, World(0, 2, 0, 2))
        thread.join()
    assert set(who) == {threading.main_thread().name}


@pytest.mark.parametrize("of_another", ["meta.json", "lock", "tokens"])
def test_a_cache_of_another_user_is_refused_by_name(
    texts: Path, bpe: TokenizerConfig, of_another: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:  # below tmp_path no other user could be
        text, home = Path(folder) / "text.txt", Path(folder) / "cache"
        text.write_text("words of a text\n" * 100)
        data = DataConfig(DataSource.text, str(text), seq_len=16, cache_dir=str(home))
        tokens = prepared(data, bpe).folder
        named = tokens / "meta.json"
        if of_another != "meta.json":
            shutil.rmtree(tokens)
            named = tokens.with_name(f".{tokens.name}.lock") if of_another == "lock" else home / "tokens"
        for path in (folder, home, home / "tokens"):
            Path(path).chmod(0o755)
        named.chmod(0o555 if of_another == "tokens" else 0)
        refused_file = named
        if of_another == "tokens":
            refused_file = tokens.with_name(f".{tokens.name}.lock")
            refused_file.unlink()

        def refused() -> None:
            if os.getuid() == 0:
                os.setuid(65534)
            with pytest.raises(ConfigError) as refusal:
                prepared(data, bpe)
            assert refusal.value.field == "data.cache_dir"
            assert f"{refused_file} may not be used by user " in refusal.value.why

        assert ended(forked(refused)) == 0


def test_what_another_user_has_prepared_is_read(texts: Path, bpe: TokenizerConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:  # below tmp_path no other user could be
        text, home = Path(folder) / "text.txt", Path(folder) / "cache"
        text.write_text("words of a text\n" * 100)
        data = DataConfig(DataSource.text, str(text), seq_len=16, cache_dir=str(home))
        tokens = prepared(data, bpe).folder
        for path in (folder, home, home / "tokens", tokens):
            Path(path).chmod(0o555)

        def read() -> None:
            if os.getuid() == 0:
                os.setuid(65534)
            check_data(data, bpe)
            assert prepared(data, bpe).folder == tokens

        assert ended(forked(read)) == 0
        for path in (folder, home, home / "tokens", tokens):
            Path(path).chmod(0o755)


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_disk_without_locks_is_refused(
    data: DataConfig, bpe: TokenizerConfig, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConfigError, match="its disk gives no locks") as refusal:
        prepared(data, bpe)
    assert refusal.value.field == "data.cache_dir"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EFBIG, "larger than this process may write; a larger ulimit -f"),
    ],
)
def test_a_failed_stage_leaves_nothing(
    data: DataConfig, bpe: TokenizerConfig, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    def full(folder: Path, *_: object) -> None:
        (folder / "train.bin").touch()
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pipeline, "write_streams", full)
    with pytest.raises(ConfigError, match=said) as refusal:
        prepared(data, bpe)
    assert refusal.value.field == "data.cache_dir"
    assert [path.suffix for path in (Path(data.cache_dir) / "tokens").iterdir()] == [".lock"]


@pytest.mark.parametrize("checks", [60, 300])
def test_one_that_is_stopped_leaves_nothing_half_built(
    data: DataConfig, bpe: TokenizerConfig, checks: int
) -> None:
    """While the tokenizer learns from the 120 documents, and while they are tokenized after that."""
    left = iter(range(checks))

    def check() -> None:
        if next(left, None) is None:
            raise SystemExit(143)

    with pytest.raises(SystemExit):
        prepared(data, bpe, check=check)
    kinds = {path.parent.name for path in Path(data.cache_dir).glob("*/*") if path.is_dir()}
    assert kinds == ({"tokenizers"} if checks > 2 * 120 else set())
    assert len(prepared(data, bpe).train)


def test_one_can_be_stopped_within_a_long_document(
    data: DataConfig, bpe: TokenizerConfig, tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text("Some words of a single document.\n" * 12_000)
    checks: list[int] = []
    prepared(dataclasses.replace(data, path=f"{tmp_path}/long.txt"), bpe, check=lambda: checks.append(1))
    assert len(checks) > 2 * 5, "each of its parts of 65,536 characters is learned from, and tokenized"


def test_ctrl_c_ends_the_command_while_a_tokenizer_learns(
    data: DataConfig, bpe: TokenizerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads read the text, and no KeyboardInterrupt reaches them."""

    def learn(texts: Iterable[str], vocab_size: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in texts:
            time.sleep(0.01)

    monkeypatch.setattr(pipeline, "train_bpe", learn)
    with pytest.raises(Stopped, match="stopped by SIGINT"):
        main.main(dataclasses.replace(config(), data=data, tokenizer=bpe), Run(tmp_path, World()))
    assert not list(Path(data.cache_dir).glob("*/.*.tmp"))


def test_only_what_changed_is_done_again(
    data: DataConfig, bpe: TokenizerConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepared(data, bpe)
    assert done(caplog) == ["learn", "tokenize"]
    caplog.clear()
    assert same(prepared(data, bpe), first)
    data.seq_len = 32
    longer = prepared(data, bpe)
    assert done(caplog) == []
    assert longer.tokenizer_hash == first.tokenizer_hash
    size = min(first.train.size, longer.train.size)
    np.testing.assert_array_equal(first.train.ravel()[:size], longer.train.ravel()[:size])
    caplog.clear()
    prepared(data, TokenizerConfig(vocab_size=300))
    assert done(caplog) == ["learn", "tokenize"]
    for other in (dataclasses.replace(data, held_out_every=10), dataclasses.replace(data, max_tokens=2000)):
        caplog.clear()
        prepared(other, bpe)
        assert done(caplog) == ["learn", "tokenize"], "the text to learn from is another"
    monkeypatch.setattr(pipeline, "FORMAT_VERSION", pipeline.FORMAT_VERSION + 1)
    assert prepared(data, bpe).folder != first.folder


@pytest.mark.parametrize("change", ["byte", "name", "new file", "held_out_every"])
def test_another_content_is_another_folder(
    data: DataConfig, texts: Path, bpe: TokenizerConfig, change: str
) -> None:
    before = prepared(data, bpe)
    file = texts / "part1/007.txt"
    if change == "byte":
        stat = file.stat()
        file.write_text(file.read_text().replace("w7x3", "w7y3"))
        # Same size, same time: only the content differs.
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "name":
        file.rename(file.with_name("0075.txt"))  # in the same place in the order
    elif change == "new file":
        (texts / "part1/new.txt").write_text("new")
    else:
        data.held_out_every = 10
    after = prepared(data, bpe)
    assert after.folder != before.folder
    assert (after.corpus_hash == before.corpus_hash) == (change == "held_out_every")


@pytest.mark.parametrize("setting", ["held_out_every", "max_tokens"])
def test_a_given_tokenizer_does_not_hide_another_choice_of_text(
    data: DataConfig, tmp_path: Path, setting: str
) -> None:
    train_bpe(["text"], 260).save(tmp_path / "given.json")
    given = TokenizerConfig(TokenizerKind.hf, 260, str(tmp_path / "given.json"))
    before = prepared(data, given)
    setattr(data, setting, 10)
    after = prepared(data, given)
    assert after.folder != before.folder
    assert after.tokenizer_hash == before.tokenizer_hash
    assert after.meta["train"] != before.meta["train"]
    train_bpe(["many words"], 260).save(tmp_path / "given.json")
    other = prepared(data, given)
    assert other.folder != after.folder, "another tokenizer in the same file"
    assert other.tokenizer_hash != after.tokenizer_hash


def test_a_moved_corpus_is_the_same_corpus(data: DataConfig, texts: Path, bpe: TokenizerConfig) -> None:
    before = prepared(data, bpe)
    texts.rename(texts.with_name("elsewhere"))
    data.path = data.path.replace("/texts/", "/elsewhere/")
    assert prepared(data, bpe).folder == before.folder


STREAM, META = "held_out.bin", "meta.json"
DAMAGE = {
    "truncated": (STREAM, lambda path: os.truncate(path, path.stat().st_size // 2), "bytes instead of"),
    "a flipped bit": (STREAM, lambda path: flip_bit(path, path.stat().st_size // 2), "its checksum differs"),
    "missing": ("tokenizer.json", lambda path: path.unlink(), "missing"),
    "no meta": (META, lambda path: path.unlink(), "FileNotFoundError"),
    "half a meta": (META, lambda path: os.truncate(path, 100), "JSONDecodeError"),
    "another number": (META, lambda path: alter(path, '"eos_id": 0', '"eos_id": 1'), "its checksum differs"),
    "not a meta": (META, lambda path: path.write_text("[]"), "TypeError"),
}


def alter(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def flip_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_named_and_mended(
    data: DataConfig, bpe: TokenizerConfig, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    before = prepared(data, bpe)
    train, held_out, meta = before.train.copy(), before.held_out.copy(), before.meta
    name, damage, why = DAMAGE[kind]
    damage(before.folder / name)
    caplog.clear()
    after = prepared(data, bpe)
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"{before.folder} is damaged ({name}: " in warning
    assert why in warning
    assert done(caplog) == ["tokenize"]
    np.testing.assert_array_equal(after.train, train)
    np.testing.assert_array_equal(after.held_out, held_out)
    assert after.meta == meta
    caplog.clear()
    prepared(data, bpe)
    assert not caplog.records


def test_damage_below_is_found_when_it_is_needed(
    data: DataConfig, bpe: TokenizerConfig, caplog: pytest.LogCaptureFixture
) -> None:
    before = prepared(data, bpe)
    rows = before.train.copy()
    [tokenizer] = Path(data.cache_dir).glob("tokenizers/text-*")
    (tokenizer / "tokenizer.json").write_text("{}")
    caplog.clear()
    assert same(prepared(data, bpe), before)
    assert done(caplog) == []
    flip_bit(before.folder / "train.bin", 100)
    np.testing.assert_array_equal(prepared(data, bpe).train, rows)
    assert done(caplog) == ["learn", "tokenize"]


def test_what_another_process_removes_while_it_is_read_is_built_again(
    data: DataConfig, bpe: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that has found it damaged does."""
    before = prepared(data, bpe)
    rows = before.train.copy()

    def removed(path: Path) -> int:
        monkeypatch.setattr(cache, "checksum", checksum)
        shutil.rmtree(path.parent)
        return checksum(path)

    monkeypatch.setattr(cache, "checksum", removed)
    np.testing.assert_array_equal(prepared(data, bpe).train, rows)


def test_the_checksum_sees_every_sample(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(os.urandom(3 * SAMPLE_BYTES + 17))
    size = 3 * SAMPLES * SAMPLE_BYTES + 5
    with large.open("wb") as file:
        file.truncate(size)
    for path, places in ((small, (0, SAMPLE_BYTES, 3 * SAMPLE_BYTES + 16)), (large, (0, size - 1))):
        before = checksum(path)
        for at in places:
            with path.open("r+b") as file:
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 4]))
            assert checksum(path) != before
            before = checksum(path)


def test_meta_says_what_was_prepared(data: DataConfig, texts: Path, bpe: TokenizerConfig) -> None:
    corpus = prepared(data, bpe)
    meta = json.loads((corpus.folder / "meta.json").read_text())
    files = list(texts.rglob("*.txt"))
    parts = [meta["train"], meta["held_out"]]
    assert sum(part["documents"] for part in parts) == 120
    assert sum(part["bytes"] for part in parts) == sum(file.stat().st_size for file in files)
    assert [part["tokens"] // 17 for part in parts] == [len(corpus.train), len(corpus.held_out)]
    assert (meta["vocab_size"], meta["eos_id"], meta["dtype"]) == (400, 0, "uint16")
    assert meta["python"] == sys.version.split()[0]
    assert meta["corpus_hash"] == corpus.corpus_hash
    assert 0 < meta["unigram_entropy_nats"]["train"] < corpus.unigram_entropy < np.log(400) + 1
    sizes = {name: (corpus.folder / name).stat().st_size for name in meta["files"]}
    assert sizes == {name: file["bytes"] for name, file in meta["files"].items()}
    assert corpus.meta == {key: value for key, value in meta.items() if key != "checksum"}
