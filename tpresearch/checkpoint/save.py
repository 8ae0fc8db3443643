"""Saving a run's state, by all ranks together: synchronously, or in the background from a copy."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor

from tpresearch.checkpoint import disk
from tpresearch.checkpoint.collective import RankFailed, dcp_arguments, on_all_ranks
from tpresearch.checkpoint.disk import BrokenCheckpoint, Manifest, WrittenFile, draft_of, folder_of
from tpresearch.checkpoint.faults import fault_point
from tpresearch.checkpoint.state import MODEL, CheckpointedState, state_of
from tpresearch.config.errors import RunFailed
from tpresearch.config.schema import CheckpointConfig

log = logging.getLogger(__name__)


class SaveFailed(RunFailed):
    """The last step of a run could not be saved; the message says why."""


class InFlight(NamedTuple):
    """A checkpoint that is being written in the background."""

    manifest: Manifest
    began: float
    written: Future[Any]


class Saver:
    """Saves a run's state at the configured steps, and keeps the configured number of checkpoints. All ranks call it.

    If a checkpoint cannot be written, for example on a full disk, it is skipped with a warning. Only if it would
    have been the last one is this an error.

    Args:
        run: the run folder, on a disk that all hosts share.
        common: the manifest fields that all checkpoints of this run share.
        group: a gloo group for checkpoints only; None for a single process.
        background: write in the background while training continues.
        on_cuda: whether the state is on CUDA: it is then copied through pinned memory, which is reused.
    """

    def __init__(
        self,
        run: Path,
        settings: CheckpointConfig,
        common: Manifest,
        group: dist.ProcessGroup | None,
        background: bool = False,
        on_cuda: bool = False,
    ) -> None:
        self._run, self._settings, self._common, self._group = run, settings, common, group
        self._rank = group.rank() if group else 0
        self._background, self._on_cuda = background, on_cuda
        self._stager = BlockingAsyncStager(cache_staged_state_dict=True)
        # A new thread uses the first GPU, on which DCP's writer, which waits for a stream, would create a context for each rank.
        begin = functools.partial(torch.cuda.set_device, torch.cuda.current_device()) if on_cuda else None
        self._thread = ThreadPoolExecutor(1, "checkpoint", begin)
        self._in_flight: InFlight | None = None
        self._last_step = -1
        self.started = 0
        """Number of checkpoints started in the background."""

    def start(self, step: int) -> None:
        """Prepare to save steps after `step`: set aside folders of later steps and remove drafts.

        Raises:
            RankFailed: if some rank does not see the folder, or nothing can be written there.
        """
        self._last_step = step

        def make() -> str | None:
            if self._rank:
                return None
            (self._run / disk.CHECKPOINTS_FOLDER).mkdir(exist_ok=True)
            for folder in disk.set_aside_after(self._run, step):
                log.warning("a checkpoint of a later step is set aside: %s", folder.name)
            disk.make_draft(draft_of(folder_of(self._run, step + 1)))  # to check that it can be made
            self._tidy()
            mark = f".shared-{uuid4().hex}"
            (self._run / mark).touch()
            return mark

        mark, *_ = on_all_ranks(make, self._group)
        assert mark
        try:
            on_all_ranks(lambda: self._check_shared(mark), self._group)
        finally:
            if self._rank == 0:
                (self._run / mark).unlink(missing_ok=True)

    def _tidy(self) -> None:
        with suppress(OSError):  # what cannot be deleted now is deleted the next time
            disk.prune(self._run, self._settings.keep, self._settings.keep_every)
        disk.clear_drafts(self._run)

    def _check_shared(self, mark: str) -> None:
        """Refuse a host that has such a folder on a disk of its own. The name of the mark is new: of another one, such as
        `checkpoints`, a network file system may have remembered that it was not there."""
        if not (self._run / mark).exists():
            why = "what rank 0 writes there is not seen here: all hosts have to share the disk of the run folder"
            raise BrokenCheckpoint(why)

    def is_due(self, step: int) -> bool:
        return self._settings.every is not None and step % self._settings.every == 0

    def save(self, trained: CheckpointedState, tokens: int, loss: float | None, last: bool = False) -> None:
        """Write the state of this step, or start writing it in the background. Collective.

        Args:
            tokens: trained on so far.
            last: whether no step follows; the checkpoint is then complete when this returns.

        Raises:
            SaveFailed: if it is the last and cannot be written.
        """
        self.finish()
        if trained.step == self._last_step:
            return
        self._last_step = trained.step
        manifest = dataclasses.replace(self._common, step=trained.step, tokens=tokens, loss=loss)
        buffers = {f"{MODEL}{name}" for name, _ in trained.model.named_buffers()}
        try:
            with state_of(trained) as state:
                self._write(state, buffers, manifest, background=self._background and not last)
        except RankFailed as error:
            self._report_failure(manifest, error, last)

    def _write(
        self, state: dict[str, Tensor], buffers: Collection[str], manifest: Manifest, background: bool
    ) -> None:
        began = time.monotonic()
        draft = draft_of(folder_of(self._run, manifest.step))

        def begin() -> None:
            if self._rank == 0:
                disk.make_draft(draft)
            fault_point("made")

        on_all_ranks(begin, self._group)
        if background:
            copies: list[dict[str, Tensor]] = []
            on_all_ranks(lambda: copies.append(self._copy_to_host(state)), self._group)
            written = self._thread.submit(self._write_files, copies[0], buffers, draft)
            self._in_flight, self.started = InFlight(manifest, began, written), self.started + 1
        else:
            self._write_files(state, buffers, draft)
            self._commit(manifest, began)

    def _write_files(self, state: dict[str, Tensor], buffers: Collection[str], draft: Path) -> None:
        """Write this rank's part of the files. Collective, in any thread."""
        on_all_ranks(lambda: check_finite(state, buffers), self._group)
        with dcp_arguments(self._group) as how:
            dcp.save(state, storage_writer=_Writer(draft), **how)

    def _copy_to_host(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A copy of the state in host memory, which is reused: on CUDA it is pinned.

        Raises:
            BrokenCheckpoint: if there is no room for it.
        """
        kept = self._stager.state_dict_cache
        if kept is not None and kept.keys() == state.keys():
            return self._stager.stage(state)
        try:
            copy = self._stager.state_dict_cache = BlockingAsyncStager(self._on_cuda).stage(state)
            return copy
        except RuntimeError as error:  # CUDA's too, which says "out of memory" of what it cannot pin
            if not re.search("out of memory|allocate memory", str(error)):
                raise
            why = "host memory has no room for a copy of the state; checkpoint.background=false writes without one"
            raise BrokenCheckpoint(why) from None

    @property
    def written(self) -> int:
        """Number of background checkpoints whose files this rank has written."""
        unfinished = self._in_flight is not None and not self._in_flight.written.done()
        return self.started - int(unfinished)

    def commit_written(self, written: int) -> None:
        """Commit the checkpoint written in the background, once all ranks have written it. Collective.

        Args:
            written: the minimum of all ranks' `written`.
        """
        if self._in_flight and written == self.started:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written in the background, if any. Collective."""
        if self._in_flight is None:
            return
        manifest, began, written = self._in_flight
        self._in_flight = None
        try:
            written.result()
            self._commit(manifest, began)
        except RankFailed as error:
            self._report_failure(manifest, error)

    def _commit(self, manifest: Manifest, began: float) -> None:
        folder = folder_of(self._run, manifest.step)
        draft = draft_of(folder)

        def settle() -> dict[str, WrittenFile]:
            fault_point("written")
            mine = [*draft.glob(f"__{self._rank}_*"), *([draft / ".metadata"] if self._rank == 0 else [])]
            return {path.name: disk.sync_and_checksum(path) for path in mine}

        files = {name: file for part in on_all_ranks(settle, self._group) for name, file in part.items()}

        def commit() -> None:
            if self._rank:
                return
            with suppress(FileNotFoundError):
                disk.sync(self._run / "metrics.jsonl")  # whose rows of these steps must not be lost alone
            disk.check_sizes(draft, files)
            fault_point("settled")
            disk.commit(folder, dataclasses.replace(manifest, files=files))
            self._tidy()

        on_all_ranks(commit, self._group)
        size_mib, seconds = sum(file.bytes for file in files.values()) / 2**20, time.monotonic() - began
        log.info("checkpoint: step %d, %.1f MiB in %.1f s", manifest.step, size_mib, seconds)

    def _report_failure(self, manifest: Manifest, why: RankFailed, last: bool = False) -> None:
        if self._rank == 0:
            disk.clear_drafts(self._run)
        if last:
            raise SaveFailed(f"there is no checkpoint of the last step, {manifest.step}: {why}")
        log.warning("step %d: checkpoint not saved: %s", manifest.step, why)


class _Writer(dcp.FileSystemWriter):
    """DCP's; files are synced by `disk.sync_and_checksum`, since torch below 2.14 syncs them before it has flushed them."""

    def __init__(self, draft: Path) -> None:
        super().__init__(draft, sync_files=False)

    def write_data(self, plan: Any, planner: Any) -> Any:
        fault_point("writing")
        done = super().write_data(plan, planner)
        fault_point("filed")
        return done

    def finish(self, metadata: Any, results: Any) -> None:
        fault_point("metadata")
        super().finish(metadata, results)


def check_finite(state: dict[str, Tensor], buffers: Collection[str] = ()) -> None:
    """Refuse to save NaN and infinity: no run can resume from such a state.

    Args:
        buffers: those of these names may have infinity in them, as an attention mask has.

    Raises:
        BrokenCheckpoint: naming the first tensor that is refused.
    """
    for name, tensor in state.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.is_floating_point() and local.numel():
            ends = torch.stack(torch.aminmax(local.detach()))
            if (ends.isnan() if name in buffers else ~ends.isfinite()).any():
                raise BrokenCheckpoint(f"{name} is not finite")
