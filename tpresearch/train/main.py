"""A training run from start to end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tpresearch.checkpoint.collective import checkpoint_group, on_all_ranks
from tpresearch.checkpoint.disk import Checkpoint
from tpresearch.checkpoint.load import restore
from tpresearch.checkpoint.resume import check_corpus, checkpoints_to_resume
from tpresearch.config.axes import AXES
from tpresearch.config.compose import as_dict
from tpresearch.config.errors import refuse_unwritable
from tpresearch.config.validate import total_steps
from tpresearch.data.pipeline import prepare
from tpresearch.data.rows import AnyCorpus, PackedCorpus, SyntheticCorpus, check_enough_rows, described
from tpresearch.hf.files import tokenizer_hash_of, weights_hash
from tpresearch.launch import Run
from tpresearch.launch.agents_store import tell_begun, tell_stopped
from tpresearch.launch.stop import StopFlag, Stopped
from tpresearch.ledger.entries import Expected
from tpresearch.ledger.formulas import expected_entries
from tpresearch.ledger.memory_formulas import expected_memory
from tpresearch.parallel.device import Device, device_notes
from tpresearch.parallel.group import agree_on_nothing_left, process_group
from tpresearch.parallel.mesh import build_mesh
from tpresearch.plan.describe import describe_mesh, describe_model, plan_text
from tpresearch.track.next_steps import NextSteps
from tpresearch.track.record import was_begun
from tpresearch.track.tracker import RunFacts, Tracker
from tpresearch.train.agreement import AgreedGradients
from tpresearch.train.assemble import assemble
from tpresearch.train.loop import Loop
from tpresearch.train.lost_rank import ending_with_other_ranks, leave_failed_ranks
from tpresearch.train.observe import Observer
from tpresearch.train.out_of_memory import refusing_out_of_memory
from tpresearch.train.preflight import Preflight
from tpresearch.train.profile import Profiler, profiled_steps
from tpresearch.train.same_job import check_same_job
from tpresearch.train.saving import build_saver, check_disk, is_complete, log_resumption
from tpresearch.train.shapes import refusing_shapes
from tpresearch.train.speed import Speed
from tpresearch.train.stopping import AgreedStop
from tpresearch.train.watch import CountedStep, PeakMemory, Timing

log = logging.getLogger(__name__)


def train(job: Preflight, run: Run, watching: Sequence[Observer] = ()) -> None:
    """Train as configured and leave a record in the run folder. With plan_only, print the plan and stop.

    Args:
        watching: observers in addition to those of every run.

    Raises:
        ConfigError: for errors that only the prepared data or the run folder reveal, such as a corpus too short for one batch,
            and for a device that is out of memory.
        NonfiniteError: unless train.on_nonfinite=skip.
        SaveFailed: if the last step could not be saved.
        Stopped: after SIGTERM or Ctrl-C, on all ranks after the same step, which is saved.
    """
    text = plan_text(job.model, job.plan)
    if job.device is None:
        if run.world.rank == 0:
            print(f"{job.about}\n\n{text}")
        return
    with StopFlag() as flag:
        corpus = prepare(job.cfg.data, job.cfg.tokenizer, run.world, partial(check_stop, flag))
        check_rows(corpus, job)
        restarted = run.restarted or was_begun(run.folder, as_dict(job.cfg))
        found = checkpoints_to_resume(job.cfg, run.folder, restarted)
        for checkpoint in found:
            check_corpus(checkpoint.manifest, corpus.corpus_hash, corpus.tokenizer_hash, len(corpus.train))
        if is_complete(found, job, run):
            agree_on_nothing_left(run.world, flag.check)
            return
        check_disk(job, run, found)
        steps = total_steps(job.cfg) if job.cfg.data.repeat_batches is None else 1
        about = described(corpus, steps * job.cfg.train.global_batch_size)
        log.info("data: %s, %s", job.cfg.data.source, about)
        check_stop(flag)
        train_on(corpus, found, job, run, text, flag, watching)


def check_stop(flag: StopFlag) -> None:
    """`StopFlag.check` before training, where no report says why the process ends.

    Raises:
        Stopped: with the exit code of the signal.
    """
    if flag.requested is not None:
        log.warning("stopped by %s before the first step; the same command starts again", flag.requested.name)
    flag.check()


def train_on(
    corpus: AnyCorpus,
    found: list[Checkpoint],
    job: Preflight,
    run: Run,
    plan: str,
    flag: StopFlag,
    watching: Sequence[Observer],
) -> None:
    """Train on all ranks, on prepared data, from the first of these checkpoints that can be loaded."""
    device, world = job.device, run.world
    assert device
    with (
        open_tracker(job, run, corpus, plan, found) as tracker,
        ending_with_other_ranks(run, tracker, flag),
        refusing_out_of_memory(job.cfg, job.sizes, world, trains=False),
        process_group(device, world, flag.check),
        flag.calling(partial(leave_failed_ranks, device)),
    ):
        check_same_job(job, corpus)
        mesh = build_mesh(job.sizes, device.type)
        log.info("Device Mesh created: device_mesh=%s", describe_mesh(job.sizes, device.type))
        log_notes(job, corpus, is_new=not found)
        observers = build_observers(job, mesh, device, tracker)  # before the model is sharded
        if profiled_steps(job.cfg.profiler):
            where = run.folder / "profiler"
            watching = [Profiler(job.cfg.profiler, where, world.rank, device.type == "cuda"), *watching]
        group = checkpoint_group()
        # Those of rank 0: a shared disk may show the others an older state.
        found, *_ = on_all_ranks(lambda: found, group)
        restoring = partial(restore, found, group=group) if found else None
        loop = assemble(job, mesh, device, corpus, [*observers, *watching], restoring)
        initial = tracker.facts.initial_weights if tracker else None
        loop.saver = build_saver(job, run, corpus, loop.state.step, group, initial)
        if world.rank == 0:
            tell_begun()
        loop.stop = AgreedStop(flag, lambda: loop.saver.written if loop.saver else 0)
        log_model(loop, job, found)
        if tracker:
            tracker.resume_from(loop.state.step)
        with (
            refusing_out_of_memory(job.cfg, job.sizes, world, trains=True),
            refusing_shapes(job.cfg.model.name, job.plan),
        ):
            evaluate_if_stopped_before(loop, tracker, group)
            for row in loop.rows():
                if not dist.is_initialized():
                    raise RuntimeError("another rank failed, and this one no longer waits for it")
                if tracker:
                    tracker.log(row)
        if loop.stopped_by:
            if flag.requested:
                tell_stopped(world)
            raise Stopped(loop.stopped_by)


def evaluate_if_stopped_before(loop: Loop, tracker: Tracker | None, group: dist.ProcessGroup | None) -> None:
    """The evaluation that a run was to make at the step that it resumes from, if a signal stopped it before that was done."""
    lacking, *_ = on_all_ranks(lambda: tracker is not None and tracker.lacks_held_out_loss(), group)
    if lacking and loop.evaluates_at(loop.state.step) and (loss := loop.evaluate()) is not None and tracker:
        tracker.add_held_out_loss(loss)


def build_observers(
    job: Preflight, mesh: DeviceMesh, device: Device, tracker: Tracker | None
) -> Sequence[Observer]:
    """The observers of every run. Created before the model is sharded: formulas apply to the plain model."""
    cfg, plan = job.cfg, job.plan
    expected = Expected(
        expected_entries(job.model, plan, cfg), expected_memory(job.model, plan, cfg, device.type)
    )
    report = tracker.record_ledger if tracker else None
    counted = CountedStep(mesh, expected, total_steps(cfg) - 1, cfg.parallel.compile, report)
    speed = Speed.of(job.model, plan, cfg, device)
    return [
        Timing(device.torch, speed, left_out=profiled_steps(cfg.profiler)),
        PeakMemory(device),
        counted,
        AgreedGradients(cfg, plan, mesh),
    ]


def open_tracker(
    job: Preflight, run: Run, corpus: AnyCorpus, plan: str, found: list[Checkpoint]
) -> AbstractContextManager[Tracker | None]:
    """The tracker, on rank 0; nothing on other ranks.

    Raises:
        ConfigError: if its first files cannot be written.
    """
    if run.world.rank != 0 or job.device is None:
        return nullcontext()
    facts = RunFacts(
        run.world.size,
        job.sizes.nontrivial(),
        job.parameters,
        job.device.name,
        corpus.corpus_hash,
        corpus.unigram_entropy,
        corpus.tokenizer_hash,
        initial_weights(job.cfg.init_from, found),
        min(job.cfg.train.eval_rows, len(corpus.held_out)),
    )
    steps, after = total_steps(job.cfg), NextSteps(run.command, run.check_command)
    start = found[0].step if found else 0
    with refuse_unwritable("hydra.run.dir", run.folder):
        if isinstance(corpus, PackedCorpus):
            corpus.save_tokenizer(job.cfg.tokenizer, run.folder)
        return Tracker(job.cfg, run.folder, facts, steps, start_step=start, plan=plan, next_steps=after)


def initial_weights(init_from: str | None, found: list[Checkpoint]) -> str | None:
    """The hash of the weights that a run begins with, or has begun with, by its newest checkpoint, if init_from named them."""
    if found:
        return found[0].manifest.experiment.get("initial_weights")
    return weights_hash(init_from) if init_from else None


def check_rows(corpus: AnyCorpus, job: Preflight) -> None:
    """Refuse a corpus with fewer train rows than one global batch."""
    if isinstance(corpus, PackedCorpus):
        train = job.cfg.train
        check_enough_rows(corpus, train.global_batch_size, job.sizes.dp * (train.micro_batch_size or 1))


def log_notes(job: Preflight, corpus: AnyCorpus, is_new: bool) -> None:
    """Log, on rank 0, the warnings of preflight, one of an axis that crosses hosts although its traffic should not, and one if the
    embedding of a new run's init_from is of other tokens than the rows, such as those of a BPE that was trained on other text."""
    if job.world.rank:
        return
    for note in job.notes:
        log.warning(note)
    warn_of_hosts(job)
    cfg = job.cfg
    if cfg.init_from is None or not is_new or isinstance(corpus, SyntheticCorpus):
        return
    if tokenizer_hash_of(cfg.init_from) not in (None, SyntheticCorpus.tokenizer_hash, corpus.tokenizer_hash):
        text = "init_from=%s is of another tokenizer, whose tokens its embedding knows: tokenizer=hf tokenizer.path=... takes that"
        log.warning(text, cfg.init_from)


def warn_of_hosts(job: Preflight) -> None:
    within = 1
    for axis in reversed(AXES):
        within *= job.sizes[axis.name]
        if not axis.crosses_hosts and job.world.local_size % within:
            size, ranks = job.sizes[axis.name], job.world.local_size
            log.warning("mesh.%s=%d crosses hosts of %d ranks each", axis.name, size, ranks)


def log_model(loop: Loop, job: Preflight, found: list[Checkpoint]) -> None:
    """Log what is sharded and how, what the device does with it, and from where the run resumes."""
    assert job.device
    for note in device_notes(job.device, job.cfg):
        log.info(note)
    shown = describe_model(loop.state.model)
    log.info("Model after parallelization (%s parameters) model=%s", f"{job.parameters:,}", shown)
    if loop.state.step:
        log_resumption(found, loop.state.step, job)
