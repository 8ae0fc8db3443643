"""Hosts that do not share the disk of the run folder leave no checkpoint that lacks the files of one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.made_checkpoints import ABOUT, save
from torch import nn

from tpresearch.checkpoint.collective import RankFailed, checkpoint_group
from tpresearch.checkpoint.disk import CHECKPOINTS_FOLDER, step_folders
from tpresearch.checkpoint.save import SaveFailed, Saver
from tpresearch.config import ConfigError
from tpresearch.config.schema import CheckpointConfig
from tpresearch.config.world import World
from tpresearch.hf.read import check_same_weights
from tpresearch.parallel.device import Device
from tpresearch.parallel.group import process_group
from tpresearch.train.state import TrainState
from tpresearch.verify.ranks import Ranks


def save_on_two_disks(world: World, disks: Path) -> None:
    """Each rank is a host, whose folder of the same name is on a disk of its own from the start, or from the first save on."""
    own, mounted = disks / f"{world.rank}", disks / f"mounted-{world.rank}"
    (own / CHECKPOINTS_FOLDER).mkdir(parents=True)  # of an earlier run there
    model = nn.ModuleDict({f"of_rank_{world.rank}": nn.Linear(2, 2)})
    state = TrainState(1, model, torch.optim.SGD(model.parameters()))
    with process_group(Device(torch.device("cpu"), "gloo", "cpu"), world):
        group = checkpoint_group()
        with pytest.raises(RankFailed, match=r"^rank 1: what rank 0 writes there is not seen here"):
            Saver(own, CheckpointConfig(), ABOUT, group).start(0)
        mounted.symlink_to(disks / "0")
        saver = Saver(mounted, CheckpointConfig(), ABOUT, group)
        saver.start(0)
        dist.barrier()
        mounted.unlink()
        mounted.symlink_to(own)
        with pytest.raises(SaveFailed, match=r"step, 1: rank 0: No such file or directory .*__1_0.distcp"):
            saver.save(state, tokens=0, loss=None, last=True)


def test_two_disks_are_refused_also_where_one_is_lost_on_the_way(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, save_on_two_disks, tmp_path)
    assert not step_folders(tmp_path / "0")
    assert not list(tmp_path.glob("*/.shared-*"))


def start_from_own_weights(world: World, disks: Path) -> None:
    save(own := disks / f"{world.rank}", 3)
    with (
        process_group(Device(torch.device("cpu"), "gloo", "cpu"), world),
        pytest.raises(
            ConfigError, match=r"^init_from=.*: on some hosts it holds other weights; the same on every host"
        ),
    ):
        check_same_weights(str(own), checkpoint_group())


def test_initial_weights_are_not_put_together_from_two_checkpoints(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, start_from_own_weights, tmp_path)
