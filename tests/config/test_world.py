"""What a launcher's environment says, and that no other job's environment is taken for it."""

from __future__ import annotations

import pytest

from tpresearch.config.world import OWN_DEVICE, SlurmStep, World, WrongEnvironment

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "x",
}


def test_a_rank_reads_its_place_from_torchruns_environment() -> None:
    world = World.from_environment(TORCHRUN)
    assert world == World(rank=5, size=8, local_rank=1, local_size=4, elastic=True)
    assert world.hosts == 2


def test_a_rank_that_sees_its_gpu_alone_keeps_its_place_on_the_host() -> None:
    """torchrun --virtual-local-rank sets LOCAL_RANK=0 on each rank, and CUDA_VISIBLE_DEVICES to a GPU."""
    virtual = TORCHRUN | {"LOCAL_RANK": "0"}
    world = World.from_environment(virtual | {OWN_DEVICE: "1"})
    assert world == World(rank=5, size=8, local_rank=1, local_size=4, elastic=True, own_device=True)
    first = virtual | {"RANK": "4", OWN_DEVICE: "1"}
    assert World.from_environment(first).own_device
    assert not World.from_environment(TORCHRUN | {OWN_DEVICE: "0"}).own_device
    with pytest.raises(WrongEnvironment, match="LOCAL_RANK=0: rank 5 is not the first on its host"):
        World.from_environment(virtual)


@pytest.mark.parametrize(
    "left",
    [
        {"LOCAL_RANK": "3"},
        {"RANK": "0", "WORLD_SIZE": "1"},  # a container of one process, as Kubernetes' PyTorchJob has it
        {"WORLD_SIZE": "1", "MASTER_PORT": "any"},
        {**dict.fromkeys(TORCHRUN, "")},
    ],
)
def test_a_process_without_torchrun_is_a_world_of_one(left: dict[str, str]) -> None:
    assert World.from_environment(left) == World(0, 1, 0, 1, elastic=False)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"LOCAL_RANK": ""}, "RANK=5: LOCAL_RANK is not set beside it"),
        ({"RANK": ""}, "WORLD_SIZE=8: RANK is not set beside it"),
        ({"MASTER_ADDR": ""}, "RANK=5: MASTER_ADDR is not set beside it"),
        ({"MASTER_PORT": "none"}, "MASTER_PORT=none: not a whole number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: not a whole number"),
        ({"RANK": "-1"}, "RANK=-1: not a whole number"),
        ({"RANK": "²"}, "RANK=²: not a whole number"),
        ({"RANK": "8"}, "RANK=8: there are ranks 0 to 7"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4: there are ranks 0 to 3"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3: does not divide WORLD_SIZE=8"),
        ({"LOCAL_WORLD_SIZE": "0", "LOCAL_RANK": "0"}, "LOCAL_WORLD_SIZE=0: a group has at least one rank"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999: no port is above 65535"),
        (dict.fromkeys({*TORCHRUN} - {"TORCHELASTIC_RUN_ID"}, ""), "TORCHELASTIC_RUN_ID=x: RANK is not set"),
    ],
)
def test_what_another_job_has_left_is_refused_by_name(wrong: dict[str, str], says: str) -> None:
    with pytest.raises(WrongEnvironment) as refused:
        World.from_environment(TORCHRUN | wrong)
    assert str(refused.value).startswith(says)
    assert refused.value.given == sorted({*TORCHRUN} - {k for k, v in wrong.items() if not v})


def test_only_srun_without_torchrun_counts_as_slurm_tasks() -> None:
    assert SlurmStep.from_environment({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}) == SlurmStep(8, 3)
    batch_script = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    assert SlurmStep.from_environment(batch_script).tasks == 1
    assert SlurmStep.from_environment({"SLURM_STEP_NUM_TASKS": "2", **TORCHRUN}).tasks == 1
    assert SlurmStep.from_environment({"SLURM_STEP_NUM_TASKS": "", "SLURM_JOB_ID": ""}) == SlurmStep()
    with pytest.raises(WrongEnvironment, match="SLURM_JOB_START_TIME=noon: not a whole number"):
        SlurmStep.from_environment({"SLURM_JOB_START_TIME": "noon"})
