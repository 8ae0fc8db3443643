"""Corpus -> tokenizer -> token streams -> packed rows: three folders in the cache, each built once per host.

Each is named by what it was made from, so that another seq_len repeats only the packing, and another corpus
nothing but itself. A rank that finds the rows asks for nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer as HfTokenizer

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import DataConfig, TokenizerConfig, TokenizerKind
from tpresearch.data.cache import Meta, build_once
from tpresearch.data.corpus import Corpus, open_corpus
from tpresearch.data.packed import PackedCorpus, write_rows
from tpresearch.data.progress import stage
from tpresearch.data.split import choose_split
from tpresearch.data.streams import read_stream, write_streams
from tpresearch.data.synthetic import AnyCorpus, Synthetic
from tpresearch.data.tokenizer import Tokenizer, byte_level, load_hf, train_bpe

log = logging.getLogger(__name__)

FORMAT = 1
"""Part of every folder's name: raise it when what is written changes."""

LEARN_FROM_CHARS = 128 << 20
"""A BPE learns from no more text than this: more changes few merges, and costs memory."""

CHARS_PER_TOKEN = 4
"""About what a BPE of 4,096 to 32,000 entries makes of English and code."""

TOKENIZER_FILE = "tokenizer.json"


def prepare(data: DataConfig, tokenizer: TokenizerConfig, progress: bool = False) -> AnyCorpus:
    """The corpus of a config: packed rows, prepared if they are not in the cache yet, or synthetic ones.

    Every rank may call this at once: one process per host prepares, the others wait for it.

    Args:
        progress: draw progress bars on stderr, if that is a terminal and this process does the work.

    Raises:
        ConfigError: for text that cannot be read after all (a bad line, a hub that went away) or is not
            there.
    """
    if data.source.is_synthetic:
        return Synthetic.of(data, tokenizer)
    return _Preparation(data, tokenizer, progress).rows()


class _Preparation:
    """The three stages for one config, each asking the one before only when it must build."""

    def __init__(self, data: DataConfig, tokenizer: TokenizerConfig, progress: bool) -> None:
        self.data, self.progress = data, progress
        self.vocab_size = tokenizer.vocab_size
        self.cache = Path(data.cache_dir).expanduser()
        self.corpus: Corpus = open_corpus(data)
        self.foreign = load_hf(str(tokenizer.path)) if tokenizer.kind is TokenizerKind.hf else None

        learned = (self.corpus.content_hash, data.held_out_every, self._learn_from_chars(), self.vocab_size)
        self.bpe_key = fingerprint("bpe", *learned)
        tokenizer_key = self.foreign.hash if self.foreign else self.bpe_key
        corpus = (self.corpus.content_hash, data.held_out_every, data.max_tokens)
        self.tokens_key = fingerprint("tokens", *corpus, tokenizer_key)
        self.rows_key = fingerprint("rows", self.tokens_key, data.seq_len)

    def rows(self) -> PackedCorpus:
        folder = self._folder("rows", self.rows_key)
        packed = PackedCorpus.open(folder, build_once(folder, self._pack))
        if len(packed.held_out) == 0:
            tokens = packed.meta["held_out"]["tokens"]
            log.warning(
                "the %d held-out tokens fill no row of %d: nothing to evaluate on", tokens, self.data.seq_len
            )
        return packed

    def _pack(self, growing: Path) -> Meta:
        folder = self._folder("tokens", self.tokens_key)
        meta = build_once(folder, self._tokenize)
        row_tokens = self.data.seq_len + 1
        parts = {}
        with stage(f"packing rows of {row_tokens} tokens", None, self.progress) as advance:
            for part in ("train", "held_out"):
                tokens = read_stream(folder, part, meta["dtype"])
                parts[part] = {**meta[part], "rows": write_rows(growing / part, tokens, row_tokens)}
                advance(tokens.nbytes)
        (growing / TOKENIZER_FILE).write_bytes((folder / TOKENIZER_FILE).read_bytes())
        return {**meta, **parts, "seq_len": self.data.seq_len}

    def _tokenize(self, growing: Path) -> Meta:
        tokenizer = self.foreign or self._bpe()
        text = self._split()
        with stage("tokenizing", self._total_bytes(), self.progress) as advance:
            counts = write_streams(growing, text, tokenizer, self.data.max_tokens, advance)
        if counts["train"]["tokens"] == 0:
            raise ConfigError(
                "data.path", self.data.path, "no text in it", "files or records with text in them"
            )
        tokenizer.save(growing / TOKENIZER_FILE)
        return {
            "format": FORMAT,
            "source": str(self.data.source),
            "corpus_hash": self.corpus.content_hash,
            "held_out_every": self.data.held_out_every,
            "python": platform.python_version(),
            "tokenizer_hash": tokenizer.hash,
            "vocab_size": tokenizer.size,
            "eos_id": tokenizer.eos_id,
            **counts,
        }

    def _bpe(self) -> Tokenizer:
        folder = self._folder("tokenizers", self.bpe_key)
        build_once(folder, self._train_bpe)
        return byte_level(HfTokenizer.from_file(str(folder / TOKENIZER_FILE)))

    def _train_bpe(self, growing: Path) -> Meta:
        budget = self._learn_from_chars()

        def texts(remaining: int) -> Iterator[str]:
            for train, _ in self._split():
                if remaining <= 0:
                    return
                advance(len(train))
                yield train[:remaining]
                remaining -= len(train)

        what = f"learning a BPE of {self.vocab_size:,} entries"
        with stage(what, self._total_bytes(), self.progress) as advance:
            tokenizer = train_bpe(texts(budget), self.vocab_size)
        if tokenizer.size < self.vocab_size:
            log.warning(
                "the text has only %d tokens to learn, of %d asked for", tokenizer.size, self.vocab_size
            )
        tokenizer.save(growing / TOKENIZER_FILE)
        return {"format": FORMAT, "corpus_hash": self.corpus.content_hash, "vocab_size": tokenizer.size}

    def _split(self) -> Iterator[tuple[str, str]]:
        """Each document as (train text, held-out text), in order."""
        split = choose_split(self.corpus.documents(), self.data.held_out_every, self._asked_chars())
        return (split(document) for document in self.corpus.documents())

    def _learn_from_chars(self) -> int:
        """No more text than will be read anyway, so that streaming fetches little twice."""
        return min(LEARN_FROM_CHARS, self._asked_chars() or LEARN_FROM_CHARS)

    def _asked_chars(self) -> int | None:
        """About the text that makes data.max_tokens."""
        return self.data.max_tokens and self.data.max_tokens * CHARS_PER_TOKEN

    def _total_bytes(self) -> int | None:
        """About what a pass reads, for a progress bar."""
        limits = [self.corpus.size_bytes, self._asked_chars()]
        return min((limit for limit in limits if limit is not None), default=None)

    def _folder(self, kind: str, key: str) -> Path:
        return self.cache / kind / f"{self.data.source}-{key}"


def fingerprint(*parts: object) -> str:
    """16 hex digits over what a folder is made from, and the version of its format."""
    return hashlib.blake2b(json.dumps([FORMAT, *parts]).encode(), digest_size=8).hexdigest()
