"""Saving a run's state, by all ranks together: synchronously, or in the background from a copy."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor

from tpresearch.checkpoint import disk
from tpresearch.checkpoint.disk import BrokenCheckpoint, Mark, WrittenFile, draft_of, folder_of
from tpresearch.checkpoint.faults import point
from tpresearch.checkpoint.state import Trained, state_of
from tpresearch.checkpoint.together import RankFailed, dcp_among, together
from tpresearch.config.errors import RunFailed
from tpresearch.config.schema import CheckpointConfig

log = logging.getLogger(__name__)


class NotSaved(RunFailed):
    """The last step of a run could not be saved; the message says why."""


class InFlight(NamedTuple):
    """A checkpoint that is being written in the background."""

    mark: Mark
    began: float
    written: Future[Any]


class Saver:
    """Saves a run's state at the configured steps, and keeps the configured number of checkpoints. All ranks call it.

    If a checkpoint cannot be written, for example on a full disk, it is skipped with a warning. Only if it would
    have been the last one is this an error.

    Args:
        run: the run folder, on a disk that all hosts share.
        about: the fields that all marks of this run share.
        group: of gloo, for this alone; None for a single process.
        beside: write in the background while training continues.
        on_cuda: whether the state is on CUDA: it is then copied through pinned memory, which is reused.
    """

    def __init__(
        self,
        run: Path,
        settings: CheckpointConfig,
        about: Mark,
        group: dist.ProcessGroup | None,
        beside: bool = False,
        on_cuda: bool = False,
    ) -> None:
        self._run, self._settings, self._about, self._group = run, settings, about, group
        self._rank = group.rank() if group else 0
        self._beside, self._on_cuda = beside, on_cuda
        self._stager = BlockingAsyncStager()
        self._copy: dict[str, Tensor] | None = None
        # A thread begins on the first GPU, where DCP's writer, which waits for a stream, would make each rank a context.
        begin = functools.partial(torch.cuda.set_device, torch.cuda.current_device()) if on_cuda else None
        self._thread = ThreadPoolExecutor(1, "checkpoint", begin)
        self._in_flight: InFlight | None = None
        self._newest = -1
        self.begun = 0
        """Number of checkpoints begun in the background."""

    def start(self, step: int) -> None:
        """Prepare to save steps after `step`: set aside folders of later steps and remove drafts.

        Raises:
            RankFailed: if some rank does not see the folder, or nothing can be written there.
        """
        self._newest = step

        def make() -> None:
            if self._rank == 0:
                (self._run / disk.FOLDER).mkdir(exist_ok=True)
                for folder in disk.cut_after(self._run, step):
                    log.warning("a checkpoint of a later step is set aside: %s", folder.name)
                disk.begin(draft_of(folder_of(self._run, step + 1)))  # to see that it can be
                self._tidy()

        together(make, self._group)
        together(self._look, self._group)

    def _tidy(self) -> None:
        with suppress(OSError):  # what cannot be deleted now goes the next time
            disk.prune(self._run, self._settings.keep, self._settings.keep_every)
        disk.clear_drafts(self._run)

    def _look(self) -> None:
        if not (self._run / disk.FOLDER).is_dir():
            raise BrokenCheckpoint(
                f"{self._run} is not there: all hosts have to share the disk of the run folder"
            )

    def due(self, step: int) -> bool:
        return self._settings.every is not None and step % self._settings.every == 0

    def save(self, trained: Trained, tokens: int, loss: float | None, last: bool = False) -> None:
        """Write the state of this step, or start writing it in the background. Collective.

        Args:
            tokens: that the run has been trained on.
            last: whether no step follows; the checkpoint is then complete when this returns.

        Raises:
            NotSaved: if it is the last and cannot be written.
        """
        self.finish()
        if trained.step == self._newest:
            return
        self._newest = trained.step
        mark = dataclasses.replace(self._about, step=trained.step, tokens=tokens, loss=loss)
        try:
            self._write(state_of(trained), mark, beside=self._beside and not last)
        except RankFailed as error:
            self._give_up(mark, error, last)

    def _write(self, state: dict[str, Tensor], mark: Mark, beside: bool) -> None:
        began = time.monotonic()
        draft = draft_of(folder_of(self._run, mark.step))

        def begin() -> None:
            if self._rank == 0:
                disk.begin(draft)
            point("made")

        together(begin, self._group)
        if beside:
            written = self._thread.submit(self._put, self._copied(state), draft)
            self._in_flight, self.begun = InFlight(mark, began, written), self.begun + 1
        else:
            self._put(state, draft)
            self._commit(mark, began)

    def _put(self, state: dict[str, Tensor], draft: Path) -> None:
        """Write this rank's part of the files. Collective, in whatever thread."""
        together(lambda: check_finite(state), self._group)
        with dcp_among(self._group) as how:
            dcp.save(state, storage_writer=_Writer(draft), **how)

    def _copied(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state in host memory, which is kept for the next time: on CUDA it is pinned, and else touched but once."""
        if self._copy is None or self._copy.keys() != state.keys():
            stager = BlockingAsyncStager(cache_staged_state_dict=self._on_cuda)
            copy = self._copy = stager.stage(state)
            self._stager = BlockingAsyncStager(cache_staged_state_dict=True)
            self._stager.state_dict_cache = copy
            return copy
        return self._stager.stage(state)

    @property
    def written(self) -> int:
        """Number of background checkpoints whose files this rank has written."""
        still = self._in_flight is not None and not self._in_flight.written.done()
        return self.begun - int(still)

    def settle(self, written: int) -> None:
        """Commit the checkpoint written in the background, once all ranks have written it. Collective.

        Args:
            written: the minimum of all ranks' `written`.
        """
        if self._in_flight and written == self.begun:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written in the background, if any. Collective."""
        if self._in_flight is None:
            return
        mark, began, written = self._in_flight
        self._in_flight = None
        try:
            written.result()
            self._commit(mark, began)
        except RankFailed as error:
            self._give_up(mark, error)

    def _commit(self, mark: Mark, began: float) -> None:
        folder = folder_of(self._run, mark.step)
        draft = draft_of(folder)

        def settle() -> dict[str, WrittenFile]:
            point("written")
            mine = [*draft.glob(f"__{self._rank}_*"), *([draft / ".metadata"] if self._rank == 0 else [])]
            return {path.name: disk.settled(path) for path in mine}

        files = {name: file for part in together(settle, self._group) for name, file in part.items()}

        def commit() -> None:
            if self._rank:
                return
            with suppress(FileNotFoundError):
                disk.sync(self._run / "metrics.jsonl")  # whose rows of these steps must not be lost alone
            point("settled")
            disk.commit(folder, dataclasses.replace(mark, files=files))
            self._tidy()

        together(commit, self._group)
        size = sum(file.bytes for file in files.values())
        log.info("checkpoint: step %d, %.1f MiB in %.1f s", mark.step, size / 2**20, time.monotonic() - began)

    def _give_up(self, mark: Mark, why: RankFailed, last: bool = False) -> None:
        if self._rank == 0:
            disk.clear_drafts(self._run)
        if last:
            raise NotSaved(f"there is no checkpoint of the last step, {mark.step}: {why}")
        log.warning("step %d: checkpoint not saved: %s", mark.step, why)


class _Writer(dcp.FileSystemWriter):
    """DCP's; files are synced by `disk.settled`, since torch below 2.14 syncs them before it has flushed them."""

    def __init__(self, draft: Path) -> None:
        super().__init__(draft, sync_files=False)

    def write_data(self, plan: Any, planner: Any) -> Any:
        point("writing")
        done = super().write_data(plan, planner)
        point("filed")
        return done

    def finish(self, metadata: Any, results: Any) -> None:
        point("metadata")
        super().finish(metadata, results)


def check_finite(state: dict[str, Tensor]) -> None:
    """Raises:
    BrokenCheckpoint: for the first tensor with NaN or infinity: no run can resume from such a state.
    """
    for name, tensor in state.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.is_floating_point() and local.numel():
            least, most = torch.aminmax(local.detach())
            if not (torch.isfinite(least) & torch.isfinite(most)).item():
                raise BrokenCheckpoint(f"{name} is not finite")
