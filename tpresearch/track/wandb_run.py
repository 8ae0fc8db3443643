"""One run in Weights & Biases, which never blocks training for long and never ends it.

The client's `init` blocks while the host is silent, its `finish` once the host has gone away. Here every
call is bounded and caught, and an error is reported once, in one line. Whatever was not sent is on disk for
`wandb sync`; metrics.jsonl has every row in any case.
"""

from __future__ import annotations

import logging
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

from tpresearch.config.compose import as_dict
from tpresearch.config.errors import first_line
from tpresearch.config.schema import Config
from tpresearch.track.names import X_AXIS, Row, step_of
from tpresearch.track.text import path_text
from tpresearch.track.wandb_files import cut_half_record, parts_of, rows_on_disk
from tpresearch.track.wandb_host import MAX_NAME_CHARS, MAX_TAG_CHARS, Mode, choose_mode

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

SETTINGS: dict[str, Any] = {
    "init_timeout": 15,  # seconds, for a host that accepts connections and then says nothing useful
    "finish_timeout": 30,  # seconds, for the upload of what is left
    "finish_timeout_raises": True,
    "x_transaction_log_flush_interval": 1,  # seconds; 15 by default, all lost with a killed client
    "console": "off",
    "disable_git": True,
    "save_code": False,
    "silent": True,
}
"""Our settings, unless the environment has its own (WANDB_INIT_TIMEOUT, WANDB_CONSOLE, WANDB_SAVE_CODE and so on)."""


class WandbRun:
    """An open run of the real client. Made by `start`; closed by `finish`."""

    def __init__(self, run: wandb.Run, sent: SentRows) -> None:
        self._run, self._sent = run, sent
        self._waiting: list[Row] = []
        """Rows whose steps the disk had no room for."""
        self._first_error: str | None = None
        self.id: str = run.id
        self.url: str | None = run.url
        """The run's page; None offline."""
        self.folder = Path(run.settings.sync_dir)

    @classmethod
    def start(cls, cfg: Config, run_dir: Path, name: str, device: str) -> Self | None:
        """Open a run, online if configured and possible, else offline; None if W&B is switched off (WANDB_MODE=disabled), or cannot
        even run offline. Its id is kept in `<run_dir>/wandb/id`: a run folder that has one continues that run.
        """
        logger = cfg.logger
        of_run = cfg.parallel.name, cfg.model.name, device, str(cfg.train.dtype)
        tags = [*(tag[:MAX_TAG_CHARS] for tag in of_run if tag), *logger.tags]
        about = {
            "project": logger.project,
            "entity": logger.entity,
            "group": logger.group or cfg.name[:MAX_NAME_CHARS],
            "job_type": logger.job_type,
            "name": name[:MAX_NAME_CHARS],
            "tags": list(dict.fromkeys(tags)),
            "config": as_dict(cfg),
            "dir": str(Path(os.path.expanduser(logger.dir)) if logger.dir else run_dir),
        }
        try:
            mode = choose_mode(logger.mode, set_up())
        except Exception as error:
            log.warning("W&B: off, because the client does not start: %s", first_line(error))
            return None
        attempts: tuple[Mode, ...] = () if mode == "disabled" else (mode, "offline")
        for attempt in dict.fromkeys(attempts):
            try:
                return cls._open(attempt, run_dir / "wandb" / "id", about)
            except Exception as error:
                log.warning("W&B: could not start in %s mode: %s", attempt, first_line(error))
                _tear_down()  # or the id counts as in use at the next attempt
        return None

    @classmethod
    def _open(cls, mode: Mode, kept_id: Path, about: dict[str, Any]) -> Self:
        import wandb

        set_up()
        kept_id.parent.mkdir(parents=True, exist_ok=True)
        Path(about["dir"]).mkdir(parents=True, exist_ok=True)  # the client takes a temporary one otherwise
        if (known := _kept_id(kept_id)) is None:
            kept_id.with_name("sent").unlink(missing_ok=True)  # of the run that this folder is a copy of
        known_as = known or os.environ.get("WANDB_RUN_ID") or uuid4().hex[:8]
        kept_id.write_text(f"{known_as}\n", encoding="utf-8")
        kept_id.with_name("folder").write_bytes(os.fsencode(kept_id.parents[1].absolute()))
        folders = Path(about["dir"]) / "wandb"
        for part in parts_of(folders, "offline-run", known_as):
            for path in part.glob("run-*.wandb"):
                cut_half_record(path)
        run = wandb.init(mode=mode, id=known_as, resume="allow", **about)
        # Under `wandb agent` the sweep has chosen another.
        kept_id.write_text(f"{run.id}\n", encoding="utf-8")
        sent = SentRows(kept_id.with_name("sent"))
        if run.id != known_as:
            sent.truncate(0)
        # What the server has, or the disk: rows may have been lost with a killed client.
        offline = parts_of(folders, "offline-run", run.id)
        if mode == "online" and not offline:
            sent.truncate(run.starting_step)
        elif not parts_of(folders, "run", run.id) and (rows := rows_on_disk(offline)) is not None:
            sent.truncate(rows)
        # Rows never use W&B's own step: it silently drops those below a resumed one.
        run.define_metric("*", step_metric=X_AXIS)
        if known is None and run.starting_step:
            said = "W&B: run %s has %d rows of another folder, and gets this one's too: WANDB_RUN_ID names it"
            log.warning(said, run.id, run.starting_step)
        opened = cls(run, sent)
        if opened.url:
            log.info("W&B: %s", opened.url)
        return opened

    def log(self, row: Row) -> None:
        """Log one row, unless the run already has it, as of a step that a resumed run repeats; undefined metrics are None."""
        self._waiting.append(row)
        self._log_waiting()

    def _log_waiting(self) -> None:
        with self._catching_errors():
            while self._waiting:
                is_new, row = self._sent.is_new(self._waiting[0]), self._waiting.pop(0)
                if is_new:
                    self._run.log(dict(row))

    def log_more(self, values: Row) -> None:
        """Log what a row lacked when it was logged: as another one of its step, since W&B changes none."""
        with self._catching_errors():
            self._sent.add(step_of(values))
            self._run.log(dict(values))

    def finish(self, summary: Mapping[str, Any], exit_code: int, preempted: bool = False) -> None:
        """Set the summary's figures, in place of an earlier end's, and close the run, in at most `finish_timeout` seconds."""
        self._log_waiting()
        with self._catching_errors():
            self._run.summary.update({"error": None, **summary} if "resumed" in summary else dict(summary))
            if preempted:
                self._run.mark_preempting()
        with self._catching_errors():
            self._run.finish(exit_code=exit_code)
        _tear_down(exit_code)

    def page_or_sync_command(self) -> str:
        """The run's page, or what uploads the parts of it that are not there, those of earlier processes too."""
        offline = parts_of(self.folder.parent, "offline-run", self.id)
        parts = [path_text(part) for part in offline if not any(part.glob("*.synced"))]
        if self.url and self._first_error:
            parts = ["--include-online", path_text(self.folder), *parts]
        sync = shlex.join(["wandb", "sync", *(parts or [path_text(self.folder)])])
        if self.url and not self._first_error:
            return f"{self.url}; what was offline: {sync}" if parts else self.url
        return sync

    @contextmanager
    def _catching_errors(self) -> Iterator[None]:
        """Catches whatever the client or the disk raises, and reports the first of it."""
        try:
            yield
        except Exception as error:
            if self._first_error is None:
                self._first_error = first_line(error)
                log.warning("W&B: %s; metrics.jsonl has every row", self._first_error)


def _kept_id(path: Path) -> str | None:
    """The W&B id of the run that a folder belongs to; None if there is none yet.

    A moved folder is the same run. A copy, beside the folder that it was made of, is another: both would log to one.
    """
    if not path.exists():
        return None
    known, noted = path.read_text(encoding="utf-8").strip(), path.with_name("folder")
    if noted.exists():
        original = Path(os.fsdecode(noted.read_bytes())) / "wandb" / "id"
        with suppress(OSError):  # it is no more, or of somebody else
            if not original.samefile(path) and original.read_text().strip() == known:
                log.info("W&B: a new run, since this folder is a copy of %s", path_text(original.parents[1]))
                return None
    return known


class SentRows:
    """The steps of the rows that were logged to W&B, in a file that outlives the process: each row must arrive once.

    A step is written before its row is logged. Where the server, or the client's own files, tell how many rows there
    are, those that were lost on the way are logged again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._steps = (
            [int(line) for line in path.read_text(encoding="utf-8").split()] if path.exists() else []
        )

    def truncate(self, count: int) -> None:
        """Forget the rows after the first `count`."""
        if count >= len(self._steps):
            return
        self._steps = self._steps[:count]
        self._path.write_text("".join(f"{step}\n" for step in self._steps))

    def is_new(self, row: Row) -> bool:
        """Whether this row is of a later step than all before it; if so, it counts as logged from now on."""
        step = step_of(row)
        if self._steps and step <= self._steps[-1]:
            return False
        self.add(step)
        return True

    def add(self, step: int) -> None:
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a") as file:
                file.write(f"{step}\n")
        except OSError:
            with suppress(OSError):
                os.truncate(self._path, size)  # half a number
            raise
        self._steps.append(step)


def set_up() -> wandb.Settings:
    """Apply our settings, as far as the client's version knows them; returns the result."""
    # The client's reports of its own errors hold up the interpreter's exit for 20 s where the host is silent.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    there = next(folder for folder in (caches, *caches.parents) if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        # Its log would go to the terminal, as in a container whose home is /.
        os.environ.setdefault("WANDB_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"wandb-{os.getuid()}"))
    import wandb

    known = wandb.Settings.model_fields
    unset = [key for key in SETTINGS if key in known and f"WANDB_{key.upper()}" not in os.environ]
    return wandb.setup(wandb.Settings(**{key: SETTINGS[key] for key in unset})).settings


def _tear_down(exit_code: int = 0) -> None:
    """Stop the client, so that a later run of this process gets a sound one that sees its environment."""
    import wandb

    with suppress(Exception):
        wandb.teardown(exit_code=exit_code)
