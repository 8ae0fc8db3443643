"""Corpus -> tokenizer -> token streams: two folders in the cache, each built once per host, viewed as rows of `seq_len`.

Each folder's name is a hash of its inputs, so that another seq_len repeats nothing. A rank that finds the streams
needs nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer as HfTokenizer

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import DataConfig, DataSource, TokenizerConfig, TokenizerKind
from tpresearch.config.world import SINGLE_PROCESS, World
from tpresearch.data.cache import Meta, build_once
from tpresearch.data.documents import Document, Parts
from tpresearch.data.hub import open_hub, warn_of_unread_files
from tpresearch.data.rows import AnyCorpus, PackedCorpus, SyntheticCorpus
from tpresearch.data.sources import hash_text, open_files
from tpresearch.data.streams import write_streams
from tpresearch.data.tokenizer import (
    PIECE_CHARS,
    TOKENIZER_FILE,
    Tokenizer,
    byte_level,
    cut_parts,
    load_hf,
    train_bpe,
)

log = logging.getLogger(__name__)

FORMAT_VERSION = 4
"""Part of every folder's name: raise it when what is written changes."""

BPE_TRAIN_CHARS = 128 << 20
"""Maximum text to train a BPE on: more changes few merges, and costs memory."""

SAMPLE_CHARS = 1 << 20
"""How much text a Hugging Face tokenizer is tried on, to see whether it loses some."""

CHARS_PER_TOKEN = 4
"""Approximately, for a BPE of 4,096 to 32,000 entries on English and code."""

DOCUMENTS_PER_HELD_OUT = 5
"""With fewer than this many times `held_out_every` documents, too few names may fall on the held-out side."""


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    world: World = SINGLE_PROCESS,
    check: Callable[[], None] = lambda: None,
) -> AnyCorpus:
    """The corpus of a config: packed rows, prepared if they are not yet cached, or synthetic ones.

    Every rank may call this at once: one process per host prepares, its first rank if that is running, and the others
    wait for it.

    Args:
        world: rank 0 draws progress bars on stderr, if that is a terminal.
        check: called between documents, and between parts of long ones; what it raises ends the preparation, and leaves nothing half built.

    Raises:
        ConfigError: for text that cannot be read after all (a bad line, a hub that went away) or does not
            exist.
    """
    if data.is_synthetic:
        return SyntheticCorpus.of(data, tokenizer)
    return _Pipeline(data, tokenizer, world, check).rows()


class _Pipeline:
    """The two stages for one config; the second asks the first only when it must build."""

    def __init__(
        self, data: DataConfig, tokenizer: TokenizerConfig, world: World, check: Callable[[], None]
    ) -> None:
        self.data, self.check = data, check
        self.progress, self.is_leader = world.rank == 0, world.local_rank == 0
        self.vocab_size = tokenizer.vocab_size
        self.cache = Path(os.path.expanduser(data.cache_dir))
        self.corpus = open_hub(data) if data.source is DataSource.hf else open_files(data)
        self.hf_tokenizer = load_hf(tokenizer.path) if tokenizer.kind is TokenizerKind.hf else None

        learned = (self.corpus.content_hash, data.held_out_every, self._bpe_train_chars(), self.vocab_size)
        self.bpe_key = fingerprint("bpe", *learned)
        tokenizer_key = self.hf_tokenizer.hash if self.hf_tokenizer else self.bpe_key
        corpus = (self.corpus.content_hash, data.held_out_every, data.max_tokens)
        self.tokens_key = fingerprint("tokens", *corpus, tokenizer_key)

    def rows(self) -> PackedCorpus:
        folder, seq_len = self._folder("tokens", self.tokens_key), self.data.seq_len
        meta = build_once(folder, self._tokenize, self.check, self.is_leader)
        packed = PackedCorpus.open(folder, meta, seq_len)
        if len(packed.held_out) == 0:
            tokens = meta["held_out"]["tokens"]
            log.warning("the %d held-out tokens fill no row of %d: nothing to evaluate on", tokens, seq_len)
        return packed

    def _tokenize(self, draft: Path) -> Meta:
        tokenizer = self.hf_tokenizer or self._bpe()
        if self.hf_tokenizer:
            self._warn_of_lost_text(self.hf_tokenizer)
        if self.data.source is DataSource.hf:
            warn_of_unread_files(self.data)
        with log_stage("tokenizing", self._total_bytes(), self.progress, self.check) as advance:
            counts = write_streams(draft, self._split(), tokenizer, self.data.max_tokens, advance)
        if counts["train"]["tokens"] == 0:
            if self.data.max_tokens and counts["held_out"]["tokens"]:
                why, legal = (
                    "the text of so few tokens is held out, and leaves none to train on",
                    "more, or null",
                )
                raise ConfigError("data.max_tokens", self.data.max_tokens, why, legal)
            legal = "files or records with text in them"
            raise ConfigError("data.path", self.data.path, "no text in it", legal)
        tokenizer.save(draft / TOKENIZER_FILE)
        return {
            "format": FORMAT_VERSION,
            "source": str(self.data.source),
            "corpus_hash": self.corpus.content_hash,
            "held_out_every": self.data.held_out_every,
            "python": platform.python_version(),
            "tokenizer_hash": tokenizer.hash,
            "vocab_size": tokenizer.size,
            "eos_id": tokenizer.eos_id,
            **counts,
        }

    def _warn_of_lost_text(self, tokenizer: Tokenizer) -> None:
        most = min(SAMPLE_CHARS, self._max_chars() or SAMPLE_CHARS)
        texts = ("".join(cut_out(document.parts, 0, most)) for document in self.corpus.documents())
        sample = "\n".join(cut_out(texts, 0, most))
        if lost := tokenizer.lost_chars(sample):
            share = f"{lost:,} of the first {len(sample):,} characters ({100 * lost / len(sample):.2g} %)"
            log.warning("this tokenizer loses text that it has no tokens for: %s", share)

    def _bpe(self) -> Tokenizer:
        folder = self._folder("tokenizers", self.bpe_key)
        build_once(folder, self._train_bpe, self.check)
        return byte_level(HfTokenizer.from_file(str(folder / TOKENIZER_FILE)))

    def _train_bpe(self, draft: Path) -> Meta:
        def counted(texts: Iterable[str]) -> Iterator[str]:
            for text in texts:
                advance(len(text.encode()))
                yield text

        what = f"training a BPE of {self.vocab_size:,} entries"
        with log_stage(what, self._total_bytes(), self.progress, self.check) as advance:
            pieces = (piece for train, _ in self._split() for piece in cut_parts(train, PIECE_CHARS))
            texts = cut_out(pieces, 0, self._bpe_train_chars())
            tokenizer = train_bpe(counted(texts), self.vocab_size)
        if tokenizer.size < self.vocab_size:
            log.warning("the text yields only %d of %d tokens requested", tokenizer.size, self.vocab_size)
        tokenizer.save(draft / TOKENIZER_FILE)
        return {
            "format": FORMAT_VERSION,
            "corpus_hash": self.corpus.content_hash,
            "vocab_size": tokenizer.size,
        }

    def _split(self) -> Iterator[tuple[Parts, Parts]]:
        """Each document as (train text, held-out text), both in parts, in order; of one that is longer than all that is read, its
        beginning."""
        every, most = self.data.held_out_every, self._max_chars()
        whole = holds_out_documents(self.corpus.documents(), every, most)
        for document in self.corpus.documents():
            self.check()
            yield split_document(document, every, whole, most)

    def _bpe_train_chars(self) -> int:
        """Text to train the BPE on: no more than will be read anyway, so that streaming fetches little twice."""
        return min(BPE_TRAIN_CHARS, self._max_chars() or BPE_TRAIN_CHARS)

    def _max_chars(self) -> int | None:
        """Approximate text of data.max_tokens."""
        return self.data.max_tokens and self.data.max_tokens * CHARS_PER_TOKEN

    def _total_bytes(self) -> int | None:
        """Approximate size of a pass, for a progress bar."""
        limits = [self.corpus.size_bytes, self._max_chars()]
        return min((limit for limit in limits if limit is not None), default=None)

    def _folder(self, kind: str, key: str) -> Path:
        return self.cache / kind / f"{self.data.source}-{key}"


def fingerprint(*parts: object) -> str:
    """16 hex digits over what a folder is made from, and the version of its format."""
    return hash_text(json.dumps([FORMAT_VERSION, *parts]))


def cut_out(parts: Parts, start: int, stop: int | None) -> Iterator[str]:
    """The characters from `start` to `stop` of a text in parts, which is read no further."""
    at = 0
    for part in parts:
        yield part[max(start - at, 0) : None if stop is None else max(stop - at, 0)]
        at += len(part)
        if stop is not None and at >= stop:
            return


# What is held out for evaluation: decided by names, so the same for every run, tokenizer and plan.


def is_held_out(name: str, every: int) -> bool:
    return int(hashlib.sha1(name.encode(errors="surrogateescape")).hexdigest(), 16) % every == 0


def holds_out_documents(documents: Iterable[Document], every: int, chars: int | None = None) -> bool:
    """Whether a corpus has enough documents to hold out whole ones.

    Determined from its first `5 * every` documents or first `chars` of text. There are too few where these are fewer
    (a single text file, say), or would all fall on one side.
    """
    enough = DOCUMENTS_PER_HELD_OUT * every
    held_out: list[bool] = []
    for document in islice(documents, enough):
        held_out.append(is_held_out(document.name, every))
        if chars is not None and (chars := chars - sum(map(len, cut_out(document.parts, 0, chars)))) <= 0:
            break
    return len(held_out) == enough and 0 < sum(held_out) < enough


def split_document(
    document: Document, every: int, whole: bool, chars: int | None = None
) -> tuple[Parts, Parts]:
    """A document's train text and held-out text, in parts.

    Args:
        whole: hold out all of the document where sha1(name) % every == 0, and none of it elsewhere. Otherwise
            hold out the end of every document: cut at 1/every before its end, or at a line's start at most as
            far again before.
        chars: of its beginning, which alone is read; None for all.
    """
    parts = document.parts
    if whole:
        text = cut_out(parts, 0, chars)
        return ((), text) if is_held_out(document.name, every) else (text, ())
    size = sum(map(len, cut_out(parts, 0, chars)))
    share = max(size // every, 1)
    cut = end = size - share
    at = max(end - share, 0)
    for part in cut_out(parts, at, end):
        if start_of_line := part.rfind("\n") + 1:
            cut = at + start_of_line
        at += len(part)
    return cut_out(parts, 0, cut), cut_out(parts, cut, size)


@contextmanager
def log_stage(
    what: str, total_bytes: int | None, bar: bool, check: Callable[[], None] = lambda: None
) -> Iterator[Callable[[int], None]]:
    """Log a stage and how long it took; yields a function that takes the bytes done since it was last called.

    Args:
        what: the stage in a few words, such as "tokenizing".
        total_bytes: None if it is not known how far there is to go.
        bar: whether to draw a progress bar, which is done only where stderr is a terminal.
        check: called with each of these counts; what it raises ends the stage.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    hidden = not (bar and sys.stderr.isatty())
    console = Console(stderr=True, quiet=hidden)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    started = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(what, total=total_bytes)

        def advance(count: int) -> None:
            check()
            progress.advance(task, count)

        yield advance
    done = progress.tasks[task].completed
    log.info("%s: %.1f MB in %.1f s", what, done / 1e6, time.perf_counter() - started)
