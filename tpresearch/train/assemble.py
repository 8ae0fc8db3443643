"""From a validated config to a training loop: the sharded model with initial weights, optimizer and data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tpresearch.checkpoint.collective import checkpoint_group
from tpresearch.checkpoint.load import from_checkpoint
from tpresearch.config.schema import Config
from tpresearch.config.validate import has_master_weights
from tpresearch.data.batches import Batches
from tpresearch.data.rows import AnyCorpus
from tpresearch.hf.files import is_hugging_face
from tpresearch.hf.read import check_same_weights, from_hugging_face
from tpresearch.parallel.apply import parallelize
from tpresearch.parallel.device import Device
from tpresearch.parallel.float8 import to_float8
from tpresearch.parallel.gradient_sums import GradientSums, summing_layers
from tpresearch.parallel.reducer import build_reducer
from tpresearch.parallel.weights import WeightSource, from_seed, materialize
from tpresearch.plan.compiler import Plan
from tpresearch.plan.initializers import Initializer
from tpresearch.train.agreement import AgreedUnits, AgreedUse
from tpresearch.train.defects import build_defects
from tpresearch.train.loop import Loop
from tpresearch.train.losses import build_objective
from tpresearch.train.observe import Observer, Observers
from tpresearch.train.optim import build_optimizer
from tpresearch.train.preflight import Preflight
from tpresearch.train.randomness import SeededRandomness
from tpresearch.train.state import MasterWeights, TrainState, trained_parameters
from tpresearch.train.step import Setup


def assemble(
    job: Preflight,
    mesh: DeviceMesh,
    device: Device,
    corpus: AnyCorpus,
    watching: Sequence[Observer] = (),
    restore: Callable[[TrainState], None] | None = None,
) -> Loop:
    """The training loop of this rank, before its first step. The job's meta model becomes the sharded one.

    Args:
        watching: observers in addition to those that the model and the config require.
        restore: sets the whole state from a checkpoint, if the run is not new.
    """
    cfg, plan = job.cfg, job.plan
    if restore is None and cfg.init_from:
        check_same_weights(cfg.init_from, checkpoint_group())
    to_float8(job.model, plan.float8, cfg.train)
    model = parallelize(job.model, plan, cfg.parallel, mesh, cfg.train.dtype)
    home = torch.device("cpu") if cfg.parallel.fsdp.cpu_offload else device.torch
    source = weight_source(cfg, plan.initializers) if restore is None else lambda _: None
    materialize(model, home, source, buffers=device.torch, seed=cfg.train.seed)
    batches = Batches(corpus, cfg.train.global_batch_size, cfg.train.seed, cfg.data.repeat_batches)
    # Where nobody knows whether it draws, torch would seed all ranks alike.
    draws = plan.probe.draws or plan.probe.output is None
    randomness = [SeededRandomness(cfg.train.seed, mesh, plan, cfg.parallel.compile)] if draws else []
    # As it may depend on values, which fake ranks do not have.
    may_part = plan.probe.may_branch and plan.sizes.shards > 1 and device.backend != "fake"
    agreement = [AgreedUnits(cfg), AgreedUse(cfg, plan, mesh)] if may_part else []
    observers = Observers([*randomness, *agreement, *build_defects(cfg, plan, mesh, batches), *watching])
    state = build_state(model, cfg, plan, mesh)
    if restore:
        restore(state)
    observers.start(state)
    setup = Setup(cfg, plan, mesh, device, build_objective(cfg, plan), observers)
    return Loop(state, setup, corpus, batches)


def build_state(model: nn.Module, cfg: Config, plan: Plan, mesh: DeviceMesh) -> TrainState:
    """The state of a model that has its initial weights, with its optimizer."""
    has_masters = has_master_weights(cfg, plan.sizes)
    masters = MasterWeights(model, cfg.optimizer.split_masters) if has_masters else None
    trained = trained_parameters(model, masters)
    reducer = build_reducer(model, trained, plan, cfg, mesh)
    optimizer = build_optimizer(trained.values(), cfg.optimizer, masters)
    sums = None
    if cfg.parallel.gradient_accumulation_fusion:
        layers = summing_layers(model, plan)
        sums = GradientSums({x: masters.of(weight) if masters else weight for x, weight in layers.items()})
    return TrainState(0, model, optimizer, masters, reducer, sums)


def weight_source(cfg: Config, initializers: Mapping[str, Initializer]) -> WeightSource:
    """The source of the initial weights of a new run."""
    if cfg.init_from is None:
        return from_seed(initializers, cfg.train.seed)
    if is_hugging_face(cfg.init_from):
        return from_hugging_face(cfg.init_from, cfg.model)
    return from_checkpoint(cfg.init_from)
