"""Checkpoints of a run: what each records, whether the disk has room, and resuming from one."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence

import torch
import torch.distributed as dist

from tpresearch.checkpoint.collective import RankFailed
from tpresearch.checkpoint.disk import CHECKPOINTS_FOLDER, Checkpoint, Manifest
from tpresearch.checkpoint.save import Saver
from tpresearch.config.comparable import experiment_config
from tpresearch.config.compose import as_dict
from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import CheckpointConfig
from tpresearch.config.validate import total_steps
from tpresearch.data.rows import AnyCorpus
from tpresearch.launch import Run
from tpresearch.track.record import read_summary
from tpresearch.track.text import bytes_text
from tpresearch.train.optim import learning_rate
from tpresearch.train.preflight import Preflight
from tpresearch.train.profile import profiled_steps

log = logging.getLogger(__name__)


def build_saver(
    job: Preflight,
    run: Run,
    corpus: AnyCorpus,
    step: int,
    group: dist.ProcessGroup | None,
    initial_weights: str | None = None,
) -> Saver:
    """A saver that is ready for the steps after `step`. Collective.

    Args:
        initial_weights: on rank 0, the hash of those that the run has begun with, if init_from named them.

    Raises:
        ConfigError: if the run folder is not there for every rank, or cannot be written.
    """
    cfg, device = job.cfg, job.device
    assert device
    about = Manifest(
        step=step,
        tokens=0,
        loss=None,
        experiment=experiment_config(as_dict(cfg)) | {"initial_weights": initial_weights},
        steps=total_steps(cfg),
        corpus_hash=corpus.corpus_hash,
        tokenizer_hash=corpus.tokenizer_hash,
        rows=len(corpus.train),
        plan=cfg.parallel.name,
        mesh=job.sizes.nontrivial(),
        world_size=run.world.size,
        torch=torch.__version__,
    )
    on_cuda = device.type == "cuda"
    asked = cfg.checkpoint.background
    saver = Saver(
        run.folder, cfg.checkpoint, about, group, on_cuda if asked == "auto" else bool(asked), on_cuda
    )
    try:
        saver.start(step)
    except RankFailed as error:
        legal = "a folder on a disk that all hosts share, and that this user can write"
        raise ConfigError("hydra.run.dir", run.folder, str(error), legal) from None
    return saver


def is_complete(found: list[Checkpoint], job: Preflight, run: Run) -> bool:
    """Whether all steps of the run are done and recorded, so that nothing is left to do."""
    steps = total_steps(job.cfg)
    if not found or found[0].step < steps:
        return False
    try:
        done = read_summary(run.folder)["status"] == "completed"
    except (OSError, ValueError, KeyError):
        return False
    if done:
        log.info("all %d steps are done: %s; to continue, set more train.steps", steps, run.folder)
    return done


def check_disk(job: Preflight, run: Run, found: Sequence[Checkpoint]) -> None:
    """Refuse a disk without room for the checkpoints that are kept and the one that is being written, or for all that are to come if
    these are fewer.

    Args:
        found: those that are there, the newest first.
    """
    settings, steps = job.cfg.checkpoint, total_steps(job.cfg)
    if found and found[0].step >= steps:  # none is to come
        return
    wanted = max(_most_at_once(settings, found, steps) - len(found), 1)
    home = run.folder / CHECKPOINTS_FOLDER  # which may be a link to another disk
    each, free = checkpoint_bytes(job), shutil.disk_usage(home if home.is_dir() else run.folder).free
    if free < wanted * each:
        many = f"{wanted} checkpoints take" if wanted > 1 else "a checkpoint takes"
        why = f"its disk has {bytes_text(free)} free, and {many} {bytes_text(wanted * each)}"
        fewer = " or a larger checkpoint.keep_every" if settings.keep_every else ""
        legal = f"a folder on a larger disk, or a smaller checkpoint.keep{fewer}"
        keep = free // each + len(found) - 1
        fix = {"checkpoint.keep": keep} if free >= each and keep and not fewer else None
        raise ConfigError("hydra.run.dir", run.folder, why, legal, fix)


def _most_at_once(settings: CheckpointConfig, found: Sequence[Checkpoint], total: int) -> int:
    """The most checkpoints that will be there: the newest, the one that is being written, and older ones that stay permanently."""
    every, keep, begun = settings.every or total, settings.keep, found[0].step if found else 0
    due = (total - 1) // every - begun // every  # and the last step, which is always saved
    older = 0
    if always := settings.keep_every:
        newest_of_old = (begun // every + max(due - keep, 0)) * every
        older = sum(one.step % always == 0 for one in found[max(keep - due, 0) :])
        older += newest_of_old // always - begun // always
    return min(keep, len(found) + due) + 1 + older


def checkpoint_bytes(job: Preflight) -> int:
    """Bytes of a checkpoint: weights, and the optimizer's moments of those that learn."""
    moments, dtype = job.cfg.optimizer.moments, job.cfg.optimizer.moment_dtype
    weights = sum(p.nbytes for p in job.model.parameters())
    trained = [p for p in job.model.parameters() if p.requires_grad]
    return weights + moments * sum(
        p.numel() * getattr(torch, dtype).itemsize if dtype else p.nbytes for p in trained
    )


def log_resumption(found: list[Checkpoint], step: int, job: Preflight) -> None:
    """Log where the run resumes, if the budget has grown how the learning rate changes, and if the steps left are too few to be
    profiled that none is written.
    """
    checkpoint = next(c for c in found if c.step == step)
    manifest, cfg, steps = checkpoint.manifest, job.cfg, total_steps(job.cfg)
    log.info("resumes from step %d of %d: %s", step, steps, checkpoint.folder)
    if steps != manifest.steps and step < steps:
        totals, (peak, schedule) = (manifest.steps, steps), (cfg.optimizer.lr, cfg.schedule)
        before, now = (learning_rate(step, total, peak, schedule) for total in totals)
        rates = f"the learning rate of the next step is {now:.3g} instead of {before:.3g}"
        if math.isclose(now, before, rel_tol=1e-3):
            rates = f"the learning rate of the next step stays {now:.3g}"
        log.warning("the budget has grown from %d to %d steps: %s", manifest.steps, steps, rates)
    profiled = profiled_steps(cfg.profiler)
    if profiled and profiled[-1] > steps - step:
        text = "no profile is written: it would end with step %d of this process, and %d are left"
        log.warning(text + "; profiler.first_step", profiled[-1], steps - step)
