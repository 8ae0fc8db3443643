"""Validation before a folder, an allocation or a process group exists; what is validated is what trains."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tpresearch.checkpoint.disk import BrokenCheckpoint
from tpresearch.checkpoint.resume import checkpoints_to_resume, find_checkpoint
from tpresearch.config.axes import MeshSizes
from tpresearch.config.choices import Float8, Loss
from tpresearch.config.comparable import EXPERIMENT_KEYS, MAY_CHANGE_ON_RESUME
from tpresearch.config.compose import as_dict
from tpresearch.config.errors import ConfigError, WrongModel, format_value
from tpresearch.config.mesh import check_declared_counts, used_axes, warning_of_unused_axes
from tpresearch.config.model import model_config
from tpresearch.config.notes import notes_on_settings
from tpresearch.config.schema import Config, MeshConfig
from tpresearch.config.secrets import refuse_secrets
from tpresearch.config.training import TrainConfig
from tpresearch.config.validate import (
    DEFAULT_PLAN_RANKS,
    micro_batch_size,
    micro_batches,
    needs_logits,
    ranks_needed,
    uses_fully_shard,
    validate,
    with_batch_that_fits,
)
from tpresearch.config.values import check_bounds
from tpresearch.config.world import World
from tpresearch.data.check import check_data
from tpresearch.launch.composition import chosen_options
from tpresearch.launch.hydra_app import typed_overrides
from tpresearch.track.record import was_begun
from tpresearch.track.tensorboard import check_tensorboard
from tpresearch.track.wandb_host import check_settings, check_sweep

if TYPE_CHECKING:  # it imports torch, which takes seconds: most refusals come before
    from torch import nn

    from tpresearch.parallel.device import Device
    from tpresearch.plan.compiler import Plan


@dataclass(frozen=True)
class Preflight:
    """A validated config: its mesh, its meta model and its compiled plan."""

    cfg: Config
    world: World
    sizes: MeshSizes
    model: nn.Module
    """On the meta device, as the user's class made it."""
    plan: Plan
    device: Device | None
    """None if the ranks are not on this machine, or none are started."""
    notes: tuple[str, ...] = ()
    """Warnings, such as axes of size 1, settings without effect, or a batch size that was adapted."""

    @property
    def parameters(self) -> int:
        """Number of parameters of the model, over all ranks."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def about(self) -> str:
        """`model=llama2_7b parallel=fsdp_tp world_size=64: {'dp_shard': 8, 'tp': 8}`, then the notes, a line each."""
        about = f"model={self.cfg.model.name} parallel={self.cfg.parallel.name}"
        return "\n".join([f"{about} world_size={self.sizes.world}: {self.sizes.nontrivial()}", *self.notes])


def preflight(cfg: Config, world: World, resumes: bool = False) -> Preflight:
    """Validate the config, the data paths, the device, and the plan against the model; cheapest first.

    Args:
        resumes: whether the run takes its weights from its own checkpoint, so that `init_from` is not checked.

    Raises:
        ConfigError: for the first error.
    """
    try:
        return _preflight(cfg, world, resumes)
    except ConfigError as error:
        if cfg.plan_only and error.nproc:  # plan_only starts no ranks: their number is an override
            error.fix["world_size"], error.nproc = error.nproc, None
        elif resumes and world.hosts == 1 and any(map(_is_of_experiment, error.fix)):
            _propose_fewer_ranks(error, cfg, world)
        raise


def _is_of_experiment(key: str) -> bool:
    """Whether a run that resumes keeps the value of this key."""
    branch, _, name = key.partition(".")
    return branch in EXPERIMENT_KEYS and name not in MAY_CHANGE_ON_RESUME


def _propose_fewer_ranks(error: ConfigError, cfg: Config, world: World) -> None:
    """In place of a fix that makes another experiment of a resumed run, such as a batch that splits over all ranks, propose the
    most ranks on which it needs none."""
    for ranks in range(world.size - 1, 1, -1):
        with suppress(ConfigError):
            fewer = World(size=ranks, local_size=ranks, elastic=True)
            sizes = _preflight(dataclasses.replace(cfg, mesh=MeshConfig()), fewer, resumes=True).sizes
            error.fix = {f"mesh.{axis.name}": sizes[axis.name] for axis in used_axes(cfg.parallel)}
            error.nproc = ranks
            return


def _preflight(cfg: Config, world: World, resumes: bool) -> Preflight:
    sizes = quick_check(cfg, world)
    from tpresearch.checkpoint.state import unsaved_module  # late: they import torch
    from tpresearch.parallel.device import choose_device
    from tpresearch.parallel.float8 import check_float8

    starts_ranks = not cfg.plan_only and world.here
    device = choose_device(cfg, world) if starts_ranks else None
    if device:
        check_float8(cfg.train, device.torch)
    notes = [note for note in (warning_of_unused_axes(sizes, cfg.parallel),) if note]
    notes += notes_on_settings(cfg, sizes, typed_overrides())
    if cfg.plan_only:
        asked, cfg = cfg.train.global_batch_size, with_batch_that_fits(cfg, sizes)
        if (rows := cfg.train.global_batch_size) != asked:
            notes.append(f"train.global_batch_size={asked} does not fit this mesh: shown for {rows}")
    model, plan = plan_model(cfg, sizes, from_seed=cfg.init_from is None and not resumes)
    chunk, in_chunks = cfg.train.loss_chunk, plan.chunked_head and cfg.train.loss is Loss.next_token
    if chunk not in (None, TrainConfig().loss_chunk) and not in_chunks:
        notes.append(f"train.loss_chunk={chunk} has no effect: the loss takes a micro-batch's whole output")
    if plan.across_rows:
        of_its_own = "each data-parallel rank and micro-batch has rows of its own, so that losses depend on how a batch is split"
        notes.append(f"{plan.across_rows} works across the rows of a batch: {of_its_own}")
    unknown = None
    if plan.followed_to:
        unknown = f"at {plan.followed_to}, a rank's forward calls other functions than one process, and is not checked from there on"
    elif plan.rules and plan.probe.output is None:
        unknown = "the model's forward depends on values, and that of a rank is not checked before it runs"
    if unknown:
        notes.append(f"{unknown}: tpresearch.verify tells whether it computes the same")
    if unsaved := unsaved_module(model):
        begins_anew = "a run that resumes goes on without it; what a buffer holds is saved"
        notes.append(f"{unsaved}: what its get_extra_state returns is in no checkpoint: {begins_anew}")
    if not resumes:
        notes += check_init_from(cfg, model, starts_ranks)
    return Preflight(cfg, world, sizes, model, plan, device, tuple(notes))


def quick_check(cfg: Config, world: World) -> MeshSizes:
    """Refuse most mistakes, without torch and in a fraction of a second. Returns the sizes of the mesh."""
    refuse_secrets(as_dict(cfg))
    check_bounds(cfg)
    if cfg.logger.wandb:
        check_settings(cfg.logger)
        check_sweep(as_dict(cfg), chosen_options(), typed_overrides())
    check_tensorboard(cfg.logger)
    alone = world.size == 1 and not world.elastic
    ranks = ranks_needed(cfg, DEFAULT_PLAN_RANKS) if alone else world.size
    sizes = validate(cfg, ranks, world.hosts)
    check_data(cfg.data, cfg.tokenizer)
    try:
        check_declared_counts(cfg, sizes)
    except ConfigError as error:
        if ranks > world.size and error.nproc:  # that number was not typed: propose one that fits
            refuse_single_process(cfg, error.nproc)
        raise
    if ranks > world.size:
        refuse_single_process(cfg, ranks)
    return sizes


def refuse_single_process(cfg: Config, ranks: int) -> NoReturn:
    """Refuse `python train.py` with a plan for several ranks, unless the mesh sizes or world_size ask for one rank."""
    axes = " and ".join(axis.name for axis in used_axes(cfg.parallel))
    why = f"needs several ranks (along {axes}), but this is a single process"
    legal = "torchrun with several ranks, parallel=none, or world_size=1 to run it on one"
    raise ConfigError("parallel", cfg.parallel.name, why, legal, fix={}, nproc=ranks)


def check_init_from(cfg: Config, model: nn.Module, starts_ranks: bool) -> list[str]:
    """Refuse init_from if its weights do not fit this model; files on the hub are downloaded only if ranks start.

    Returns: a warning for each setting that another model of ours, with the same shapes, was trained with.
    """
    if cfg.init_from is None:
        return []
    from tpresearch.hf.files import is_hugging_face
    from tpresearch.hf.read import check_weights

    if is_hugging_face(cfg.init_from):
        check_weights(cfg.init_from, cfg.model, model, download=starts_ranks)
        return []
    from tpresearch.checkpoint.load import check_initial_weights
    from tpresearch.hf.llama import IRRELEVANT_TO_WEIGHTS
    from tpresearch.plan.meta import settings_with_defaults

    checkpoint = find_checkpoint(Path(cfg.init_from), "init_from")
    try:
        check_initial_weights(checkpoint, model)
    except BrokenCheckpoint as error:
        why = f"its weights are not this model's: {error}"
        legal = "a run or checkpoint of this model, or a Hugging Face folder"
        raise ConfigError("init_from", cfg.init_from, why, legal) from None
    trained = model_config(checkpoint.manifest.experiment["model"])
    if trained.target != cfg.model.target:
        return []
    then, now = settings_with_defaults(trained), settings_with_defaults(cfg.model)
    return [
        f"init_from={cfg.init_from} was trained with model.{key}={format_value(value)}, and this model has {format_value(now.get(key))}"
        for key, value in then.items()
        if key not in IRRELEVANT_TO_WEIGHTS and now.get(key) != value
    ]


def check_folder(job: Preflight, folder: Path, restarted: bool) -> None:
    """Refuse a run folder with checkpoints that this config cannot resume from, before anything in it is touched."""
    if job.device is not None:
        checkpoints_to_resume(job.cfg, folder, restarted or was_begun(folder, as_dict(job.cfg)))


def plan_model(cfg: Config, sizes: MeshSizes, from_seed: bool = False) -> tuple[nn.Module, Plan]:
    """The model on the meta device, and its plan compiled against it: no ranks, no memory.

    Args:
        from_seed: whether its initial weights are to be drawn.

    Raises:
        ConfigError: from the model, the plan compiler, or where model, data and loss are not compatible.
    """
    import torch  # late, and so are those that import it

    from tpresearch.data.batches import meta_batch
    from tpresearch.parallel.float8 import float8_layers
    from tpresearch.parallel.gradient_sums import check_layers
    from tpresearch.plan.compatible import check_loss
    from tpresearch.plan.compiler import compile_plan
    from tpresearch.plan.constructor import check_constructor
    from tpresearch.plan.meta import meta_model, watched_meta_model, weight_dtype
    from tpresearch.plan.one_rank import check_one_rank, op_across_rows
    from tpresearch.plan.parameters import check_own_gradients, check_parameters
    from tpresearch.plan.probe import probe_model
    from tpresearch.train.randomness import check_randomness

    dtype = weight_dtype(cfg.train)
    model, lost = watched_meta_model(cfg.model, dtype) if from_seed else (meta_model(cfg.model, dtype), {})
    batch = meta_batch(cfg.data, micro_batch_size(cfg, sizes)).to(torch.device("meta"), dtype)
    probe = probe_model(model, batch.inputs, cfg)
    check_loss(probe.output, batch.targets, cfg)
    plan = compile_plan(model, cfg, sizes, probe)
    check_own_gradients(plan, cfg)
    check_parameters(model, plan, cfg.parallel)
    check_constructor(model, lost, plan.initializers)
    check_randomness(model, plan, cfg.parallel)
    check_split_output(plan, cfg)
    check_changed_outputs(plan, cfg)
    plan = dataclasses.replace(plan, followed_to=check_one_rank(model, plan, batch.inputs, cfg))
    if sizes.dp * micro_batches(cfg, sizes) > 1:
        plan = dataclasses.replace(plan, across_rows=op_across_rows(model, plan, batch.inputs, cfg))
    if cfg.parallel.gradient_accumulation_fusion:
        check_layers(model, plan, cfg)
    if cfg.train.float8 is not Float8.none:
        plan = dataclasses.replace(plan, float8=float8_layers(model, plan, cfg, sizes))
    return model, plan


def check_split_output(plan: Plan, cfg: Config) -> None:
    """Refuse logits that are left sharded over the batch: the cross-entropy is computed on vocabulary shards."""
    if plan.output_shard_dim == 0 and needs_logits(cfg):
        key = next(f"{rule.config_key}.dst" for rule in plan.rules.values() if rule.output_stays_sharded)
        why = "the cross-entropy is computed on whole rows of logits or on vocabulary shards"
        other = "train.loss=sum"
        if cfg.train.loss is Loss.sum:
            why, other = f"{why}, and the held-out loss is one", "train.eval_rows=0"
        raise ConfigError(key, "batch", why, f"logits, or {other}", fix={key: "logits"})


def check_changed_outputs(plan: Plan, cfg: Config) -> None:
    """Refuse a block whose output is a view that the model changes in place: FSDP's hook on it, which gathers the block's weights
    again in backward, is lost.
    """
    frees = uses_fully_shard(cfg.parallel, plan.sizes) and cfg.parallel.fsdp.reshard_after_forward
    freed = plan.blocks[:-1] if frees else []  # backward begins with the last
    if name := next((block for block in freed if block in plan.probe.changed_outputs), None):
        why = f"it changes the output of {name} in place, and FSDP would not gather the block's weights again for its backward"
        raise WrongModel(cfg.model.name, why, "a sum of its own, as x = x + y for x += y")
