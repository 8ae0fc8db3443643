"""The home folder, which `~` stands for in paths of a config and of libraries, and the folder that relative paths begin at."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tpresearch.config.world import World
from tpresearch.launch.command import Command, WrongCommand


def check_home(world: World) -> None:
    """Count an empty HOME as none, as a shell's `~` does not: the cache would be in `/.cache`. Refuses a user without a home folder,
    such as a container's that no file of users lists, and a process in a folder that was deleted.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        why = "this folder was deleted, whether or not there is a new one of its name"
        raise WrongCommand("PWD", os.environ.get("PWD"), why, "a folder that is there", "cd ~") from None
    if os.environ.get("HOME"):
        return
    os.environ.pop("HOME", None)
    if os.path.expanduser("~") == "~":
        why = "this user has no home folder, where caches and keys are looked for"
        home = Path(tempfile.gettempdir()) / f"home-{os.getuid()}"
        command = f"env HOME={home} {Command.from_argv(world)}"
        raise WrongCommand("HOME", "", why, "a folder that this user can write", command)
