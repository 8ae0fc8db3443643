"""All that can be refused before there is a folder, an allocation or a process group, cheapest first."""

from __future__ import annotations

from tpresearch.config import ConfigError
from tpresearch.config.compose import as_dict
from tpresearch.config.schema import Config
from tpresearch.config.validate import validate
from tpresearch.config.world import World
from tpresearch.data import check_data
from tpresearch.track.secrets import refuse_secrets


def check(cfg: Config, world: World) -> None:
    """Judge the config, the data's paths, the device, and the plan against the model.

    Raises:
        ConfigError: for the first thing that cannot work.
    """
    try:
        _check(cfg, world)
    except ConfigError as error:
        if cfg.plan_only and error.nproc:  # which starts no ranks: another number of them is an override too
            error.fix["world_size"], error.nproc = error.nproc, None
        raise


def _check(cfg: Config, world: World) -> None:
    try:
        refuse_secrets(as_dict(cfg))
    except ValueError as error:
        raise ConfigError("config", "...", str(error), "a config without credentials") from None
    sizes = validate(cfg, world.size, world.hosts)
    check_data(cfg.data, cfg.tokenizer)
    from tpresearch.train.build import planned  # late: these import torch, which takes seconds
    from tpresearch.train.device import choose_device

    if not cfg.plan_only and world.here:
        choose_device(cfg, world.local_rank, world.local_size)
    planned(cfg, sizes)
