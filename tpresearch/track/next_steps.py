"""What to type after a run: what was typed for it with one thing changed, and nothing that would be refused."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpresearch.launch.command import Command, Objection, mended, override_key
from tpresearch.track.shown import path_text

OTHER_PLANS = {"fsdp_tp": 4, "fsdp": 2, "tp": 2, "ddp": 2}
"""Plans to see beside the one that ran, and of how many ranks each makes use of all that it is named for."""
OF_ONE_RUN = ("resume", "hydra.run.dir", "hydra.mode", "world_size")
"""Keys that another run does not share."""
LOOK = "plan_only=true model=llama2_7b tokenizer=bpe_32k mesh.tp=8 world_size=64"


@dataclass(frozen=True)
class NextSteps:
    """Commands to follow a run.

    Args:
        command: the one that started it.
        objection: judges a command before it is proposed.
    """

    command: Command
    objection: Objection

    def after(self, summary: Mapping[str, Any], run_dir: Path) -> list[tuple[str, str]]:
        """Commands, and what each is for."""
        return [
            *self._under_another_plan(summary["parallel"], max(summary["world_size"], 2)),
            (
                shown(dataclasses.replace(self.command, arguments=tuple(LOOK.split()), ranks=None, hosts=1)),
                "how 64 ranks would share 7B, compiled here",
            ),
            (f"cat {path_text(run_dir)}/plan.txt", "what each rank holds, and what it sends"),
        ]

    def to_go_on(self, run_dir: Path) -> str:
        """The command that goes on where the run was stopped; one that starts it again where it has no checkpoint."""
        if not any((run_dir / "checkpoints").glob("step-*")):
            return shown(self.command)
        return shown(dataclasses.replace(self.command, arguments=(f"resume={path_text(run_dir)}",)))

    def _under_another_plan(self, plan: str, ranks: int) -> Iterator[tuple[str, str]]:
        typed = [word for word in self.command.arguments if not _is_left_out(word)]
        hosts = self.command.hosts
        for other in (name for name, least in OTHER_PLANS.items() if name != plan and ranks >= least):
            again = Command(tuple(mended(typed, {"parallel": other})), ranks // hosts, hosts)
            if self.objection(again) is None:
                yield shown(again), "the same training under another plan: the losses agree"
                plans = ",".join(dict.fromkeys(["none", plan, other]))
                sweep = Command(("-m", *mended(typed, {"parallel": plans, "world_size": ranks})))
                if hosts == 1 and self.objection(sweep) is None:
                    why = "side by side, in one table, with the command that draws them"
                    yield shown(sweep), why
                return


def _is_left_out(word: str) -> bool:
    key = override_key(word)
    return key in OF_ONE_RUN or key.startswith("mesh") or word in ("-m", "--multirun")


def shown(command: Command) -> str:
    """A command as it is typed from here: with `.venv/bin/torchrun`, or the bare name."""
    starter, _, rest = str(command).partition(" ")
    path = Path(sys.executable).with_name(starter)
    here = path_text(path) if path.is_relative_to(Path.cwd()) and path.exists() else starter
    return f"{here} {rest}"
