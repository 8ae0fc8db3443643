"""What speaks against a command, found out before it is proposed: it is composed and judged as if it had been typed."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import open_dict

from tpresearch.config.errors import ConfigError
from tpresearch.config.validate import SHOWN_WORLD, ranks_needed
from tpresearch.config.world import World
from tpresearch.launch import hydra_app
from tpresearch.launch.command import Command
from tpresearch.launch.composition import Composition, conf_dir, typed_config
from tpresearch.launch.explain import explaining
from tpresearch.launch.going_on import type_again

if TYPE_CHECKING:
    from tpresearch.launch.entrypoint import Program

MOST_JOBS = 16
"""Of a sweep that are judged."""


def objection(program: Program[Any], command: Command) -> ConfigError | None:
    """For what the program would refuse this command, as far as its judge can tell; None where it would run."""
    try:
        with _typed(command.arguments):
            _judge(program, command)
    except ConfigError as error:
        return error
    except (Exception, SystemExit) as error:
        return ConfigError(
            "--config-name", program.config_name, str(error) or type(error).__name__, "another"
        )
    return None


def _judge(program: Program[Any], command: Command) -> None:
    arguments, unknown = hydra_app.parse_command_line()
    if unknown:
        raise ConfigError(
            "flags", " ".join(unknown), "not understood", "key=value", fix=dict.fromkeys(unknown)
        )
    if program.judge_folder:
        type_again(arguments)
    composition = Composition.of(arguments, conf_dir(), program.config_name)
    judge = program.judge if program.glance is None or "torch" in sys.modules else program.glance
    with explaining(composition):
        app = hydra_app.application(inspect.getfile(program.main), composition.config_dir, arguments)
        jobs = _jobs(composition.overrides) if arguments.multirun else [composition.overrides]
    for overrides in jobs:
        with explaining(composition):
            composed = hydra_app.compose_run(app, composition.config_name, overrides)
            if composed is None:  # a sweep for hydra.mode: its launcher judges each job
                return
            with open_dict(composed):
                composed.hydra.job.id, composed.hydra.job.num = "0", 0
            HydraConfig.instance().set_config(composed)
            cfg = typed_config(composed)
        ranks = ranks_needed(cfg, SHOWN_WORLD)
        judge(cfg, World(0, ranks, 0, ranks, elastic=ranks > 1) if arguments.multirun else command.world)


def _jobs(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The overrides of a sweep's first jobs."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    each = [
        [f"{word.get_key_element()}={value}" for value in word.sweep_string_iterator()]
        if word.is_sweep_override()
        else [str(word.input_line)]
        for word in parsed
    ]
    return (list(job) for job in itertools.islice(itertools.product(*each), MOST_JOBS))


@contextmanager
def _typed(arguments: Sequence[str]) -> Iterator[None]:
    """The command line of this process meanwhile: what judges a config may read it."""
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        yield
    finally:
        sys.argv = before
