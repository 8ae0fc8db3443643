"""Training, told from top to bottom."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tpresearch.config.compose import as_dict
from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config
from tpresearch.config.validate import planned_world, total_steps
from tpresearch.config.world import World
from tpresearch.data import AnyCorpus, PackedCorpus, check_enough_rows, prepare
from tpresearch.launch import Run
from tpresearch.launch.stop import StopFlag, Stopped, fault_of_another_rank
from tpresearch.ledger.formulas import expected_entries
from tpresearch.ledger.memory_formulas import expected_bytes
from tpresearch.ledger.step import Expected, count_of
from tpresearch.parallel.mesh import build_mesh
from tpresearch.plan.compiler import Plan
from tpresearch.plan.describe import plan_text
from tpresearch.track.tracker import RunFacts, Tracker
from tpresearch.train.build import sharded
from tpresearch.train.defects import defects_on
from tpresearch.train.device import Device
from tpresearch.train.preflight import Preflight
from tpresearch.train.speed import flops_per_token
from tpresearch.train.stopping import AgreedStop
from tpresearch.train.trainer import Trainer

log = logging.getLogger(__name__)


def train(judged: Preflight, run: Run) -> None:
    """Train as the config says; leave a record in the run folder. With plan_only, print the plan and stop.

    Raises:
        ConfigError: for what only the prepared data shows, such as a corpus too short for one batch.
        NonfiniteError: unless train.on_nonfinite=skip.
        Stopped: after SIGTERM or Ctrl-C, on all ranks after the same step.
    """
    cfg, sizes, model, plan, device = judged.cfg, judged.sizes, judged.model, judged.plan, judged.device
    text = plan_text(model, plan)
    if device is None:
        if run.world.rank == 0:
            print(
                f"model={cfg.model.name} parallel={cfg.parallel.name} world_size={planned_world(cfg)}: {sizes.live()}\n"
            )
            print(text)
        return
    corpus = prepare(cfg.data, cfg.tokenizer, progress=run.world.rank == 0)
    if isinstance(corpus, PackedCorpus):
        check_enough_rows(corpus, cfg.train.global_batch_size, sizes.dp * (cfg.train.micro_batch_size or 1))
    log.info("data: %s, %s", cfg.data.source, corpus)
    if wrong := defects_on(cfg.defects):
        log.warning("wrong on purpose: %s", ", ".join(wrong))
    parameters = sum(p.numel() for p in model.parameters())
    expected = Expected(expected_entries(model, plan, cfg), expected_bytes(model, plan, cfg, device.type))
    where = run.world.size, sizes.live(), parameters, device.name
    facts = RunFacts(*where, corpus.corpus_hash, corpus.unigram_entropy)
    with (
        StopFlag() as flag,
        tracking(cfg, run, facts, text) as tracker,
        faults_told(tracker, flag),
        process_group(device, run.world),
    ):
        check_same_corpus(corpus)
        mesh = build_mesh(sizes, device.type)
        log.info("Device Mesh created: device_mesh=%s", sizes.describe(device.type))
        if run.world.local_size % sizes.tp:
            log.warning("mesh.tp=%d crosses hosts of %d ranks each", sizes.tp, run.world.local_size)
        trainer = assemble(cfg, model, plan, mesh, device, corpus)
        trainer.stop = AgreedStop(flag)
        log.info("Model after parallelization (%s parameters) model=%s", f"{parameters:,}", model)
        if tracker:
            trainer.on_counted = lambda counted: tracker.count(count_of(counted, expected))
        for row in trainer.rows():
            if tracker:
                tracker.log(row)
        if trainer.stopped_by:
            raise Stopped(trainer.stopped_by)


@contextmanager
def faults_told(tracker: Tracker | None, flag: StopFlag) -> Iterator[None]:
    """Where a rank fails since another has, which had torchrun stop this one, the run's record says why that one did."""
    try:
        yield
    except RuntimeError:
        if tracker and flag.requested and (fault := fault_of_another_rank()):
            tracker.finish(status="failed", error=fault)
        raise


def tracking(cfg: Config, run: Run, facts: RunFacts, plan: str) -> AbstractContextManager[Tracker | None]:
    """What records the run, on rank 0; nothing on the others."""
    if run.world.rank != 0:
        return nullcontext()
    return Tracker(cfg, as_dict(cfg), run.folder, facts, total_steps(cfg), plan=plan)


@contextmanager
def process_group(device: Device, world: World) -> Iterator[None]:
    """The default process group, of one rank too."""
    where: dict[str, Any] = {"device_id": device.torch} if device.backend == "nccl" else {}
    if world.size == 1 and not world.elastic:
        where |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if device.type == "cuda":
        torch.cuda.set_device(device.torch)
    dist.init_process_group(device.backend, timeout=timedelta(minutes=10), **where)
    try:
        yield
    except BaseException:
        if (
            device.backend != "nccl"
        ):  # whose end waits for ranks that may be waiting for this one: let it exit
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def check_same_corpus(corpus: AnyCorpus) -> None:
    """Each host prepares its own rows; refuse to train on rows that differ, since hosts may have other Pythons.

    Raises:
        ConfigError: on every rank, where any two hold other text or tokens.
    """
    mine = (corpus.corpus_hash, corpus.tokenizer_hash, len(corpus.train))
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    other = next((rank for rank, theirs in enumerate(found) if theirs != found[0]), None)
    if other is not None:
        raise ConfigError(
            "data.source",
            corpus.meta.get("source", "this corpus"),
            f"ranks 0 and {other} prepared different rows from it",
            "the same files and the same Python on every host, or a data.cache_dir that they share",
        )


def assemble(
    cfg: Config, model: nn.Module, plan: Plan, mesh: DeviceMesh, device: Device, corpus: AnyCorpus
) -> Trainer:
    """A planned meta model, sharded and given its first weights, with what it takes to train it."""
    cost = {causal: flops_per_token(model, cfg.data.seq_len, causal) for causal in (False, True)}
    sharded(model, plan, cfg, mesh, device.torch)
    return Trainer(cfg, model, plan, mesh, device, corpus, cost)
