"""Parameters that not every plan can shard are refused by name, or are right: tied, frozen, scalar, unevenly cut."""

from __future__ import annotations

import pytest
from support.composed import config
from support.counted_steps import counted_step
from support.nets import AllFrozen, Frozen, Scaled, Tied, model

from tpresearch.config import ConfigError
from tpresearch.config.validate import validate
from tpresearch.plan.parameters import _cut_alike, tied_parameters
from tpresearch.train.preflight import planned


def refused(*overrides: str, world: int = 2) -> ConfigError:
    cfg = config(*overrides)
    with pytest.raises(ConfigError) as caught:
        planned(cfg, validate(cfg, world))
    return caught.value


def test_ties_are_found_and_counted_once() -> None:
    cfg = config(*model(Tied), "parallel=none")
    meta, _ = planned(cfg, validate(cfg, 1))
    assert tied_parameters(meta) == {"output.weight": "embed.weight"}
    dim, hidden = cfg.model.args["dim"], cfg.model.args["hidden_dim"]
    assert sum(p.numel() for p in meta.parameters()) == 260 * dim + 2 * dim * hidden + hidden + dim


@pytest.mark.parametrize(
    ("overrides", "field", "names"),
    [
        (
            ["parallel=tp", "model.plans.tp.embed.style=colwise"],
            "model.plans",
            ["embed.weight", "output.weight"],
        ),
        (["parallel=tp", "~model.plans.tp.output"], "model.plans", ["embed.weight", "output.weight"]),
        (["parallel=fsdp", "model.blocks=[embed]"], "model.blocks", ["embed.weight", "output.weight"]),
    ],
)
def test_a_plan_that_would_untie_is_refused_and_both_are_named(
    overrides: list[str], field: str, names: list[str]
) -> None:
    error = refused(*model(Tied), *overrides)
    assert error.field == field
    assert all(name in str(error) for name in names)


@pytest.mark.parametrize("overrides", [["parallel=fsdp"], ["parallel=ddp", "train.dtype=bfloat16"]])
def test_a_scalar_is_refused_where_fsdp_would_shard_it(overrides: list[str]) -> None:
    error = refused(*model(Scaled), *overrides)
    assert "scale.s is a scalar" in str(error)
    assert error.field == "parallel"


def test_a_model_without_anything_to_train_is_refused() -> None:
    assert "requires a gradient" in refused(*model(AllFrozen), "parallel=none", world=1).why


@pytest.mark.parametrize(
    ("rows", "shards", "ways", "alike"),
    [(50257, 4, 2, False), (4093, 3, 2, False), (13, 3, 2, False), (50257, 2, 4, True), (32000, 3, 2, True)],
)
def test_rows_that_two_axes_cut_unevenly_are_known(rows: int, shards: int, ways: int, alike: bool) -> None:
    assert _cut_alike(rows, ways, shards) == alike


def test_uneven_rows_are_refused_with_the_next_vocabulary_that_fits() -> None:
    error = refused("model=llama2_debug", "parallel=fsdp_tp", "mesh.tp=2", "model.vocab_size=50257", world=8)
    assert "50257 rows of tok_embeddings.weight" in error.why
    assert error.fix == {"model.vocab_size": 50258}
    cfg = config("model=llama2_debug", "parallel=fsdp_tp", "mesh.tp=2", "model.vocab_size=50258")
    planned(cfg, validate(cfg, 8))


@pytest.mark.parametrize(
    ("kind", "plan", "world"),
    [
        *((kind, "parallel=none", 1) for kind in (Tied, Frozen, Scaled)),
        *(
            (Tied, plan, 4)
            for plan in ("parallel=fsdp", "parallel=tp", "parallel=fsdp_tp", "parallel=hsdp_tp")
        ),
        *((Frozen, plan, 2) for plan in ("parallel=ddp", "parallel=fsdp")),
    ],
)
def test_formulas_are_what_is_measured(kind: type, plan: str, world: int) -> None:
    blocks = ["model.blocks=[]"] if kind is Frozen else []
    found = counted_step(world, *model(kind), plan, *blocks)
    held = {use.kind: use.most_bytes for use in found.held}
    for kept in ("parameters", "gradients", "optimizer"):
        assert held[kept] == found.expected.held[kept], kept
    assert found.sent == found.expected.sent
