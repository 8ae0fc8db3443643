"""Collectives through host memory give what gloo's own give: on the CPU here, as on a card that ranks share."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support.composed import config, corpus, in_two_parts
from support.traces import CLIP, agree

from tpresearch.config import Config
from tpresearch.config.world import World
from tpresearch.parallel import staged
from tpresearch.parallel.device import Device
from tpresearch.parallel.group import process_group
from tpresearch.verify.ranks import Ranks
from tpresearch.verify.reference import reference
from tpresearch.verify.trace import Trace, trace

HOST = Device(torch.device("cpu"), staged.NAME, "cpu")


def each_collective(world: World) -> dict[str, list[float]]:
    mine = torch.arange(4.0) + 10 * world.rank
    with process_group(HOST, world):
        summed, largest, told = mine.clone(), mine.clone(), mine.clone()
        dist.all_reduce(summed)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        dist.broadcast(told, src=1)
        gathered, part, swapped = torch.empty(8), torch.empty(2), torch.empty(4)
        dist.all_gather_into_tensor(gathered, mine)
        dist.reduce_scatter_tensor(part, mine)
        dist.all_to_all_single(swapped, mine)
        listed = [torch.empty(4) for _ in range(2)]
        dist.all_gather(listed, mine)
        dist.barrier()
    found = {"sum": summed, "max": largest, "told": told, "gathered": gathered, "part": part}
    return {
        name: t.tolist() for name, t in (found | {"swapped": swapped, "listed": torch.cat(listed)}).items()
    }


def test_each_collective_by_hand(ranks: Ranks) -> None:
    first, second = ranks.run(2, each_collective)
    both = [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0]
    alike = {
        "sum": [10.0, 12.0, 14.0, 16.0],
        "max": both[4:],
        "told": both[4:],
        "gathered": both,
        "listed": both,
    }
    assert first == alike | {"part": [10.0, 12.0], "swapped": [0.0, 1.0, 10.0, 11.0]}
    assert second == alike | {"part": [14.0, 16.0], "swapped": [2.0, 3.0, 12.0, 13.0]}


def job(world: World, cfg: Config) -> Trace | None:
    found = trace(cfg, corpus(), world, 2, HOST)
    return found if world.rank == 0 else None


@pytest.mark.parametrize("plan", ["hsdp", "fsdp_tp"])
def test_a_plan_computes_over_them_what_one_process_does(ranks: Ranks, plan: str) -> None:
    settings = (
        "train.dtype=float64",
        f"train.clip_grad_norm={CLIP}",
        "model=llama2_debug",
        "train.eval_rows=11",
    )
    ours = ranks.run(4, job, in_two_parts(config(f"parallel={plan}", *settings), 4))[0]
    agree(ours, reference(config("parallel=none", *settings), corpus(), 2))
