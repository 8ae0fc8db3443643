"""The parts of Hydra that `hydra.main` is made of, so that a config is composed once and validated before it runs.

Those that are private to Hydra stay behind these functions. Checked on Hydra 1.3.8, and against the source of 1.4.0rc3.
"""

from __future__ import annotations

import os
import sys
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobStatus, run_job
from hydra.errors import ConfigCompositionException, HydraException
from hydra.main import get_args_parser
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tpresearch.config.errors import ConfigError
from tpresearch.launch.command import Command, WrongCommand, override_key, values_by_key
from tpresearch.launch.composition import COMPOSITION_ERRORS, VERSION_BASE, conf_dir

QUERY_FLAGS = ("cfg", "info", "help", "hydra_help", "shell_completion", "resolve", "experimental_rerun")
"""Flags of Hydra's command line that only print something, or that Hydra itself handles."""
UNEXPECTED_ERRORS = (AssertionError, AttributeError, KeyError, TypeError, RecursionError)
"""Exceptions that Hydra raises for a value that it did not expect, such as a variable to copy that is not set, and for a file whose
defaults lead back to itself."""
NOT_ACCEPTED = " has a value that Hydra does not accept"


def parse_command_line() -> tuple[Namespace, list[str]]:
    """Hydra's flags and overrides, and the words that are neither; refuses a flag without its value."""
    with _any_help():
        parser = get_args_parser()
    parser.error = _refuse_flag
    return parser.parse_known_args()


def parse(command: Command) -> Namespace:
    """This process's command line as Hydra reads it; refuses words that it does not understand, such as overrides after flags."""
    arguments, unknown = parse_command_line()
    if unknown:
        moved = [word for word in unknown if not word.startswith("-")]
        rest = [word for word in command.arguments if word not in unknown]
        legal = "key=value overrides, then flags; see --hydra-help"
        right = command.typed([*moved, *rest])
        raise WrongCommand("flags", " ".join(unknown), "not understood", legal, right)
    return arguments


@contextmanager
def _any_help() -> Iterator[None]:
    """Context in which a parser takes a help text that is no string, as one of Hydra's, which Python 3.14 refuses.
    (`ArgumentParser._check_help`: private to Python 3.14.)"""
    ArgumentParser._check_help = lambda *_: None
    try:
        yield
    finally:
        del ArgumentParser._check_help


def _refuse_flag(message: str) -> NoReturn:
    """Instead of argparse's usage message over many lines."""
    flag = next((word for word in reversed(sys.argv[1:]) if word.startswith("-")), "flags")
    raise ConfigError(flag, "", message, "key=value overrides, then flags; see --hydra-help")


def is_query(arguments: Namespace) -> bool:
    return any(getattr(arguments, flag) for flag in QUERY_FLAGS) or (arguments.run and arguments.multirun)


def answer_query(task: Callable[..., object], config_name: str) -> None:
    """Run `hydra.main` itself, for --cfg, --info, --hydra-help and the like."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else it prints errors itself, over many lines, and exits with 1
    with _any_help():
        hydra.main(version_base=VERSION_BASE, config_path=str(conf_dir()), config_name=config_name)(task)()


def application(script: str, arguments: Namespace) -> Hydra:
    """Hydra over conf/, or over --config-path, with the files of --config-dir; refuses one that is no folder."""
    version.setbase(VERSION_BASE)
    GlobalHydra.instance().clear()
    own = _config_folder("path", arguments.config_path)
    path = create_automatic_config_search_path(script, None, str(own or conf_dir()))
    if added := _config_folder("dir", arguments.config_dir):
        path.prepend("command-line", f"file://{added}", SearchPathQuery(provider="schema"))
    return Hydra.create_main_hydra2(Path(script).stem, path)


def _config_folder(name: str, typed: str | None) -> Path | None:
    if typed is None:
        return None
    if not (folder := Path(typed).absolute()).is_dir():
        drop = dict.fromkeys([f"--config-{name}", f"-c{name[0]}", typed])
        legal = "a folder with config files, such as mine/conf"
        raise ConfigError(f"--config-{name}", typed, "no such folder", legal, fix=drop)
    return folder


def compose_run(app: Hydra, config_name: str, overrides: list[str]) -> DictConfig | None:
    """The config of a single run, Hydra's own settings included; None if the config asks for a sweep. Raises COMPOSITION_ERRORS."""
    try:
        config = compose_config(app, config_name, overrides, RunMode.RUN)
    except ConfigCompositionException:
        # An override of several values, which a sweep may have: hydra.mode is asked for by composing without them.
        several = any(set(",(") & set(word) for word in overrides)
        if several and app.get_mode(config_name, overrides) is RunMode.MULTIRUN:
            return None
        raise
    if config.hydra.mode is RunMode.MULTIRUN:
        return None
    config.hydra.mode = RunMode.RUN
    return config


def compose_sweep(app: Hydra, config_name: str, overrides: list[str]) -> tuple[list[str], DictConfig]:
    """The overrides of a sweep, and its own config, Hydra's settings included.

    Where `model` is swept, that config has the default's model, which may lack a key that is set for the jobs' models. Hydra
    leaves to the jobs what is swept: so does such a key, with one value. Raises COMPOSITION_ERRORS.
    """
    with suppress(ConfigCompositionException):
        return overrides, compose_config(app, config_name, overrides, RunMode.MULTIRUN)
    left = [
        f"{word.partition('=')[0]}=choice({word.partition('=')[2]})" if _is_set_in_jobs(word) else word
        for word in overrides
    ]
    return left, compose_config(app, config_name, left, RunMode.MULTIRUN)


def _is_set_in_jobs(word: str) -> bool:
    """Whether an override sets one value in a branch whose keys depend on the option of its group."""
    of_option = override_key(word).startswith(("model.", "cluster."))
    return of_option and "=" in word and not OverridesParser.create().parse_override(word).is_sweep_override()


def jobs_of(overrides: list[str]) -> list[list[str]]:
    """The overrides of each job of a sweep, by Hydra's own sweeper."""
    (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), None)
    return [list(job) for job in jobs]


def compose_config(app: Hydra, config_name: str, overrides: list[str], mode: RunMode) -> DictConfig:
    """The config, Hydra's own settings included. Raises COMPOSITION_ERRORS; what Hydra did not foresee (such as hydra.verbose=null,
    or model=[null]) is a HydraException too, naming the override.
    """

    def compose(words: list[str]) -> DictConfig:
        return app.compose_config(config_name, words, mode, with_log_configuration=True)

    try:
        return compose(overrides)
    except UNEXPECTED_ERRORS as error:
        for end, word in enumerate(overrides, 1):
            try:
                compose(overrides[:end])
            except UNEXPECTED_ERRORS:
                raise HydraException(f"{override_key(word)}{NOT_ACCEPTED}") from error
            except COMPOSITION_ERRORS:  # for want of the later ones
                continue
        raise


def run(app: Hydra, config: DictConfig, config_name: str, job: Callable[[], None]) -> None:
    """Run the job in `hydra.run.dir`: Hydra's record of the config, job.chdir, job.env_set and callbacks included. What the job raises
    is raised as it is.
    """
    callbacks = Callbacks(config)
    callbacks.on_run_start(config=config, config_name=config_name)
    returned = run_job(
        hydra_context=HydraContext(config_loader=app.config_loader, callbacks=callbacks),
        task_function=lambda _: job(),
        config=config,
        job_dir_key="hydra.run.dir",
        job_subdir_key=None,
        configure_logging=False,
    )
    callbacks.on_run_end(config=config, config_name=config_name, job_return=returned)
    if returned.status is JobStatus.FAILED:
        raise returned._return_value  # its property would first print a line of its own


def launch_dir() -> Path:
    """The folder in which the command was typed, also after hydra.job.chdir=true."""
    with suppress(OmegaConfBaseException):  # of a chdir that refers to nothing, for which the job is refused
        if HydraConfig.initialized() and HydraConfig.get().job.chdir:
            return Path(HydraConfig.get().runtime.cwd)
    return Path.cwd()


def typed_overrides() -> dict[str, str]:
    """The overrides of this process's config by key; none of one that was loaded in Python."""
    return values_by_key(typed_words(HydraConfig.get().overrides.task)) if HydraConfig.initialized() else {}


def typed_words(overrides: Any) -> list[str]:
    """Hydra's record of overrides, as they were typed: iterating it would resolve their interpolations, which hold elsewhere, or
    for a job of a sweep only.
    """
    plain: Any = OmegaConf.to_container(overrides, resolve=False)
    return list(map(str, plain))


def flags_for_job() -> list[str]:
    """The flags of this command that name config files: a sweep's jobs need them too."""
    arguments, _ = parse_command_line()
    flags = {f"--config-{name}": getattr(arguments, f"config_{name}") for name in ("path", "name", "dir")}
    return [word for flag, value in flags.items() if value for word in (flag, value)]


_composing = threading.Lock()


@contextmanager
def own_hydra() -> Iterator[None]:
    """Hydra has one global instance, which a caller's own `hydra.main` or another thread may use too."""
    with _composing:
        theirs = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            yield
        finally:
            GlobalHydra.instance().hydra = theirs  # Hydra has made another instance meanwhile
