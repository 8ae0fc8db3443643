"""One folder for a job, and none for two."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import IO, Self
from unittest.mock import Mock

import pytest
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from support.nobody import as_nobody
from torch.distributed import TCPStore

from tpresearch.config import ConfigError, other_hosts
from tpresearch.config.errors import RunFailed
from tpresearch.config.world import WrongEnvironment
from tpresearch.launch import World, resolvers, run_dir
from tpresearch.launch.agents_store import connect, hear_other_hosts, tell_begun, tell_other_hosts
from tpresearch.parallel.group import fresh_store

NOON = datetime(2026, 1, 2, 12, 0, 0)


class Noon(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return cls(*NOON.timetuple()[:6])


@pytest.fixture(autouse=True)
def _at_noon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run_dir, "datetime", Noon)
    monkeypatch.setattr(other_hosts, "_meeting", [])
    monkeypatch.chdir(tmp_path)
    for key in ("TORCHELASTIC_USE_AGENT_STORE", "SLURM_JOB_ID", "SLURM_JOB_START_TIME", "SLURM_STEP_ID"):
        monkeypatch.delenv(key, raising=False)
    resolvers.register_resolvers()


def composed(folder: str, resume: str = "auto") -> DictConfig:
    return OmegaConf.create({"name": "study", "resume": resume, "hydra": {"run": {"dir": folder}}})


def agree(folder: str = "${run_dir:${name}}", world: World = World(), resume: str = "auto") -> str:  # noqa: B008
    """The folder of a run that is over at once."""
    with run_dir.agree_on_folder(composed(folder, resume), world) as (agreed, _):
        return str(agreed)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert agree("~/mine") == f"{tmp_path}/home/mine"
    sweep = OmegaConf.create({"hydra": {"sweep": {"dir": "~/sweep"}}})
    with run_dir.sweep_folder(sweep) as folder:
        assert folder == tmp_path / "home" / "sweep"


def test_runs_started_in_the_same_second_have_folders_of_their_own() -> None:
    with ThreadPoolExecutor(8) as at_once:
        folders = list(at_once.map(lambda _: agree(), range(8)))
    base = "outputs/study/2026-01-02/12-00-00"
    assert sorted(folders) == [base, *(f"{base}-{nth}" for nth in range(2, 9))]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
@pytest.mark.parametrize("given", [True, False])
def test_a_folder_is_refused_where_the_disk_does_not_take_a_byte(
    monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    def on_a_full_disk(**_: object) -> IO[bytes]:
        return Path("/dev/full").open("wb")

    assert run_dir.writable_folder("mine") == Path("mine")
    monkeypatch.setattr(run_dir.tempfile, "TemporaryFile", on_a_full_disk)
    assert run_dir.writable_folder("mine") == Path(tempfile.gettempdir(), "mine")
    folder = "mine" if given else "outputs/study/2026-01-02/12-00-00"
    with pytest.raises(
        ConfigError, match=rf"hydra\.run\.dir={folder}: cannot be written: No space left on device"
    ):
        agree("mine") if given else agree()
    assert given or not Path(folder).exists()


def test_a_run_whose_folder_cannot_be_written_is_left_for_one_from_its_weights(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(ConfigError, match="cannot be written") as refused:
        agree("mine", resume="mine")
    assert refused.value.fix == {"resume": None, "init_from": "mine"}


def test_without_torchruns_store_ranks_work_out_the_folder_from_the_slurm_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(int(NOON.timestamp())))
    folders = {agree(world=World(rank=rank, size=2, local_size=2)) for rank in range(2)}
    assert folders == {"outputs/study/2026-01-02/12-00-00-4711.0"}


def test_without_any_way_to_agree_a_folder_has_to_be_typed() -> None:
    ranks = [World(rank=rank, size=2, local_size=2) for rank in range(2)]
    with pytest.raises(ConfigError, match="the ranks cannot agree on a folder"):
        agree(world=ranks[0])
    assert {agree("typed", rank) for rank in ranks} == {"typed"}


RECORD = {
    "summary.json": "{}",
    "metrics.jsonl": "",
    ".hydra/config.yaml": "",
    "train.log": "",
    "tokenizer/tokenizer.json": "",
    "tensorboard/events": "",
    "notes.txt": "mine",
}


def leave(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(RECORD.get(name, ""))


def there(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_earlier_record_is_set_aside_and_what_is_no_runs_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for nth in (1, 2):
        leave(tmp_path / "mine", *RECORD)
        assert agree("mine") == "mine"
        assert there(tmp_path / "mine") == {".lock", "notes.txt"}
        aside = {Path(name).parts[0] for name in RECORD} - {"notes.txt"}
        assert there(tmp_path / f"mine.earlier-{nth}") == aside
        assert (
            capsys.readouterr().err == f"the record of an earlier run in mine is now in mine.earlier-{nth}\n"
        )
    assert agree("mine") == "mine"
    assert capsys.readouterr().err == "", "nothing of a run is there"
    assert len(there(tmp_path)) == 3
    (tmp_path / "mine" / "below").mkdir()
    for at, folder, nth in ((".", ".", 3), ("below", "..", 4)):
        leave(tmp_path / "mine", *RECORD)
        monkeypatch.chdir(tmp_path / "mine" / at)
        assert agree(folder) == folder
        assert there(tmp_path / f"mine.earlier-{nth}") == aside


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="only Linux has this other disk")
def test_an_earlier_record_stays_on_its_disk(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as disk:
        (tmp_path / "mine").symlink_to(disk)
        for nth in (1, 2):
            leave(tmp_path / "mine", *RECORD)
            assert agree("mine") == "mine"
            assert there(Path(disk, f"run.earlier-{nth}")) == {Path(name).parts[0] for name in RECORD} - {
                "notes.txt"
            }
        assert there(Path(disk)) == {".lock", "notes.txt", "run.earlier-1", "run.earlier-2"}
        assert there(tmp_path) == {"mine"}


@pytest.mark.parametrize("resume", ["auto", "mine"])
@pytest.mark.parametrize(
    ("name", "kind"), [("metrics.jsonl", "file"), (".hydra/config.yaml", "file"), ("ranks", "folder")]
)
def test_what_a_run_cannot_write_to_is_named(name: str, kind: str, resume: str, tmp_path: Path) -> None:
    leave(tmp_path / "mine", "summary.json", "checkpoints/step-00000003/checkpoint.json")
    (tmp_path / "mine" / name).mkdir(parents=True) if kind == "file" else leave(tmp_path / "mine", name)
    with pytest.raises(ConfigError, match=f"mine: its {name} is not a {kind}; ") as refused:
        agree("mine", resume=resume)
    elsewhere = {"hydra.run.dir": Path("mine-2")}
    assert refused.value.fix == (elsewhere if resume == "auto" else {"resume": None, "init_from": "mine"})


@pytest.mark.parametrize("record", ["verify.json", "planner.json"])
def test_the_record_of_a_verification_or_a_planning_is_set_aside_too(tmp_path: Path, record: str) -> None:
    """Else one that is stopped in the folder would have the results of another config."""
    leave(tmp_path / "mine", ".hydra/config.yaml", record, "planner.png")
    assert agree("mine") == "mine"
    assert there(tmp_path / "mine") == {".lock"}


def test_a_folder_with_a_checkpoint_is_gone_on_with_unless_the_config_says_never(tmp_path: Path) -> None:
    leave(tmp_path / "mine", *RECORD, "checkpoints/step-00000003/checkpoint.json")
    assert agree("mine") == "mine"
    assert {*there(tmp_path)} == {"mine"}
    with run_dir.agree_on_folder(composed("mine", "never"), World()):
        assert there(tmp_path / "mine") == {".lock", "notes.txt"}
    assert (tmp_path / "mine.earlier-1" / "checkpoints" / "step-00000003").is_dir()
    leave(tmp_path / "mine", "checkpoints/step-00000003/checkpoint.json")  # alone
    assert agree("mine", resume="never") == "mine"
    assert (tmp_path / "mine.earlier-2" / "checkpoints" / "step-00000003").is_dir()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_has_runs_too(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Also where a process that was killed, or another disk, has left the file."""
    leave(Path("mine"), ".lock")
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(number, os.strerror(number))))
    assert agree("mine") == "mine"
    assert agree("mine") == "mine"


def test_files_of_another_user_are_refused() -> None:
    with tempfile.TemporaryDirectory() as disk:  # pytest's own are closed to everybody else
        leave(run := Path(disk, "run"), "checkpoints/step-00000003/checkpoint.json", ".hydra/config.yaml")
        (run / ".hydra" / "config.yaml").chmod(0o444)
        for folder in (
            Path(disk),
            run,
            run / ".hydra",
            run / "checkpoints",
            run / "checkpoints" / "step-00000003",
        ):
            folder.chmod(0o777)
        said = r"its \.hydra/config\.yaml may not be read and written by user \d+; a folder in which"
        with as_nobody(), pytest.raises(ConfigError, match=said):
            agree(str(run))


def test_whether_a_run_may_resume_is_told_before_its_folder_is_agreed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(tmp_path / "mine", "checkpoints/step-00000003/checkpoint.json")
    never = composed("mine", "never")
    told = [run_dir.may_resume(*of) for of in ((never, Path("mine")), (never, Path("new")))]
    told += [run_dir.may_resume(composed(folder), Path(folder)) for folder in ("mine", "new")]
    assert told == [False, False, True, False]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # by now, in the folder of its first start
    assert run_dir.may_resume(never, Path("new"))


def test_folders_that_are_named_as_a_runs_but_of_none_stay(tmp_path: Path) -> None:
    leave(tmp_path / "mine", "checkpoints/best.pt", "wandb/mine", "tokenizer/tokenizer.json")
    assert agree("mine") == "mine"
    assert there(tmp_path / "mine") == {"checkpoints", "wandb", "tokenizer", ".lock"}


def test_files_that_no_run_has_left_are_not_written_over(tmp_path: Path) -> None:
    leave(tmp_path / "mine", "config.yaml", "notes.txt")
    with pytest.raises(ConfigError, match=r"mine: holds config\.yaml not left there by a run") as refused:
        agree("mine")
    assert there(tmp_path / "mine") == {"config.yaml", "notes.txt"}
    assert refused.value.fix == {"hydra.run.dir": Path("mine/run")}
    for marker in (".hydra/config.yaml", "metrics.jsonl", "summary.json"):  # any of which is a run's
        leave(tmp_path / "mine", "config.yaml", marker)
        assert agree("mine") == "mine"
        assert there(tmp_path / "mine") == {"notes.txt", ".lock"}


def test_a_folder_is_locked_while_a_run_uses_it(tmp_path: Path) -> None:
    (tmp_path / "mine-2").mkdir()
    with run_dir.agree_on_folder(composed("mine"), World()):
        with pytest.raises(ConfigError, match="another run is using this folder") as refused:
            agree("mine")
        assert refused.value.fix == {"hydra.run.dir": Path("mine-3")}
        with pytest.raises(ConfigError, match="another run is using this folder") as refused:
            agree("mine", resume="mine")
        assert refused.value.fix == {"resume": None, "init_from": "mine"}, "it continues in no other folder"
        other_rank = World(rank=1, size=2, local_size=2)  # of the same job, which rank 0 has claimed it for
        assert agree("mine", other_rank) == "mine"
    assert agree("mine") == "mine"


def test_the_folder_of_an_earlier_sweep_is_a_sweeps_again() -> None:
    sweep = OmegaConf.create({"name": "study", "hydra": {"sweep": {"dir": "mine"}}})
    Path("mine").mkdir()
    for table in ("summary.csv", "optimization_results.yaml"):  # Optuna's sweeper keeps no multirun.yaml
        (Path("mine") / table).touch()
        with pytest.raises(ConfigError, match=f"would write over its {table}"), run_dir.sweep_folder(sweep):
            pass
        (Path("mine") / table).unlink()
    (Path("mine") / "summary.csv").touch()
    (Path("mine") / ".lock").touch()
    with run_dir.sweep_folder(sweep) as folder:
        assert folder == Path("mine")


def test_a_sweep_that_has_not_begun_leaves_the_folders_that_were_there() -> None:
    at_noon = Path(
        "outputs/study/2026-01-02/12-00-00"
    )  # of another sweep, so that this one's has another name
    for folder, before in (("mine/new/er", Path("mine")), ("${run_dir:${name}}", at_noon)):
        before.mkdir(parents=True)
        sweep = OmegaConf.create({"name": "study", "hydra": {"sweep": {"dir": folder}}})
        with pytest.raises(KeyError), run_dir.sweep_folder(sweep):
            raise KeyError
        assert there(before) == set()
    assert there(at_noon.parent) == {at_noon.name}


def test_a_rank_that_does_not_reach_the_agents_store_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its torchrun was killed before it looked, or the name of the first host has no address here."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name, value in {"USE_AGENT_STORE": "True", "RUN_ID": "any"}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(SystemExit, match=f"torchrun has ended: nothing answers at 127.0.0.1:{port}"):
        connect(run_dir.TIMEOUT)

    def resolve(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(
        SystemExit, match=rf"at 127.0.0.1:{port} \(Name or service not known\); on its host, "
    ):
        connect(run_dir.TIMEOUT)


REFUSED = ConfigError("data.path", "mine.txt", "is not there", "a file")


def test_ranks_of_other_hosts_hear_that_a_rank_is_refused(
    agent: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank_0, elsewhere = World(0, 4, 0, 2, elastic=True), World(2, 4, 0, 2, elastic=True)
    with ThreadPoolExecutor(2) as beside:
        waits = beside.submit(agree, "mine", elsewhere)
        meets = beside.submit(fresh_store, agent, rank_0, "gloo")
        tell_other_hosts(REFUSED, World(0, 2, 0, 2, elastic=True))  # whose torchrun ends all of them
        time.sleep(3 * run_dir.POLL_S)
        assert not waits.done()
        tell_other_hosts(REFUSED, elsewhere)
        for heard in (waits, meets):
            with pytest.raises(
                ConfigError, match=r"^data.path=mine.txt: is not there \(on rank 3\); a file$"
            ):
                heard.result()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # the refusal was of the first start
    with monkeypatch.context() as short:
        short.setattr(run_dir, "TIMEOUT", timedelta(seconds=1))
        with pytest.raises(ConfigError, match="rank 0 did not agree on a folder within 1 s"):
            agree("mine", elsewhere)
    assert agree("mine", rank_0) == "mine"
    assert agree("mine", elsewhere) == "mine"


def test_a_restarted_job_goes_on_in_its_folder_once_its_ranks_have_left_it(agent: TCPStore) -> None:
    rank_0 = World(0, 2, 0, 2, elastic=True)
    assert agree("mine", rank_0) == "mine"
    leave(Path("mine"), "metrics.jsonl", ".hydra/config.yaml")
    with ThreadPoolExecutor(1) as beside, FileLock("mine/.lock") as held:
        waits = beside.submit(agree, "mine-2", rank_0)  # a dated folder would be another by now
        time.sleep(3 * run_dir.POLL_S)
        assert not waits.done()
        held.release()
        assert waits.result() == "mine"
    assert there(Path("mine")) == {"metrics.jsonl", ".hydra", ".lock"}
    elsewhere = World(1, 2, 0, 1, elastic=True)
    for begins in (False, True):
        if begins:
            tell_begun()
        for rank in (rank_0, elsewhere):
            with run_dir.agree_on_folder(composed("mine"), rank) as (_, restarted):
                assert restarted is begins, "until then, the checkpoints there are those of an earlier job"


def test_ranks_of_other_hosts_hear_that_a_rank_has_failed(agent: TCPStore) -> None:
    tell_other_hosts(ValueError("line 3 is wrong\n..."), World(2, 4, 0, 2, elastic=True))
    with pytest.raises(RunFailed, match=r"^rank 3 has ended: ValueError: line 3 is wrong$"):
        fresh_store(agent, World(1, 4, 1, 2, elastic=True), "gloo")


def test_what_a_rank_has_told_is_not_heard_by_a_host_that_starts_again_without_counting_that(
    agent: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ranks of one host fail, torchrun starts those of the others again, and leaves their restart count as it was."""
    rank_0, elsewhere = World(0, 2, 0, 1, elastic=True), World(1, 2, 0, 1, elastic=True)
    for _ in range(2):
        monkeypatch.setattr(other_hosts, "_meeting", [])  # of a new process
        with ThreadPoolExecutor(1) as beside:
            meets = beside.submit(fresh_store, agent, rank_0, "gloo")
            fresh_store(agent, elsewhere, "gloo")
            meets.result()
        hear_other_hosts()
        tell_other_hosts(ValueError("of this start"), elsewhere)
        with pytest.raises(RunFailed, match="of this start"):
            hear_other_hosts()


def test_a_host_with_another_number_of_ranks_tells_so(
    agent: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = {"WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "x", "RANK": "3"}
    with pytest.raises(WrongEnvironment) as refused:
        World.from_environment(env | {"MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "any"})
    tell_other_hosts(refused.value, World())
    with pytest.raises(ConfigError, match=r"does not divide WORLD_SIZE=4 \(on rank 3\)"):
        fresh_store(agent, World(0, 4, 0, 1, elastic=True), "gloo")


def test_nobody_is_told_where_the_agents_store_has_ended(
    agent: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
    tell_other_hosts(REFUSED, World(2, 4, 0, 2, elastic=True))
