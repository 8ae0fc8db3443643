"""TensorBoard, if `logger.tensorboard` is set: the same rows as the record, in the run folder."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import LoggerConfig
from tpresearch.track.names import Row, step_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


def check_tensorboard(logger: LoggerConfig) -> None:
    """Refuse logger.tensorboard if TensorBoard is not installed."""
    if logger.tensorboard and importlib.util.find_spec("tensorboard") is None:
        legal = "false, or pip install 'tpresearch[tensorboard]'"
        raise ConfigError("logger.tensorboard", True, "TensorBoard is not installed", legal)


class TensorboardRun:
    """Event files in <run>/tensorboard. A resumed run hides what an earlier start wrote after its checkpoint."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "tensorboard"
        self._writer: SummaryWriter | None = None
        self._failed = False

    def log(self, row: Row, start_step: int) -> None:
        """Every defined metric of the row, by its step. An error is reported once and ends TensorBoard, not the run.

        Args:
            start_step: the step after which this start's rows begin: later ones of an earlier start are hidden.
        """
        if self._failed:
            return
        step = step_of(row)
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter  # late: it is optional

                self._writer = SummaryWriter(str(self._folder), purge_step=min(step, start_step + 1))
            for name, value in row.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)
        except Exception as error:
            log.warning("TensorBoard stops at step %d, the record continues: %s", step, error)
            self._failed = True

    def close(self) -> None:
        if self._writer is not None and not self._failed:
            try:
                self._writer.close()
            except Exception as error:
                log.warning("TensorBoard's files could not be closed: %s", error)
