"""Models that take numbers and models that take tokens: each is refused the other's data, before any rank exists."""

from __future__ import annotations

import pytest
from support.composed import config

from tpresearch.config import ConfigError
from tpresearch.config.validate import validate
from tpresearch.train.build import planned

NET = ("model=toy_net", "data=uniform", "train.loss=sum")


def refused(*overrides: str, world: int = 4) -> ConfigError:
    cfg = config(*overrides, small=False)
    with pytest.raises(ConfigError) as caught:
        planned(cfg, validate(cfg, world))
    return caught.value


def test_numbers_for_a_language_model() -> None:
    error = refused("data=uniform")
    assert (error.field, error.value, error.fix) == ("data.source", "uniform", {"data": "random_tokens"})
    assert str(error).startswith(
        "data.source=uniform: model llama2_tiny takes tokens, and these are numbers; "
    )


def test_tokens_for_a_network_of_numbers() -> None:
    error = refused("model=toy_net", "parallel=tp")
    assert (error.field, error.value) == ("data.source", "pystdlib")
    assert "takes rows of 10 numbers, and these are tokens" in str(error)
    planned(cfg := config("model=toy_net", "parallel=tp", *_typed(error), small=False), validate(cfg, 4))


def test_rows_of_another_width() -> None:
    error = refused(*NET, "parallel=tp", "data.width=12")
    assert (error.field, error.value, error.fix) == ("data.width", 12, {"data.width": 10})


def test_the_next_token_of_numbers() -> None:
    error = refused("model=toy_net", "data=uniform", "parallel=tp")
    assert (error.field, error.value, error.fix) == ("train.loss", "next_token", {"train.loss": "sum"})


def test_rows_that_tp_does_not_divide() -> None:
    error = refused(*NET, "parallel=sp", "train.global_batch_size=30")
    assert (error.field, error.value) == ("mesh.tp", 4)
    assert "does not divide train.micro_batch_size=30 (rule own_rows splits its rows)" in str(error)
    assert error.legal == "legal for this model: 1 2"


def test_logits_left_split_by_rows() -> None:
    error = refused("model=toy_mlp", "parallel=tp", "model.plans.tp.output.dst=rows")
    assert (error.field, error.value) == ("model.plans.tp.output.dst", "rows")


def test_a_layer_without_a_rule_where_rows_are_split() -> None:
    error = refused(*NET, "parallel=sp", "~model.plans.sp.out_proj", "train.global_batch_size=80")
    assert "no rule speaks of out_proj" in error.why
    assert "since the batch's rows are split" in error.why


def _typed(error: ConfigError) -> list[str]:
    return [f"{key}={value}" for key, value in error.fix.items()]
