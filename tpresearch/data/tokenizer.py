"""From text to token ids and back: a byte-level BPE trained here, or any Hugging Face tokenizer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from tpresearch.config.errors import ConfigError

EOS = "<|endoftext|>"
COMMON_EOS = ("</s>", EOS, "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>", "[EOS]")
LEGAL_PATH = "a tokenizer.json, a folder that holds one, or a name on the hub"

# A tokenizer has as many threads as there are texts to encode at once, so long ones are cut.
# Before an ASCII blank that follows something else, no byte-level BPE word can span the cut: the ids stay the
# same.
CUT = re.compile(r"(?<=\S)(?=[ \t\r\n])")
PIECE_CHARS = 1 << 16
# Other tokenizers may mark the start of a text; there only what would not fit in memory is cut.
FOREIGN_PIECE_CHARS = 1 << 22


class Tokenizer:
    """Token ids of texts.

    Attributes:
        size: entries, such that every id is below it.
        eos_id: the token that ends each document.
        hash: 16 hex digits over the whole tokenizer.
    """

    def __init__(self, backend: HfTokenizer, eos_id: int, piece_chars: int = FOREIGN_PIECE_CHARS) -> None:
        # Files often carry the truncation and padding of the model they were made for; documents must stay
        # whole.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # "</s>" written in a document is text, not its end
        self.backend, self.eos_id, self.piece_chars = backend, eos_id, piece_chars
        self.size = entries(backend)
        self.hash = hashlib.blake2b(f"{eos_id}\0{backend.to_str()}".encode(), digest_size=8).hexdigest()

    def encode(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text, without special tokens."""
        pieces = [cut(text, self.piece_chars) for text in texts]
        flat = self.backend.encode_batch_fast([p for some in pieces for p in some], add_special_tokens=False)
        ids = iter(np.array(encoding.ids, dtype=np.uint32) for encoding in flat)
        return [np.concatenate([next(ids) for _ in some]) for some in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.backend.decode([int(token) for token in ids], skip_special_tokens=False))

    def save(self, path: Path) -> None:
        self.backend.save(str(path))


def cut(text: str, piece_chars: int) -> list[str]:
    """The text in pieces of about `piece_chars` characters, each ending before a blank."""
    edges = [0]
    while edges[-1] + piece_chars < len(text) and (blank := CUT.search(text, edges[-1] + piece_chars)):
        edges.append(blank.start())
    return [text[a:b] for a, b in pairwise([*edges, len(text)])]


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
    backend.train_from_iterator((piece for text in texts for piece in cut(text, PIECE_CHARS)), trainer)
    return byte_level(backend)


def byte_level(backend: HfTokenizer) -> Tokenizer:
    """The tokenizer around a BPE that `train_bpe` made."""
    eos_id = backend.token_to_id(EOS)
    assert eos_id is not None
    return Tokenizer(backend, eos_id, PIECE_CHARS)


def load_hf(path: str) -> Tokenizer:
    """A Hugging Face tokenizer: a tokenizer.json, a folder, or a hub id. Its code is never run.

    Raises:
        ConfigError: for a path that holds no tokenizer, or a tokenizer without an end-of-text token.
    """
    backend, settings = _backend(path), _settings(path)
    stated = settings.get("eos_token")
    stated = stated.get("content") if isinstance(stated, dict) else stated
    candidates = [stated] if stated else COMMON_EOS
    eos_id = next((found for eos in candidates if (found := backend.token_to_id(eos)) is not None), None)
    if eos_id is None:
        raise ConfigError(
            "tokenizer.path",
            path,
            "this tokenizer has no end-of-text token",
            f"one whose tokenizer_config.json names its eos_token, or that has one of {' '.join(COMMON_EOS)}",
            {"tokenizer": "bpe", "tokenizer.path": None},
        )
    return Tokenizer(backend, eos_id)


def tokenizer_size(path: str) -> int:
    """Entries of the tokenizer at `path`, added tokens included: what the embedding of a model must have.

    Raises:
        ConfigError: for a path that holds no tokenizer.
    """
    return entries(_backend(path))


def entries(backend: HfTokenizer) -> int:
    vocabulary = backend.get_vocab(with_added_tokens=True)
    return max(len(vocabulary), max(vocabulary.values(), default=-1) + 1)  # ids may have gaps


def _backend(path: str) -> HfTokenizer:
    local = Path(path).expanduser()
    file = local / "tokenizer.json" if local.is_dir() else local
    if file.is_file():
        try:
            return HfTokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            why = f"not a tokenizer.json: {str(error).splitlines()[0]}"
            raise ConfigError("tokenizer.path", path, why, LEGAL_PATH) from None
    if not local.is_dir() and not looks_like_hub_id(path):
        raise ConfigError("tokenizer.path", path, "there is no such file", LEGAL_PATH, {"tokenizer": "bpe"})
    return _through_transformers(path, is_folder=local.is_dir())


def looks_like_hub_id(path: str) -> bool:
    """Whether a path that is not there could be `owner/name` on the hub."""
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path)) and not path.endswith(
        (".json", ".model")
    )


def _through_transformers(path: str, is_folder: bool) -> HfTokenizer:
    """What has no tokenizer.json at hand: older formats are converted, and hub ids are downloaded."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        why = "holds no tokenizer.json, and transformers, which could convert it, is not installed"
        raise ConfigError(
            "tokenizer.path", path, why, "pip install 'tpresearch[hf]', or a tokenizer.json"
        ) from None
    if not is_folder:
        from tpresearch.data.hub import offline_unless_reachable

        offline_unless_reachable()
    try:
        loaded: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a dozen kinds, by format and by what the network did
        why = f"no tokenizer could be loaded: {type(error).__name__}: {str(error).splitlines()[0]}"
        raise ConfigError("tokenizer.path", path, why, LEGAL_PATH, {"tokenizer": "bpe"}) from None
    if not getattr(loaded, "is_fast", False):
        raise ConfigError("tokenizer.path", path, "exists in Python only, too slow for a corpus", LEGAL_PATH)
    return loaded.backend_tokenizer


def _settings(path: str) -> dict[str, Any]:
    """tokenizer_config.json from beside the tokenizer, or an empty dict."""
    local = Path(path).expanduser()
    if not local.exists():
        from transformers import AutoTokenizer

        return {"eos_token": AutoTokenizer.from_pretrained(path, trust_remote_code=False).eos_token}
    file = (local if local.is_dir() else local.parent) / "tokenizer_config.json"
    try:
        settings = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError:
        settings = {}
    return settings if isinstance(settings, dict) else {}
