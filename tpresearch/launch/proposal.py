"""The command that a refusal proposes: this process's own, corrected until it is valid. Each is composed and validated as if it had
been typed.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from functools import cache

from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

from tpresearch.checkpoint.resume import checkpoints_to_resume
from tpresearch.config.errors import ConfigError, WrongModel
from tpresearch.config.schema import Config
from tpresearch.config.validate import DEFAULT_PLAN_RANKS, ranks_needed
from tpresearch.config.world import World
from tpresearch.launch import hydra_app
from tpresearch.launch.command import (
    Command,
    CommandCheck,
    WrongCommand,
    corrected,
    is_override,
    is_within,
    override_key,
)
from tpresearch.launch.composition import Composition, typed_config
from tpresearch.launch.earlier_run import repeat_command_of_run, repeating_overrides
from tpresearch.launch.explain import explain_errors
from tpresearch.launch.run_dir import check_folder_names, typed_folder

MAX_CORRECTIONS = 8
"""Maximum number of mistakes of one command to correct, one after another."""
MAX_JOBS = 16
"""Number of a sweep's jobs to validate."""
Check = Callable[[Config, World], object]


def command_to_try(error: ConfigError, world: World, check_command: CommandCheck) -> str | None:
    """The command to try: this process's own command line, corrected until it is valid; None if code is to be corrected.

    If correcting does not converge, it is as much of it as is valid; a value whose mistake shows only later is to be filled in.
    """
    if isinstance(error, WrongModel):
        return None
    if isinstance(error, WrongCommand) and isinstance(error.command, str):
        return error.command
    command = typed = Command.from_argv(world)
    first = error.field
    same, filled_in = (
        typed.typed(corrected(typed.arguments, {error.field: v})) for v in (error.value, "VALUE")
    )
    seen = {typed, same} if len(same.arguments) > len(typed.arguments) else {typed}
    check_command = cache(check_command)
    for _ in range(MAX_CORRECTIONS):
        attempts = (command.corrected(error), command.without(error.field))
        attempt = next((each for each in attempts if each not in seen), None)
        if attempt is None:
            break
        if _is_to_be_filled_in(attempt) or (error_left := check_command(attempt)) is None:
            return str(attempt)
        if isinstance(error_left, WrongModel):  # another model would be the answer to another question
            return str(filled_in)
        seen.add(attempt)
        command, error = attempt, error_left
    valid = _valid_part(command, check_command)
    if {*typed.arguments} <= {*valid.arguments}:
        return str(filled_in)
    chosen, kept = ({override_key(word) for word in each.arguments} for each in (typed, valid))
    group, _, below = first.partition(".")
    in_file = not any(is_within(first, key) for key in chosen - {group})
    if below and group in chosen and (in_file or group not in kept):
        # The mistake is in the file that was chosen, of which another would be the answer to another question.
        return str(filled_in)
    return str(valid)


def _valid_part(command: Command, check_command: CommandCheck) -> Command:
    """The command with its valid overrides only, found by bisection: few are wrong, and each check composes a config."""
    flags = tuple(word for word in command.arguments if not is_override(word))

    def of(*words: str) -> Command:
        return _complete(command.typed((*words, *flags)), check_command)

    def kept(words: tuple[str, ...], before: tuple[str, ...] = ()) -> tuple[str, ...]:
        if not words or check_command(of(*before, *words)) is None:
            return words
        if len(words) == 1:
            return ()
        first = kept(words[: len(words) // 2], before)
        return first + kept(words[len(words) // 2 :], before + first)

    if flags and check_command(of()):
        flags = ()
    return of(*kept(tuple(filter(is_override, command.arguments))))


def _complete(command: Command, check_command: CommandCheck) -> Command:
    """The command with another number of ranks and further overrides, if it needs no more to be valid."""
    for _ in range(MAX_CORRECTIONS):
        error = check_command(command)
        attempt = command.corrected(error) if error else command
        if attempt == command or not set(command.arguments) <= set(attempt.arguments):
            break
        command = attempt
    return command


def _is_to_be_filled_in(command: Command) -> bool:
    return any(re.search(r"=(VALUE|<\w+>)$", word) for word in command.arguments)


def error_of_command(
    command: Command, script: str, config_name: str, preflight: Check, resumes: bool
) -> ConfigError | None:
    """Why a program would refuse this command, as far as its preflight can tell; None if it would run.

    Args:
        script: the file of its main.
        resumes: whether it can resume an earlier run (`resume`).
    """
    try:
        with as_if_typed(command):
            _check_command(command, script, config_name, preflight, resumes)
    except ConfigError as error:
        return error
    except (Exception, SystemExit) as error:
        return ConfigError("--config-name", config_name, str(error) or type(error).__name__, "another")
    return None


def _check_command(command: Command, script: str, config_name: str, preflight: Check, resumes: bool) -> None:
    arguments = hydra_app.parse(command)
    earlier = repeat_command_of_run(arguments) if resumes else None
    composition = Composition.of(arguments, config_name)
    composition.refuse_unusable()
    with explain_errors(composition):
        app = hydra_app.application(script, arguments)
        jobs = [composition.overrides]
        if arguments.multirun:
            jobs = hydra_app.jobs_of(composition.overrides)[:MAX_JOBS]
    for overrides in jobs:
        with explain_errors(composition):
            composed = hydra_app.compose_run(app, composition.config_name, overrides)
            if composed is None:  # a sweep for hydra.mode: its launcher checks each job
                return
            with open_dict(composed):
                composed.hydra.job.id, composed.hydra.job.num = "0", 0
            HydraConfig.instance().set_config(composed)
            check_folder_names(composed)
            cfg, folder = typed_config(composed), typed_folder(composed.hydra.run)
        ranks = ranks_needed(cfg, DEFAULT_PLAN_RANKS)
        of_job = World(0, ranks, 0, ranks, elastic=ranks > 1)
        preflight(cfg, of_job if arguments.multirun else command.world)
        if resumes and not (arguments.multirun or cfg.plan_only):
            with repeating_overrides(earlier):
                checkpoints_to_resume(cfg, folder)


@contextmanager
def as_if_typed(command: Command) -> Iterator[None]:
    """Inside it, this process's command line, environment and folder are those of the command, since preflights may read
    them."""
    before, unset = sys.argv, {name: os.environ.pop(name) for name in command.unset if name in os.environ}
    sys.argv = [before[0], *command.arguments]
    try:
        with chdir(hydra_app.launch_dir()):
            yield
    finally:
        sys.argv = before
        os.environ.update(unset)
