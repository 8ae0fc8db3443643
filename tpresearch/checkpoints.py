"""`python -m tpresearch.checkpoints RUN [verify=true]`: list a run's checkpoints and whether each is complete.

Step, loss, plan and mesh, size of each; exit code 1 if one is not complete.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tpresearch.checkpoint.disk import (
    BrokenCheckpoint,
    Checkpoint,
    find_damage,
    read_checkpoint,
    step_folders,
)
from tpresearch.checkpoint.resume import run_of
from tpresearch.config.errors import ConfigError
from tpresearch.launch.command import WrongCommand, python_command
from tpresearch.launch.options import command, words_and_options
from tpresearch.track.table import Cell, Table
from tpresearch.track.text import UNDEFINED, bytes_text, count_text, loss_text, path_text


@dataclass
class Options:
    verify: bool = False
    """Read every byte and compare checksums; by default only checkpoint.json and the sizes of files."""


def main() -> None:
    arguments = sys.argv[1:]
    named, options = words_and_options(Options, arguments)
    if len(named) != 1:
        why, legal = "not one folder", "one run, or one of its checkpoints"
        again = python_command(["RUN", *(word for word in arguments if word not in named)])
        raise WrongCommand("run", " ".join(named), why, legal, again)
    run = run_of(Path(named[0]))
    try:
        folders = step_folders(run)
    except OSError as error:
        why, legal = f"cannot be read: {error.strerror}", "a folder that this user can read"
        raise ConfigError("run", named[0], why, legal) from None
    if not folders:
        why = "it has no checkpoint" if run.is_dir() else "there is no such folder"
        legal = "the folder of a run that has saved one"
        raise WrongCommand("run", named[0], why, legal, python_command(["RUN"]))
    found = [whole_or_why(folder, options.verify) for folder in folders]
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(table(folders, found).rich(f"checkpoints of {path_text(run)}"))
    sys.exit(any(isinstance(each, str) for each in found))


def whole_or_why(folder: Path, verify: bool) -> Checkpoint | str:
    """The checkpoint in a folder; or what is wrong with it, in one line."""
    try:
        checkpoint = read_checkpoint(folder)
    except BrokenCheckpoint as error:
        return str(error)
    return (find_damage(folder, checkpoint.manifest.files.items()) if verify else None) or checkpoint


def table(folders: list[Path], found: list[Checkpoint | str]) -> Table:
    rows = []
    for folder, each in zip(folders, found, strict=True):
        step = str(int(folder.name.removeprefix("step-")))
        if isinstance(each, str):
            cells = [step, *[UNDEFINED] * 6, f"no: {each}"]
        else:
            manifest = each.manifest
            tokens, loss = count_text(manifest.tokens), loss_text(manifest.loss)
            plan = " ".join([manifest.plan, *(f"{axis}={size}" for axis, size in manifest.mesh.items())])
            ranks, size = str(manifest.world_size), bytes_text(each.bytes)
            cells = [step, tokens, loss, plan, ranks, size, manifest.torch, "yes"]
        rows.append(list(map(Cell, cells)))
    return Table(["step", "tokens", "loss", "plan", "ranks", "size", "torch", "complete"], rows)


if __name__ == "__main__":
    command(main, Options)
