"""Resolvers of the YAML files: `${NAME:...}` by a function, for what follows from the rank, the environment or files."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from omegaconf import OmegaConf

from tpresearch.config.world import World
from tpresearch.launch.run_dir import dated_folder


def register_resolvers() -> None:
    """Register them all, in place of those that are there."""
    new = partial(OmegaConf.register_new_resolver, replace=True)
    new("run_dir", dated_folder, use_cache=True)
    new("on_rank_zero", lambda value: value if World.from_environment().rank == 0 else None)
    new("from_env", lambda name, default=None: os.environ.get(name) or default)  # an empty one counts as none
    new("words_from_env", _words_from_env)
    new("tokenizer_size", _tokenizer_size)
    new("hugging_face", _hugging_face)
    new("tokenizer_of", _tokenizer_of)


def _words_from_env(name: str) -> list[str]:
    """The comma-separated values of an environment variable."""
    return [word.strip() for word in os.environ.get(name, "").split(",") if word.strip()]


def _tokenizer_size(path: str | None) -> int:
    from tpresearch.data.tokenizer import tokenizer_size  # late: few configs ask, and it is slow to import

    return tokenizer_size(path)


def _hugging_face(init_from: str | None, setting: str) -> Any:
    from tpresearch.hf.files import settings_of  # late: few configs ask

    return settings_of(init_from)[setting]


def _tokenizer_of(init_from: str | None) -> str | None:
    from tpresearch.hf.files import tokenizer_of  # late: few configs ask

    return tokenizer_of(init_from)
