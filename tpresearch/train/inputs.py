"""Whether a model, its data and its loss are for each other: tokens with tokens, numbers with numbers."""

from __future__ import annotations

from torch import nn

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config, DataSource, Loss
from tpresearch.plan.compiler import Plan
from tpresearch.plan.numbers import input_width


def check_inputs(model: nn.Module, cfg: Config) -> None:
    """Refuse data that the model cannot take, and a loss that the data have no targets for.

    Raises:
        ConfigError: naming the field at fault.
    """
    width, source = input_width(model), cfg.data.source
    if width is None and source is DataSource.uniform:
        raise ConfigError(
            "data.source",
            source,
            f"model {cfg.model.name} takes tokens, and these are numbers",
            "data=random_tokens, or a model that takes numbers, such as toy_net",
            fix={"data": "random_tokens"},
        )
    if width is not None and source is not DataSource.uniform:
        raise ConfigError(
            "data.source",
            source,
            f"model {cfg.model.name} takes rows of {width} numbers, and these are tokens",
            "data=uniform, or a model that takes tokens",
            fix={"data": "uniform", "train.loss": "sum"},
        )
    if width is not None and width != cfg.data.width:
        raise ConfigError(
            "data.width",
            cfg.data.width,
            f"model {cfg.model.name} takes rows of {width} numbers",
            f"{width}; left alone, it follows model.dim",
            fix={"data.width": width},
        )
    if width is not None and cfg.train.loss is Loss.next_token:
        raise ConfigError(
            "train.loss",
            cfg.train.loss,
            "rows of numbers have no next token",
            "sum",
            fix={"train.loss": "sum"},
        )


def check_outputs(model: nn.Module, plan: Plan, cfg: Config) -> None:
    """Refuse logits that are left split by rows: the cross-entropy is computed on vocabulary shards.

    Raises:
        ConfigError: naming the rule.
    """
    if plan.split_output == 0 and input_width(model) is None:
        rule = next(rule for rule in plan.rules.values() if rule.leaves_split)
        raise ConfigError(
            f"{rule.where}.dst",
            "rows",
            "the cross-entropy is computed on whole rows of logits or on vocabulary shards",
            "logits for a model that takes tokens",
            fix={f"{rule.where}.dst": "logits"},
        )
