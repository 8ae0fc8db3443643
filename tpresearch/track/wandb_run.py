"""One run in Weights & Biases, of which training never waits long and never dies.

The client's `init` blocks while the host is silent, its `finish` once the host has gone away. Here every
call is bounded and caught, and whatever was not sent lies on disk for `wandb sync`. A trouble is said once,
in one line.
"""

from __future__ import annotations

import logging
import netrc
import os
import socket
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import urlsplit
from uuid import uuid4

from tpresearch.config.schema import LoggerConfig, WandbMode
from tpresearch.track.names import X_AXIS, Row
from tpresearch.track.shown import path_text

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline", "disabled"]

log = logging.getLogger(__name__)

PROBE_S = 2.0
"""Longest wait for the host to accept a connection."""
SETTINGS: dict[str, Any] = {
    "init_timeout": 15,  # seconds; a host that accepts connections and then says nothing useful
    "finish_timeout": 30,  # seconds for the upload of what is left
    "finish_timeout_raises": True,
    "console": "off",
    "disable_git": True,
    "save_code": False,
    "silent": True,
}
"""Ours, unless the environment has its own (WANDB_INIT_TIMEOUT, WANDB_CONSOLE, WANDB_SAVE_CODE and so on)."""


class WandbRun:
    """An open run of the real client. Made by `start`; close it with `finish`."""

    def __init__(self, run: wandb.Run) -> None:
        self._run = run
        self._ails: str | None = None
        self.id: str = run.id
        self.url: str | None = run.url
        self.folder = Path(run.settings.sync_dir)

    @classmethod
    def start(
        cls,
        logger: LoggerConfig,
        run_dir: Path,
        *,
        name: str,
        group: str,
        tags: Sequence[str],
        config: Mapping[str, Any],
    ) -> Self | None:
        """Open a run, online where that is wanted and possible, else offline.

        The run's id is kept in `<run_dir>/wandb/id`; a run folder that has one continues that run.

        Returns:
            None where W&B is switched off (WANDB_MODE=disabled), or neither way works.
        """
        kept_id = run_dir / "wandb" / "id"
        folder = Path(logger.dir).expanduser() if logger.dir else run_dir
        try:
            import wandb

            settings = {
                key: value for key, value in SETTINGS.items() if f"WANDB_{key.upper()}" not in os.environ
            }
            wandb.setup(wandb.Settings(**settings))
            mode = _mode(logger.mode, wandb.setup().settings)
            if mode == "disabled":
                return None
            kept_id.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            run_id = kept_id.read_text().strip() if kept_id.exists() else uuid4().hex[:8]
        except Exception as error:
            log.warning("W&B: off, it does not start: %s", _line(error))
            return None
        attempts: list[Mode] = ["online", "offline"] if mode == "online" else ["offline"]
        for attempt in attempts:
            try:
                wandb.setup(wandb.Settings(**settings))
                run = wandb.init(
                    mode=attempt,
                    id=run_id,
                    resume="allow",
                    dir=str(folder),
                    project=logger.project,
                    entity=logger.entity,
                    group=group,
                    job_type=logger.job_type,
                    name=name,
                    tags=list(tags),
                    config=dict(config),
                )
                # Rows are never given W&B's own step: it drops those below a resumed step without a word.
                run.define_metric("*", step_metric=X_AXIS)
                kept_id.write_text(run.id + "\n")
                opened = cls(run)
            except Exception as error:
                log.warning("W&B: %s failed: %s", attempt, _line(error))
                with suppress(Exception):  # or the id counts as in use at the next attempt
                    wandb.teardown(exit_code=0)
            else:
                if opened.url:
                    log.info("W&B: %s", opened.url)
                return opened
        return None

    def log(self, row: Row) -> None:
        """Hand over one row; None where a metric is undefined, as in metrics.jsonl."""
        try:
            self._run.log(dict(row))
        except Exception as error:
            self._trouble(error)

    def finish(self, summary: Mapping[str, Any], exit_code: int, preempted: bool = False) -> None:
        """Set the summary's figures and close the run, after at most `finish_timeout` seconds."""
        try:
            self._run.summary.update(dict(summary))
            if preempted:
                self._run.mark_preempting()
        except Exception as error:
            self._trouble(error)
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:
            self._trouble(error)
        import wandb

        with suppress(Exception):  # so that nothing is left for the client's hook at the interpreter's exit
            wandb.teardown(exit_code=exit_code)

    def where(self) -> str:
        """Where to look: the run's page, or the command that uploads it."""
        return self.url if self.url and not self._ails else f"wandb sync {path_text(self.folder)}"

    def _trouble(self, error: Exception) -> None:
        if self._ails is None:
            log.warning(
                "W&B: %s; what it did not take is on disk: wandb sync %s",
                _line(error),
                path_text(self.folder),
            )
        self._ails = _line(error)


def _mode(wanted: WandbMode, settings: wandb.Settings) -> Mode:
    """online, offline or disabled: the config's wish, then the environment's, then what can work."""
    if wanted is WandbMode.offline:
        return "offline"
    if wanted is WandbMode.auto and settings.mode in ("offline", "dryrun"):
        log.info("W&B: offline, as WANDB_MODE asks")
        return "offline"
    if wanted is WandbMode.auto and settings.mode == "disabled":
        log.info("W&B: off, as WANDB_MODE asks")
        return "disabled"
    if not has_key(settings):
        log.warning("W&B: offline, for there is no API key; `wandb login` or WANDB_API_KEY gives one")
        return "offline"
    if not answers(settings.base_url):
        log.warning("W&B: offline, for %s does not answer", settings.base_url)
        return "offline"
    return "online"


def has_key(settings: wandb.Settings) -> bool:
    """Whether the client would find credentials: in its settings, the environment or the netrc file."""
    if settings.api_key or settings.identity_token_file:
        return True
    try:
        accounts = netrc.netrc(os.environ.get("NETRC") or Path("~/.netrc").expanduser())
    except (OSError, netrc.NetrcParseError):
        return False
    return accounts.authenticators(urlsplit(settings.base_url).netloc) is not None


def answers(url: str, timeout_s: float = PROBE_S) -> bool:
    """Whether something accepts a TCP connection at the URL's host, or at the proxy that leads there."""
    target = urlsplit(url)
    proxy = urllib.request.getproxies().get(target.scheme)
    if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy)
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        socket.create_connection((target.hostname or "", port), timeout_s).close()
    except OSError:
        return False
    return True


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
