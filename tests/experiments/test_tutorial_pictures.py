"""What the tutorial draws is what ranks have: the parts of parameters, and the groups of meshes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.marks import exhaustive
from torch.distributed.tensor import DTensor
from tutorial.meshes import groups
from tutorial.shards import ranks_by_part

import tpresearch
from tpresearch.config.world import World
from tpresearch.verify.ranks import Ranks

SMALL = ("model=llama2_debug", "data=random_tokens", "data.seq_len=16", "tokenizer.vocab_size=260")
NAMES = (
    "tok_embeddings.weight",
    "layers.0.attention.wq.weight",
    "layers.1.attention.wo.weight",
    "norm.weight",
)


@pytest.mark.parametrize("plan", ["fsdp_tp", exhaustive("tp"), exhaustive("hsdp")])
def test_a_drawn_part_is_the_one_that_the_rank_holds(ranks: Ranks, plan: str) -> None:
    words = (*SMALL, f"parallel={plan}")
    job = tpresearch.compile_plan(tpresearch.load(*words), world_size=4).job
    held = ranks.run(4, parts, words)
    (whole,) = ranks.run(1, parts, (*SMALL, "parallel=none"))
    for name in NAMES:
        drawn = ranks_by_part(job, name)
        assert sorted(rank for each in drawn.values() for rank in each) == [0, 1, 2, 3]
        for (row, column, height, width), members in drawn.items():
            weight = whole[name]
            weight = weight[round(row * len(weight)) : round((row + height) * len(weight))]
            if weight.dim() > 1:
                columns = whole[name].shape[1]
                weight = weight[:, round(column * columns) : round((column + width) * columns)]
            assert all(torch.equal(held[rank][name], weight) for rank in members)


def parts(world: World, words: tuple[str, ...]) -> dict[str, torch.Tensor]:
    model = tpresearch.build(tpresearch.load(*words)).model
    found: dict[str, Any] = {name: model.get_parameter(name).detach() for name in NAMES}
    return {name: (p.to_local() if isinstance(p, DTensor) else p).clone() for name, p in found.items()}


def test_groups_of_a_mesh_are_along_its_axes(ranks: Ranks) -> None:
    for rank, found in enumerate(ranks.run(8, groups)):
        assert found[8,] == {"tp": list(range(8))}
        host = rank // 4 * 4
        assert found[2, 4] == {"replicate": [rank % 4, rank % 4 + 4], "shard": [*range(host, host + 4)]}
