"""What speaks against a command, found out before it is proposed: it is composed and judged as if it had been typed."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import open_dict

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config
from tpresearch.config.validate import SHOWN_WORLD, ranks_needed
from tpresearch.config.world import World
from tpresearch.launch import hydra_app
from tpresearch.launch.command import Command
from tpresearch.launch.composition import Composition, conf_dir, typed_config
from tpresearch.launch.explain import explaining
from tpresearch.launch.going_on import type_again

MOST_JOBS = 16
"""Of a sweep that are judged."""


def objection_to(
    command: Command, script: str, config_name: str, judge: Callable[[Config, World], object], goes_on: bool
) -> ConfigError | None:
    """For what a program would refuse this command, as far as its judge can tell; None where it would run.

    Args:
        script: the file of its main.
        goes_on: whether it can go on from an earlier run (`resume`).
    """
    try:
        with typed_as(command):
            _judge(command, script, config_name, judge, goes_on)
    except ConfigError as error:
        return error
    except (Exception, SystemExit) as error:
        return ConfigError("--config-name", config_name, str(error) or type(error).__name__, "another")
    return None


def _judge(
    command: Command, script: str, config_name: str, judge: Callable[[Config, World], object], goes_on: bool
) -> None:
    arguments, unknown = hydra_app.parse_command_line()
    if unknown:
        drop = dict.fromkeys(unknown)
        raise ConfigError("flags", " ".join(unknown), "not understood", "key=value", fix=drop)
    if goes_on:
        type_again(arguments)
    composition = Composition.of(arguments, conf_dir(), config_name)
    with explaining(composition):
        app = hydra_app.application(script, composition.config_dir, arguments)
        jobs = _jobs(composition.overrides) if arguments.multirun else iter([composition.overrides])
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
        of_job = World(0, ranks, 0, ranks, elastic=ranks > 1)
        judge(cfg, of_job if arguments.multirun else command.world)


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
def typed_as(command: Command) -> Iterator[None]:
    """The command line of this process and its environment are this meanwhile, in the folder where that was typed: what judges
    a config may read them."""
    before, unset = sys.argv, {name: os.environ.pop(name) for name in command.unset if name in os.environ}
    sys.argv = [before[0], *command.arguments]
    try:
        with chdir(hydra_app.typed_in()):
            yield
    finally:
        sys.argv = before
        os.environ.update(unset)
