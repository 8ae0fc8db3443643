"""From text to token ids and back: a byte-level BPE trained here, or any Hugging Face tokenizer."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from tpresearch.config.errors import ConfigError, first_line, one_line
from tpresearch.config.schema import TokenizerConfig, TokenizerKind
from tpresearch.data.documents import Parts
from tpresearch.data.hub import download, looks_like_hub_id
from tpresearch.data.sources import hash_text

EOS = "<|endoftext|>"
COMMON_EOS = ("</s>", EOS, "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")
TOKENIZER_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
TOKEN_FILES, MODEL_FILES = (
    (SETTINGS_FILE, "special_tokens_map.json"),
    ("config.json", "generation_config.json"),
)
"""Files that name special tokens by their text, and by their ids."""
KEPT_FILES = ("tokenizer*", "*.model", "vocab*", "merges.txt", "special_tokens_map.json", "chat_template*")
"""Files of a folder that a tokenizer may need."""
HUB_FILES = (*KEPT_FILES, *MODEL_FILES)
"""Files of a hub repository that a tokenizer may need: older formats name their kind in config.json."""
TOKENIZER_FOLDER = "tokenizer"
"""Folder of a run with its tokenizer, as transformers reads it."""
LEGAL_PATH = "a tokenizer.json, a folder that holds one, or a name on the hub"
LONG_WORD = re.compile(r"\S{1000}|\s{1000}")
"""Training time grows with the square of a word's length: a megabyte of base64, or of blanks, would take half an hour."""
SAMPLE = "A sample: naïve 数据 🙂\n\t0"

# A tokenizer uses as many threads as there are texts to encode at once, so long texts are cut.
# Before an ASCII blank that follows something else, no byte-level BPE word can span the cut: the ids stay the same.
CUT_POINT = re.compile(r"(?<=\S)(?=[ \t\r\n])")
PIECE_CHARS = 1 << 16
# Other tokenizers may mark the start of a text; there only what would not fit in memory is cut.
HF_PIECE_CHARS = 1 << 22
MAX_CUT_PIECES = 4
"""A text without a blank for this many pieces is cut anyway: it has no words."""


class Tokenizer:
    """Token ids of texts.

    Attributes:
        size: entries, such that every id is below it.
        eos_id: the token that ends each document.
        piece_chars: of the pieces that a document is cut into before it is encoded.
        hash: 16 hex digits over the whole tokenizer.
    """

    def __init__(self, backend: HfTokenizer, eos_id: int, piece_chars: int = HF_PIECE_CHARS) -> None:
        # Files often carry the truncation and padding of the model they were made for; documents stay whole.
        backend.no_truncation()
        backend.no_padding()
        if isinstance(backend.model, models.BPE):
            backend.model.dropout = None  # by which a text has other tokens each time
        backend.encode_special_tokens = True  # "</s>" written in a document is text, not its end
        self.backend, self.eos_id, self.piece_chars = backend, eos_id, piece_chars
        self.size = vocabulary_size(backend)
        self.hash = hash_text(f"{eos_id}\0{backend.to_str()}")

    def encode(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text, without special tokens."""
        encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(each.ids, dtype=np.uint32) for each in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.backend.decode([int(token) for token in ids], skip_special_tokens=False))

    def save(self, path: Path) -> None:
        path.write_text(self.backend.to_str(pretty=True), encoding="utf-8")  # its own save raises no OSError

    def lost_chars(self, text: str) -> int:
        """Characters of a text, except blanks, that no token represents, or only the unknown token."""
        model = json.loads(self.backend.to_str())["model"]
        unknown = model.get("unk_id")  # Unigram's; the others name theirs
        if unknown is None:
            unknown = self.backend.token_to_id(model.get("unk_token") or "")
        kept = np.zeros(len(text), bool)
        encoding = self.backend.encode(text, add_special_tokens=False)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            kept[start:end] |= token != unknown
        return sum(not char.isspace() for char, there in zip(text, kept, strict=True) if not there)


def cut_text(text: str, piece_chars: int) -> list[str]:
    """The text in pieces of about `piece_chars` characters, each ending before a blank, if one comes soon."""
    edges = [0]
    while (start := edges[-1] + piece_chars) < len(text):
        blank = CUT_POINT.search(text, start, start + MAX_CUT_PIECES * piece_chars)
        if blank is None and start + MAX_CUT_PIECES * piece_chars >= len(text):
            break
        edges.append(blank.start() if blank else start + MAX_CUT_PIECES * piece_chars)
    return [text[a:b] for a, b in pairwise([*edges, len(text)])]


def cut_parts(parts: Parts, piece_chars: int) -> Iterator[str]:
    """The pieces of `cut_text`, of a text in parts."""
    left = ""
    for part in parts:
        *pieces, left = cut_text(left + part, piece_chars)
        yield from pieces
    if left:
        yield left


def without_long_words(text: str) -> Iterator[str]:
    start = 0
    for word in LONG_WORD.finditer(text):
        yield text[start : word.end()]
        start = word.end()
    yield text[start:]


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` entries: the end of text, the bytes, and merges of `texts`."""
    backend = HfTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for text in texts for piece in cut_text(text, PIECE_CHARS))
    backend.train_from_iterator((words for piece in pieces for words in without_long_words(piece)), trainer)
    return byte_level(backend)


def byte_level(backend: HfTokenizer) -> Tokenizer:
    """The tokenizer around a BPE that `train_bpe` made."""
    eos_id = backend.token_to_id(EOS)
    assert eos_id is not None
    return Tokenizer(backend, eos_id, PIECE_CHARS)


def load_hf(path: str | None) -> Tokenizer:
    """A Hugging Face tokenizer: a tokenizer.json, a folder, or a hub id. Its code is never run.

    The end-of-text token is the one that a file beside it names, or else the one that has a common name.

    Raises:
        ConfigError: for a path that holds no tokenizer, or a tokenizer without an end-of-text token or with several, or
            that fails on a sample of text.
    """
    backend, folder = _load(path)
    eos_id = _end_of_text(backend, folder, path)
    tokenizer = Tokenizer(backend, eos_id)
    try:
        tokenizer.encode([SAMPLE])
    except Exception as error:  # the library raises bare Exceptions
        why = f"this tokenizer cannot encode {SAMPLE!r}: {first_line(error)}"
        raise _path_error(path, why, "one that can encode any text") from None
    return tokenizer


def _end_of_text(backend: HfTokenizer, folder: Path, path: str | None) -> int:
    if stated := _special_token(folder, "eos_token"):
        found = [backend.token_to_id(stated)]
    else:
        of_model = (_read_json(folder / name).get("eos_token_id") for name in MODEL_FILES)
        firsts = (ids[0] if isinstance(ids, list) and ids else ids for ids in of_model)
        ids = (i for i in firsts if isinstance(i, int) and i >= 0 and backend.id_to_token(i) is not None)
        found = [*islice(ids, 1)] or [backend.token_to_id(eos) for eos in COMMON_EOS]
    known = [i for i in found if i is not None]
    if len(known) == 1:
        return known[0]
    several = " ".join(str(backend.id_to_token(i)) for i in known)
    why = f"nothing says which token ends a text: {several}" if several else "it has no end-of-text token"
    raise _path_error(path, why, f"a tokenizer with a {SETTINGS_FILE} beside it that names its eos_token")


def save_tokenizer(tokenizer: Tokenizer, config: TokenizerConfig, run: Path) -> None:
    """Save the tokenizer in a run's folder as transformers reads it: `AutoTokenizer.from_pretrained(RUN/tokenizer)`.

    Args:
        config: of the tokenizer. A Hugging Face tokenizer's other files are copied from the path that it names.
    """
    folder = run / TOKENIZER_FOLDER
    folder.mkdir(exist_ok=True)
    if config.kind is TokenizerKind.hf:
        _, home = _load(config.path)
        for path in {path for pattern in KEPT_FILES for path in home.glob(pattern) if path.is_file()}:
            _copy(path, folder / path.name)
        if (named := Path(os.path.expanduser(str(config.path)))).is_file():  # beside which may be another
            _copy(named, folder / TOKENIZER_FILE)
    if not (folder / TOKENIZER_FILE).exists():
        tokenizer.save(folder / TOKENIZER_FILE)
    if _special_token(folder, "eos_token") is None:
        defaults = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        eos = tokenizer.backend.id_to_token(tokenizer.eos_id)
        settings = (_read_json(folder / SETTINGS_FILE) or defaults) | {"eos_token": eos}
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def _copy(path: Path, kept: Path) -> None:
    with suppress(shutil.SameFileError):  # where the run's own folder has it
        shutil.copyfile(path, kept)


def special_ids(folder: Path) -> tuple[int | None, int | None]:
    """The ids of the begin-of-text token, if its settings name one, and of the end-of-text token.

    Raises:
        ConfigError: as `load_hf`.
    """
    tokenizer = load_hf(str(folder))
    bos = _special_token(folder, "bos_token")
    return tokenizer.backend.token_to_id(bos) if bos else None, tokenizer.eos_id


def tokenizer_size(path: str | None) -> int:
    """Entries of the tokenizer at `path`, added tokens included: what the embedding of a model must have.

    Raises:
        ConfigError: for a path that holds no tokenizer.
    """
    return vocabulary_size(_load(path)[0])


def vocabulary_size(backend: HfTokenizer) -> int:
    vocabulary = backend.get_vocab(with_added_tokens=True)
    return max(len(vocabulary), max(vocabulary.values(), default=-1) + 1)  # ids may have gaps


def _load(path: str | None) -> tuple[HfTokenizer, Path]:
    """The tokenizer of a path, and the folder with its other files; those of a hub id are downloaded."""
    if not path:
        raise _path_error(path, "no tokenizer is named")
    local = Path(os.path.expanduser(path))
    if not local.exists():
        if not looks_like_hub_id(path):
            raise _path_error(path, "there is no such file")
        local = download(path, HUB_FILES, lambda why: _path_error(path, why))
    file = local / TOKENIZER_FILE if local.is_dir() else local
    try:
        backend = HfTokenizer.from_file(str(file)) if file.is_file() else _converted(path, file.parent)
    except ConfigError:
        raise
    except Exception as error:  # the library raises bare Exceptions
        raise _path_error(path, f"no tokenizer could be loaded: {first_line(error)}") from None
    return backend, file.parent


def _converted(path: str, folder: Path) -> HfTokenizer:
    """The tokenizer of a folder without tokenizer.json, in one of the older formats."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        why = "holds no tokenizer.json, and transformers, which could convert it, is not installed"
        raise _path_error(path, why, "a tokenizer.json, or pip install 'tpresearch[hf]'") from None
    try:
        loaded: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a dozen kinds
        why = f"holds no tokenizer.json, and transformers cannot convert its other files: {one_line(error)}"
        legal = f"{LEGAL_PATH}; of vocab.json and merges.txt, a tokenizer_config.json beside them with a tokenizer_class, such as GPT2Tokenizer"
        raise _path_error(path, why, legal) from None
    if not getattr(loaded, "is_fast", False):
        raise _path_error(path, "exists in Python only, too slow for a corpus")
    backend: HfTokenizer = loaded.backend_tokenizer
    return backend


def _path_error(path: str | None, why: str, legal: str = LEGAL_PATH) -> ConfigError:
    return ConfigError("tokenizer.path", path, why, legal, {"tokenizer": "bpe", "tokenizer.path": None})


def _special_token(folder: Path, role: str) -> str | None:
    """The token that has this role by the files of a folder: written as its text, or as an object with its text in `content`."""
    for name in TOKEN_FILES:
        token = _read_json(folder / name).get(role)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text:
            return text
    return None


def _read_json(path: Path) -> dict[str, Any]:
    """A file's object, or an empty dict."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
