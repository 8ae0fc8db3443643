"""Commands to try after a run: its training under another plan, several plans in one table, or the run resumed."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpresearch.launch.command import Command, CommandCheck, corrected, override, override_key
from tpresearch.track.text import path_text

OTHER_PLANS = {"fsdp_tp": 4, "fsdp": 2, "tp": 2, "ddp": 2}
"""Plans to suggest for comparison, each with the number of ranks that uses all of its axes."""
RUN_ONLY_KEYS = ("resume", "hydra.run.dir", "logger.name", "hydra.mode", "world_size")
"""Keys that a command for another run leaves out."""
LARGE_PLAN = "plan_only=true model=llama2_7b tokenizer=bpe_32k mesh.tp=8 world_size=64"


@dataclass(frozen=True)
class NextSteps:
    """Commands to suggest after the run that `command` started, each validated before."""

    command: Command
    check_command: CommandCheck

    def after(self, summary: Mapping[str, Any], run_dir: Path) -> list[tuple[str, str]]:
        """Commands, each with its purpose."""
        large = format_command(Command(tuple(LARGE_PLAN.split())))
        return [
            *self._other_plan_commands(summary["parallel"], summary["world_size"]),
            (large, "how 64 ranks would shard 7B, compiled on this machine"),
            (shlex.join(["cat", path_text(run_dir / "plan.txt")]), "what each rank holds and sends"),
        ]

    def to_resume(self, run_dir: Path) -> str:
        """The command that resumes a stopped run, or restarts it if it has no checkpoint."""
        again = self.command
        if any((run_dir / "checkpoints").glob("step-*")):
            again = dataclasses.replace(again, arguments=(override("resume", path_text(run_dir)),))
        return format_command(again)

    def _other_plan_commands(self, plan: str, world: int) -> Iterator[tuple[str, str]]:
        left_out = {override_key(word) for word in self.command.arguments if _is_left_out(word)}
        typed = [word for word in self.command.arguments if not _is_left_out(word)]
        ranks, hosts = max(world, 2), self.command.hosts
        for other in (name for name, least in OTHER_PLANS.items() if name != plan and ranks >= least):
            arguments = tuple(corrected(typed, {"parallel": other}))
            again = dataclasses.replace(self.command, arguments=arguments, ranks=ranks // hosts)
            if self.check_command(again) is not None:
                continue
            yield format_command(again), "the same training under another plan: the losses agree"
            # Validating a job composes and plans it: skip this run's own and the one just validated.
            as_typed = left_out <= {"hydra.run.dir", "logger.name"} and (plan == "none" or world == ranks)
            known = {other, plan} if as_typed else {other}
            plans = dict.fromkeys(["none", plan, other])
            unknown = [each for each in plans if each not in known]
            if hosts == 1 and (not unknown or self.check_command(_sweep(typed, unknown, ranks)) is None):
                why = "these plans in one table, and the command that plots them"
                yield format_command(_sweep(typed, plans, ranks)), why
            return


def _sweep(typed: list[str], plans: Iterable[str], ranks: int) -> Command:
    return Command(("-m", *corrected(typed, {"parallel": ",".join(plans), "world_size": ranks})))


def _is_left_out(word: str) -> bool:
    key = override_key(word)
    return key in RUN_ONLY_KEYS or key.startswith("mesh") or word in ("-m", "--multirun")


def format_command(command: Command) -> str:
    """A command as it is typed from here: with `.venv/bin/torchrun`, or the bare name."""
    starter, _, rest = str(command).partition(" ")
    path = Path(sys.executable).with_name(starter)
    here = path_text(path) if path.is_relative_to(Path.cwd()) and path.exists() else starter
    return f"{here} {rest}"
