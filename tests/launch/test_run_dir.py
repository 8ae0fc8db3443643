"""One folder for a job, and none for two."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import IO

import pytest
from omegaconf import DictConfig, OmegaConf

from tpresearch.config import ConfigError
from tpresearch.launch import World, run_dir

NOON = datetime(2026, 1, 2, 12, 0, 0)


class Noon(datetime):
    @classmethod
    def now(cls, tz: object = None) -> datetime:
        return NOON


@pytest.fixture(autouse=True)
def _at_noon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run_dir, "datetime", Noon)
    monkeypatch.chdir(tmp_path)
    for key in ("TORCHELASTIC_USE_AGENT_STORE", "SLURM_JOB_ID", "SLURM_JOB_START_TIME", "SLURM_STEP_ID"):
        monkeypatch.delenv(key, raising=False)
    run_dir.register_resolvers()


def composed(folder: str = "${run_dir:${name}}") -> DictConfig:
    return OmegaConf.create({"name": "study", "hydra": {"run": {"dir": folder}}})


def test_runs_started_in_the_same_second_have_folders_of_their_own() -> None:
    with ThreadPoolExecutor(8) as at_once:
        folders = list(at_once.map(lambda _: str(run_dir.agree(composed(), World())), range(8)))
    base = "outputs/study/2026-01-02/12-00-00"
    assert sorted(folders) == [base, *(f"{base}-{nth}" for nth in range(2, 9))]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_folder_is_refused_where_the_disk_does_not_take_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_a_full_disk(**_: object) -> IO[bytes]:
        return Path("/dev/full").open("wb")

    monkeypatch.setattr(run_dir.tempfile, "TemporaryFile", on_a_full_disk)
    with pytest.raises(
        ConfigError, match=r"hydra\.run\.dir=mine: cannot be written: No space left on device"
    ):
        run_dir.agree(composed("mine"), World())


def test_without_torchruns_store_ranks_work_out_the_folder_from_the_slurm_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(int(NOON.timestamp())))
    folders = {str(run_dir.agree(composed(), World(rank=rank, size=2, local_size=2))) for rank in range(2)}
    assert folders == {"outputs/study/2026-01-02/12-00-00-4711.0"}


def test_without_any_way_to_agree_a_folder_has_to_be_typed() -> None:
    ranks = [World(rank=rank, size=2, local_size=2) for rank in range(2)]
    with pytest.raises(ConfigError, match="the ranks cannot agree on a folder"):
        run_dir.agree(composed(), ranks[0])
    assert {str(run_dir.agree(composed("typed"), rank)) for rank in ranks} == {"typed"}
