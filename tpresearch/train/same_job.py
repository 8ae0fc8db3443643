"""Checks that all ranks are of one job, since each host has a command line, files and a Python of its own."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tpresearch.checkpoint.resume import differences
from tpresearch.config.compose import as_dict
from tpresearch.config.errors import ConfigError, WrongModel, format_value
from tpresearch.data.rows import AnyCorpus
from tpresearch.train.preflight import Preflight

PER_HOST = ("name", "resume", "logger", "data.cache_dir", "data.path", "tokenizer.path")
"""Keys that may differ between hosts: rank 0's apply, or the rows tell whether it is the same text."""


def check_same_job(job: Preflight, corpus: AnyCorpus) -> None:
    """Refuse to train if ranks have other settings, code or rows than rank 0: what each computes would be right by itself, and
    the sum of their gradients nobody's. Collective: every rank raises.
    """
    mine = _settings(job), (corpus.corpus_hash, corpus.tokenizer_hash, len(corpus.train))
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    settings_0, rows_0 = found[0]
    for rank, (settings, rows) in enumerate(found):
        for key, first, other in differences(settings_0, settings):
            if not key.startswith(PER_HOST):
                why = f"rank {rank} has {format_value(other)}"
                legal = "the same command, conf and code on every host"
                raise ConfigError(key.removesuffix(".name"), first, why, legal, fix={})
        orders = zip(settings_0["parameters"], settings["parameters"], strict=True)
        if other := next((pair for pair in orders if pair[0] != pair[1]), None):
            why = f"its parameters are in another order on rank {rank}: {other[1]} in the place of {other[0]}"
            legal = "a constructor that adds modules in the order of a list or a dict; that of a set is another in each process"
            raise WrongModel(job.cfg.model.name, why, legal)
        if rows != rows_0:
            source = corpus.meta.get("source", "this corpus")
            why = f"ranks 0 and {rank} prepared different rows from it"
            legal = "the same files and the same Python on every host, or a data.cache_dir that they share"
            raise ConfigError("data.source", source, why, legal)


def _settings(job: Preflight) -> dict[str, Any]:
    """What determines a rank's part of the steps, by key."""
    versions = {"torch": torch.__version__, "code": code_hash(job.model)}
    parameters = {name: f"{list(p.shape)} of {p.dtype}" for name, p in job.model.named_parameters()}
    settings = {**as_dict(job.cfg), "LOCAL_WORLD_SIZE": job.world.local_size, **versions}
    return settings | {"parameters": parameters}  # which may depend on other packages, or on the host


def code_hash(model: nn.Module) -> str:
    """A hash of the source files of this package and of the model: of its class's module, and of modules of the same folder that
    are used there. A notebook has none."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    digest = hashlib.blake2b(digest_size=6)
    for path in [*files, *_used_files(type(model).__module__)]:
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def _used_files(module: str) -> list[Path]:
    """The file of a module, and those beside it of modules that it has imported, or has classes and functions of, and so on."""
    folder = Path(getattr(sys.modules[module], "__file__", None) or "").parent
    found: dict[str, Path] = {}
    left = [module]
    while left:
        name = left.pop()
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is None or name in found or Path(file).parent != folder:
            continue
        found[name] = Path(file)
        for value in vars(sys.modules[name]).values():
            is_module = isinstance(value, ModuleType)
            left.append(value.__name__ if is_module else str(getattr(value, "__module__", "")))
    return [found[name] for name in sorted(found)]
