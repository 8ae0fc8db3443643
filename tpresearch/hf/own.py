"""A run or checkpoint of ours where `model=hf` expects a Hugging Face folder: the sizes of its model, and its tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tpresearch.checkpoint.disk import NAME, step_folders
from tpresearch.checkpoint.resume import find_checkpoint, run_of
from tpresearch.config.compose import model_config
from tpresearch.config.errors import ConfigError
from tpresearch.data.tokenizer import TOKENIZER_FOLDER
from tpresearch.hf.settings import NAMES

LLAMA = "tpresearch.models.llama2.Llama2"


def is_own(init_from: str) -> bool:
    """Whether this names a checkpoint of ours, or a run that has one."""
    path = Path(init_from).expanduser()
    try:
        return os.path.isdir(path) and bool(NAME.fullmatch(path.resolve().name) or step_folders(path))
    except OSError:  # said by whoever reads it
        return False


def settings_of_run(init_from: str) -> dict[str, Any]:
    """The settings of the Llama that a run or checkpoint of ours is of.

    Raises:
        ConfigError: where no checkpoint is whole, or its model is no Llama.
    """
    from tpresearch.plan.meta import all_settings  # late: it imports torch

    mark = find_checkpoint(Path(init_from), "init_from").mark
    model = model_config(mark.experiment["model"])
    if model.target != LLAMA:
        why, legal = f"its model is {model.name}, and model=hf is a Llama", f"model={model.name}"
        raise ConfigError("init_from", init_from, why, legal, fix={"model": model.name})
    settings = all_settings(model)
    return {name: settings[name] for name in NAMES}


def tokenizer_of_run(init_from: str) -> str:
    """The folder in which a run keeps its tokenizer.

    Raises:
        ConfigError: where it has none, since its data were numbers.
    """
    folder = run_of(Path(init_from)) / TOKENIZER_FOLDER
    if not folder.is_dir():
        size = find_checkpoint(Path(init_from), "init_from").mark.experiment["tokenizer"]["vocab_size"]
        fix = {"tokenizer": "bpe", "tokenizer.vocab_size": size}
        why, legal = "it keeps no tokenizer, since its data had no text", "another tokenizer beside model=hf"
        raise ConfigError("init_from", init_from, why, legal, fix=fix)
    return str(folder)
