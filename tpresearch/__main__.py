"""`tpresearch COMMAND ...`: every `python -m tpresearch.COMMAND` by its name, from any folder."""

from __future__ import annotations

import os
import runpy
import sys
from importlib.metadata import version
from pathlib import Path

from tpresearch import interrupt
from tpresearch.config.near_names import nearest
from tpresearch.launch.command import WrongCommand
from tpresearch.launch.options import command

COMMANDS = {
    "train": "train the composed config; on several ranks: torchrun --nproc-per-node=4 -m tpresearch.train",
    "verify": "compare parallel plans with the same training in a single process",
    "compare": "compare runs side by side: a table, an HTML page, PNGs",
    "simulate": "predict time and memory of a step on any cluster, without its GPUs",
    "planner": "rank all legal plans and meshes for a cluster",
    "calibrate": "measure this machine and write a cluster file",
    "prepare": "tokenize and pack the data ahead of time",
    "checkpoints": "list a run's checkpoints and whether each is complete",
    "export": "write a checkpoint as a Hugging Face model",
    "import_hf": "write a Hugging Face model as a checkpoint",
    "dashboard": "save a W&B workspace that compares the runs of a group",
}
"""Each is a module of this name in the package."""
HELP = """Each command has --help and also runs as `python -m tpresearch.COMMAND`.
Completion of groups, options and keys, in bash: eval "$(tpresearch completion)\""""


def main() -> None:
    """The console script: exit codes are those of the command."""
    command(_dispatch)


def _dispatch() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        listed = "\n".join(f"  {name:<12}  {what}" for name, what in COMMANDS.items())
        print(f"tpresearch COMMAND [key=value ...]\n\n{listed}\n\n{HELP}")
    elif name == "--version":
        print(version("tpresearch"))
    elif name == "completion":
        print(Path(__file__).with_name("completion.bash").read_text(), end="")
    elif name in COMMANDS:
        sys.argv[1:] = arguments
        interrupt.exit_on_interrupt()
        if not sys.flags.safe_path:
            sys.path.append(os.getcwd())  # where `python -m` finds a model of one's own too
        runpy.run_module(f"tpresearch.{name}", run_name="__main__", alter_sys=True)
    else:
        legal, (best, *_) = f"one of {' '.join(COMMANDS)}", nearest(name, COMMANDS)
        raise WrongCommand("command", name, "no such command", legal, f"tpresearch {best} --help")


if __name__ == "__main__":
    main()
