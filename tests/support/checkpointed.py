"""Jobs that load, take some steps and save; and their whole state, to hold one to another."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from support.assembled import joined
from support.composed import corpus
from tpresearch.checkpoint.collective import checkpoint_group
from tpresearch.checkpoint.disk import read_checkpoint
from tpresearch.checkpoint.load import read_tensors, restore, tensors_of
from tpresearch.checkpoint.state import state_of
from tpresearch.config import Config
from tpresearch.config.axes import DATA_AXES
from tpresearch.config.world import World
from tpresearch.launch import Run
from tpresearch.parallel.mesh import sum_over
from tpresearch.train.assemble import assemble
from tpresearch.train.saving import build_saver
from tpresearch.train.state import TrainState

State = dict[str, Tensor]


@dataclass
class Went:
    """What came of a job."""

    restored: State = field(default_factory=dict)
    """The whole state as it was loaded."""
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    state: State = field(default_factory=dict)
    """The whole state after the last step."""


def go(
    world: World,
    cfg: Config,
    steps: int,
    start: Path | None = None,
    run: Path | None = None,
    save_at: tuple[int, ...] = (),
) -> Went | None:
    """A job on this rank, of which rank 0 tells: load the checkpoint `start`, if any, and take some steps.

    Args:
        run: the folder in which the steps `save_at` are saved.
    """
    went = Went()
    with joined(cfg, world) as (job, mesh, device):
        group = checkpoint_group()
        restoring = partial(restore, [read_checkpoint(start)], group=group) if start else None
        loop = assemble(job, mesh, device, corpus(), (), restoring)
        if start:
            went.restored = whole(loop.state)
        saver = build_saver(job, Run(run, world), corpus(), loop.state.step, group) if run else None
        for _ in range(steps):
            share, norm = loop.step()
            went.losses.append(sum_over(mesh, share, DATA_AXES).item())
            went.norms.append(norm.item())
            if saver and loop.state.step in save_at:
                saver.save(loop.state, 0, went.losses[-1], last=True)
        went.state = whole(loop.state)
        dist.barrier()
    return went if world.rank == 0 else None


def whole(state: TrainState) -> State:
    """All that a checkpoint would hold, gathered."""
    with state_of(state) as tensors:
        return {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
            for name, tensor in tensors.items()
        }


def on_disk(checkpoint: Path) -> State:
    return dict(read_tensors(checkpoint, tensors_of(read_checkpoint(checkpoint))))


def apart(one: State, other: State) -> float:
    """The greatest difference between two states, relative to the greatest value of the tensor that it is in."""
    assert one.keys() == other.keys()
    greatest = {name: other[name].abs().max() or 1 for name in other}
    return max(float((one[name] - other[name]).abs().max() / greatest[name]) for name in other)


def equal(one: State, other: State) -> bool:
    """To the bit."""
    same = one.keys() == other.keys() and all(one[name].dtype == other[name].dtype for name in other)
    return same and all(torch.equal(one[name], other[name]) for name in other)


def calls(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls module.name(argument) when it is read."""

    def text(value: str) -> bytes:
        return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()

    what = text(module) + text(name) + pickle.STACK_GLOBAL
    return pickle.PROTO + b"\x04" + what + text(argument) + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP
