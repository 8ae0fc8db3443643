from __future__ import annotations

from tpresearch.config.world import slurm_tasks
from tpresearch.launch import World

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "TORCHELASTIC_RUN_ID": "x",
}


def test_a_rank_reads_its_place_from_torchruns_environment() -> None:
    world = World.from_environment(TORCHRUN)
    assert world == World(rank=5, size=8, local_rank=1, local_size=4, elastic=True)
    assert world.hosts == 2


def test_a_process_without_torchrun_is_a_world_of_one() -> None:
    assert World.from_environment({"LOCAL_RANK": "3"}) == World(0, 1, 0, 1, elastic=False)


def test_only_srun_without_torchrun_counts_as_slurm_tasks() -> None:
    assert slurm_tasks({"SLURM_STEP_NUM_TASKS": "8"}) == 8
    assert slurm_tasks({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == 1  # the batch script itself
    assert slurm_tasks({"SLURM_STEP_NUM_TASKS": "2", **TORCHRUN}) == 1
