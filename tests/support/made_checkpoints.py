"""Checkpoints of two small files, made without torch."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from tpresearch.checkpoint import disk
from tpresearch.checkpoint.disk import Manifest, folder_of

ABOUT = Manifest(
    step=0,
    tokens=0,
    loss=5.5,
    experiment={"optimizer": {"lr": 0.003}},
    steps=100,
    corpus_hash="c",
    tokenizer_hash="t",
    rows=64,
    plan="tp",
    mesh={"tp": 2},
    world_size=2,
    torch="2.13.0",
)


def save(run: Path, step: int, world_size: int = ABOUT.world_size) -> Path:
    """A checkpoint of two small files, made as `Saver` makes one."""
    folder = folder_of(run, step)
    draft = disk.draft_of(folder)
    disk.make_draft(draft)
    for name in ("__0_0.distcp", ".metadata"):
        (draft / name).write_bytes(os.urandom(100))
    files = {path.name: disk.sync_and_checksum(path) for path in draft.iterdir()}
    disk.commit(folder, dataclasses.replace(ABOUT, step=step, world_size=world_size, files=files))
    return folder
