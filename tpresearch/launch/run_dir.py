"""The run folder: one for all ranks, agreed upon before a process group exists, and not shared with other jobs."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from tpresearch.checkpoint.disk import step_folders
from tpresearch.checkpoint.resume import AUTO, NEVER
from tpresearch.config.errors import ConfigError, refuse_unwritable
from tpresearch.config.other_hosts import begun_key, check_notice, job_key
from tpresearch.config.world import SlurmStep, World
from tpresearch.launch.agents_store import connect
from tpresearch.launch.claim import check_files, check_left_by_run, free_name, lock_folder, set_aside_record

if TYPE_CHECKING:
    from torch.distributed import TCPStore

TIMEOUT = timedelta(minutes=5)
"""How long a rank waits for rank 0, which may still be importing torch from a slow file system."""

POLL_S = 0.05
PROBE_BYTES = 64 << 10
"""More than the files that Hydra writes of a config, and as much as a disk must have free."""

SWEEP_RECORD = "multirun.yaml"
"""Hydra's record of a sweep: its config."""
SWEEP_TABLES = ("summary.csv", "summary.md", "optimization_results.yaml")


def dated_folder(name: str, at: datetime | None = None) -> str:
    """`outputs/<name>/<YYYY-MM-DD>/<HH-MM-SS>`, now. What the job uses in the end is settled by `agree_on_folder`."""
    return f"outputs/{name}/{at or datetime.now():%Y-%m-%d/%H-%M-%S}"


def typed_folder(settings: DictConfig) -> Path:
    """The folder that hydra.run.dir or hydra.sweep.dir names, with `~` as in all other paths."""
    return Path(os.path.expanduser(settings.dir))


def may_resume(composed: DictConfig, folder: Path) -> bool:
    """Whether a run in this folder may find its own checkpoints, judging before the folder is agreed upon."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return True
    with suppress(OSError):  # said later, where it matters
        return composed.get("resume") != NEVER and bool(step_folders(folder))
    return False


@contextmanager
def agree_on_folder(composed: DictConfig, world: World) -> Iterator[tuple[Path, bool]]:
    """Make the folder that `hydra.run.dir` names, the same one on all ranks, restarts included, and lock it.

    The default folder is new. A given one is resumed if it has a checkpoint, unless resume=never; an earlier record
    without a checkpoint is set aside, so that no two runs share a record. Refuses a folder that cannot be written, or that
    another run has, and ranks that have no way to agree.

    Returns: the folder, and whether this job had begun to train there before torchrun started its ranks again.
    """
    check_folder_names(composed)
    given = _is_given(composed.hydra.run)
    wanted = typed_folder(composed.hydra.run)
    name = str(composed.get("name") or "run")
    resume = composed.get("resume")
    resumes, is_named = resume != NEVER, resume not in (None, AUTO, NEVER)
    anew = {"resume": None, "init_from": resume}
    elsewhere = anew if is_named else _temporary_folder("hydra.run.dir", name)

    def claim(held: ExitStack, started: Path | None = None) -> Path:
        """The folder of this job; `started` is the one that it had before torchrun restarted it."""
        folder = started or _make("hydra.run.dir", wanted, given, elsewhere)
        check_left_by_run(folder)
        with refuse_unwritable("hydra.run.dir", folder, elsewhere):
            timeout_s = TIMEOUT.seconds if started else 0
            held.enter_context(lock_folder(folder, timeout_s, elsewhere=anew if is_named else None))
            if not started and not (resumes and step_folders(folder)):
                set_aside_record(folder)
        check_files(folder, anew if is_named else None)
        return folder

    with ExitStack() as held:
        started, begun, key = None, False, job_key("run_dir")
        if (store := connect(TIMEOUT)) is not None:
            begun = store.check([begun_key()])
            if world.rank == 0:
                started = Path(store.get(key).decode()) if store.check([key]) else None
                store.set(key, str(claim(held, started)))
            folder = _folder_of_rank_0(store, key)
        else:
            if world.size > 1 and not given:
                wanted, given = _slurm_folder(name), True
            folder = claim(held) if world.rank == 0 else _make("hydra.run.dir", wanted, given, elsewhere)
        yield folder, begun


def check_folder_names(composed: DictConfig) -> None:
    """Refuse settings that name no folder for the run, or none inside of it for Hydra's record."""
    _refuse_nameless("hydra.run.dir", composed.hydra.run.dir)
    record = OmegaConf.select(composed, "hydra.output_subdir")
    if record is not None and (record == ".." or Path(record).parts != (Path(record).name,)):
        why = "Hydra's record of the config is kept inside the run's folder"
        legal = "the name of a folder, or null"
        raise ConfigError("hydra.output_subdir", record, why, legal)


def _refuse_nameless(key: str, folder: str) -> None:
    if not str(folder).strip():
        raise ConfigError(key, "", "names no folder", "a folder, new or empty; . for this one")


@contextmanager
def sweep_folder(composed: DictConfig) -> Iterator[Path]:
    """Make the folder that `hydra.sweep.dir` names: one given by the user may exist, the default one is new.

    A sweep that is refused before it has begun leaves everything as it was. Refuses a folder that has no name, cannot be
    written, or has another's files where a sweep writes its own.
    """
    key, given = "hydra.sweep.dir", _is_given(composed.hydra.sweep)
    _refuse_nameless(key, composed.hydra.sweep.dir)
    wanted = typed_folder(composed.hydra.sweep)
    is_new = not given or not os.path.exists(wanted)
    parents = [each for each in wanted.parents if not os.path.exists(each)]
    folder = _make(key, wanted, given, _temporary_folder(key, str(composed.get("name") or "sweep")))
    _refuse_foreign_files(key, folder)
    record = folder / SWEEP_RECORD  # Hydra writes it before jobs are checked
    before, earlier = set(os.listdir(folder)), record.read_bytes() if record.exists() else None
    try:
        yield folder
    except Exception:
        if set(os.listdir(folder)) <= before | {SWEEP_RECORD}:
            record.unlink(missing_ok=True) if earlier is None else record.write_bytes(earlier)
            with suppress(OSError):  # the first that holds something
                for empty in [*([folder] if is_new else []), *parents]:
                    empty.rmdir()
        raise


def _refuse_foreign_files(key: str, folder: Path) -> None:
    record = folder / SWEEP_RECORD
    if (folder / ".lock").is_file() or (record.is_file() and b"\nhydra:" in b"\n" + record.read_bytes()):
        return
    for name in (SWEEP_RECORD, *SWEEP_TABLES):
        if os.path.lexists(folder / name):
            why = f"a sweep would write over its {name}, which is no sweep's"
            raise ConfigError(key, folder, why, "a new folder, an empty one, or that of an earlier sweep")


def _is_given(settings: DictConfig) -> bool:
    """Whether the user typed the folder, rather than leaving it to the date."""
    return "${run_dir:" not in str(OmegaConf.to_container(settings, resolve=False))


def _make(key: str, wanted: Path, given: bool, elsewhere: dict[str, object]) -> Path:
    with refuse_unwritable(key, wanted, elsewhere):
        if not given:
            return _make_new(wanted)
        wanted.mkdir(parents=True, exist_ok=True)
        _probe(wanted)
        return wanted


def _temporary_folder(key: str, name: str) -> dict[str, object]:
    return {key: Path(tempfile.gettempdir()) / name}


def writable_folder(wanted: str | Path) -> Path:
    """`wanted`, or the same name below the folder for temporary files where it could not be made."""
    parents = Path(wanted).absolute().parents
    there = next(folder for folder in (Path(wanted).absolute(), *parents) if os.path.exists(folder))
    try:
        _probe(there)
    except OSError:
        return Path(tempfile.gettempdir()) / wanted
    return Path(wanted)


def _make_new(wanted: Path) -> Path:
    """A new folder: `wanted`, or with -2, -3... if another job took it in the same second."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = free_name(wanted, "-") if os.path.lexists(wanted) else wanted
        with suppress(FileExistsError):
            folder.mkdir()
            try:
                _probe(folder)
            except OSError:
                folder.rmdir()
                raise
            return folder


def _probe(folder: Path) -> None:
    """Write as much as a run's first files, which would otherwise fail one by one where nobody expects it: an OSError here."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(bytes(PROBE_BYTES))


def _folder_of_rank_0(store: TCPStore, key: str) -> Path:
    """The folder that rank 0 has agreed on, unless a rank has ended (`check_notice`), or rank 0 has not agreed on one in time."""
    from torch.distributed import DistError

    until = time.monotonic() + TIMEOUT.seconds
    try:
        while not store.check([key]):
            check_notice(store)
            if time.monotonic() > until:
                why = f"rank 0 did not agree on a folder within {TIMEOUT.seconds} s"
                raise ConfigError("hydra.run.dir", None, why, "see the log of rank 0")
            time.sleep(POLL_S)
        return Path(store.get(key).decode())
    except DistError:  # the store was in the agent of its host
        why = "torchrun has ended on the host of rank 0"
        raise ConfigError("hydra.run.dir", None, why, "see the log of rank 0") from None


def _slurm_folder(name: str) -> Path:
    """A folder that every rank can derive by itself from the Slurm job's id and start time."""
    slurm = SlurmStep.from_environment()
    if slurm.job is None or slurm.started is None:
        why = "the ranks cannot agree on a folder, since torchrun's store is not shared with them"
        legal = "the same folder typed for all ranks, or torchrun without TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
        raise ConfigError("hydra.run.dir", None, why, legal, fix={"hydra.run.dir": dated_folder(name)})
    return Path(f"{dated_folder(name, datetime.fromtimestamp(slurm.started))}-{slurm.job}.{slurm.step}")
