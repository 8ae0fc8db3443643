"""Refuses credentials in configs, which go into files and to W&B, and on command lines, which error messages repeat."""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tpresearch.config.errors import ConfigError

CREDENTIAL_NAME = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)($|_)", re.IGNORECASE)
"""Names of variables and of config keys that hold credentials."""
MIN_LENGTH = 12
"""Minimum length of a credential in characters; a shorter value may well occur in a config."""
PATTERNS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "a W&B key": r"\bwandb_v\d_[A-Za-z0-9_]{20,}|\blocal-[0-9a-f]{40}\b",
    "a GitHub token": r"\b(gh[pousr]_|github_pat_)[A-Za-z0-9_]{20,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}|\bAKIA[0-9A-Z]{16}\b|\bxox[abpr]-[A-Za-z0-9-]{10,}",
    "a signed token": r"\beyJ[\w-]{10,}\.[\w-]{10,}\.",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a password in an address": r"://[^/\s:@]+:[^/\s:@]{3,}@",
}
LEGAL = "the environment or a login, where the library that needs it looks"


def refuse_secrets(config: Any) -> None:
    """Refuse a config, or any part of one, that holds a credential, naming the key and what it holds, never the value."""
    known = dict(_known_credentials())
    for key, text in _leaves(config):
        if what := _find_credential(key, text, known):
            raise ConfigError(key, "...", f"holds {what}, which would be written to the run's record", LEGAL)


def words_without_secrets(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """The words of a command line that hold none; of the others the keys, and what each holds."""
    known = dict(_known_credentials())
    kept, found = [], {}
    for word in words:
        key = word.partition("=")[0].lstrip("+~")
        if what := _find_credential(key, word, known):
            found["..." if _find_credential("", key, known) else key] = what
        else:
            kept.append(word)
    return kept, found


def _find_credential(key: str, text: str, known: Mapping[str, str]) -> str | None:
    value = text.rpartition("=")[2].strip("'\"")
    of_key = CREDENTIAL_NAME.search(key.rpartition(".")[2]) and len(value) >= MIN_LENGTH and "${" not in value
    found = [what for value, what in known.items() if value in text]
    found += [f"what looks like {kind}" for kind, shape in PATTERNS.items() if re.search(shape, text)]
    found += ["what its name says is a credential"] if of_key else []
    return next(iter(found), None)


def _known_credentials() -> Iterator[tuple[str, str]]:
    """Each credential that can be found from here, and what it is."""
    for name, value in os.environ.items():
        if CREDENTIAL_NAME.search(name) and len(value) >= MIN_LENGTH:
            yield value, f"the value of ${name}"
    with suppress(OSError, netrc.NetrcParseError, RuntimeError):  # which says that there is no home folder
        accounts = netrc.netrc(os.environ.get("NETRC") or Path("~/.netrc").expanduser())
        for host, (_, _, password) in accounts.hosts.items():
            if password and len(password) >= MIN_LENGTH:
                yield password, f"the password of {host} in the netrc file"
    with suppress(OSError, UnicodeDecodeError, RuntimeError):
        home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
        token = Path(os.environ.get("HF_TOKEN_PATH") or home / "token").read_text(encoding="utf-8").strip()
        if len(token) >= MIN_LENGTH:
            yield token, "the Hugging Face token of this user"


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each dotted key and its text; keys are text too."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield prefix + "...", str(key)
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _leaves(value, prefix)
    elif isinstance(node, str):
        yield prefix, str(node)
