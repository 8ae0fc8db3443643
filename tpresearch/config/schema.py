"""The typed config. Hydra composes `conf/` into it; past that boundary only these classes are used.

Every field is a key that can be set on the command line; the text below it says what it means (of a launcher, its file in
conf/hydra/launcher), and its annotation gives its bounds. `validate.py` checks which combinations are legal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from omegaconf import MISSING

from tpresearch.config.choices import (
    Checkpointing,
    DataPlan,
    DataSource,
    DeviceKind,
    Dtype,
    OptimizerName,
    ProfilerName,
    SlurmCluster,
    TensorPlan,
    TokenizerKind,
    WandbMode,
)
from tpresearch.config.model import ModelConfig
from tpresearch.config.training import OptimizerConfig, ScheduleConfig, TrainConfig
from tpresearch.config.values import FRACTION, AtLeast, OfType, Within

LENGTH_BOUND = AtLeast(1, 10**8)
MAX_RANKS = 10**6


@dataclass(slots=True)
class FsdpConfig:
    reshard_after_forward: bool = True
    """Free each block's gathered weights after its forward and gather them again in backward (ZeRO-3)."""
    reduce_dtype: Dtype = Dtype.float32
    """Dtype in which gradients are summed over data-parallel ranks when train.dtype is bfloat16; with both data axes, over
    micro-batches too."""
    cpu_offload: bool = False
    """Keep sharded parameters, gradients and optimizer state in host memory."""


@dataclass(slots=True)
class ParallelConfig:
    name: str = "none"
    """Name of the plan in records and tables."""
    tensor: TensorPlan | None = None
    """Which of the model's sharding plans runs over the mesh's tp axis."""
    data: DataPlan = DataPlan.none
    """What the data axes do: ddp replicates over dp_replicate, fsdp shards over dp_shard, hsdp does both."""
    loss_parallel: bool = True
    """Keep the logits sharded over the vocabulary and compute the cross-entropy on the shards."""
    async_tp: bool = False
    """Split tensor-parallel matmuls so that their collectives overlap with them (CUDA and compile only)."""
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    activation_checkpointing: Checkpointing = Checkpointing.none
    """Recompute in backward: nothing, all but the matmuls and attention, each whole block, or whatever is cheapest until the
    rest fits activation_budget (compile only)."""
    activation_budget: Annotated[float, FRACTION] = 0.9
    """Approximate share of its activations that a compiled block may keep for backward, with activation_checkpointing=budget."""
    compile: bool = False
    """torch.compile each block."""
    gradient_accumulation_fusion: bool = False
    """Let backward's matmuls add weight gradients to the sum over micro-batches, without a pass of their own (one rank)."""


@dataclass(slots=True)
class MeshConfig:
    """Ranks along each axis; null lets the parallel plan choose, -1 takes the remaining ranks."""

    dp_replicate: Annotated[int | None, Within(-1, MAX_RANKS)] = None
    dp_shard: Annotated[int | None, Within(-1, MAX_RANKS)] = None
    tp: Annotated[int | None, Within(-1, MAX_RANKS)] = None


@dataclass(slots=True)
class DataConfig:
    source: DataSource = DataSource.pystdlib
    path: Annotated[Any, OfType(str | list[str] | None)] = None
    """Local path, glob or a list of them (text, jsonl, parquet); hub id or local folder (hf)."""
    name: str | None = None
    """The dataset's configuration name (hf)."""
    split: str = "train"
    """The split to read (hf)."""
    text_field: str = "text"
    """The field that holds the text (jsonl, parquet, hf)."""
    streaming: bool = False
    """Read over the network only as much as max_tokens needs, instead of downloading everything (hf)."""
    max_tokens: Annotated[int | None, AtLeast(1)] = None
    """Stop reading after about this many tokens; required when streaming."""
    max_record_bytes: Annotated[int, AtLeast(1)] = 64 << 20
    """Refuse a longer line, row or Parquet row group: a small compressed file can unpack to more than the memory (jsonl, parquet)."""
    seq_len: Annotated[int, LENGTH_BOUND] = 128
    """Tokens per row that the model sees; rows are stored with one more, for the last target. 1 for rows of numbers."""
    width: Annotated[int | None, LENGTH_BOUND] = None
    """Numbers per row (uniform); tokens are drawn below tokenizer.vocab_size (random_tokens)."""
    repeat_batches: Annotated[int | None, AtLeast(1)] = None
    """Repeat the first N global batches, such as 1 to overfit a single one; null reads all."""
    held_out_every: Annotated[int, AtLeast(2)] = 20
    """One document in this many, chosen by a hash of its name, is held out for evaluation."""
    cache_dir: str = "~/.cache/tpresearch"
    """Folder of tokenized corpora and trained tokenizers, shared by all runs on a host."""

    @property
    def is_synthetic(self) -> bool:
        """Rows are drawn as they are read: no files, no tokenizer, nothing to prepare, nothing held out."""
        return self.source in (DataSource.uniform, DataSource.random_tokens)

    @property
    def has_sequence(self) -> bool:
        """Rows are sequences of tokens, so that dim 1 of an activation is the sequence; of rows of numbers it is features."""
        return self.source is not DataSource.uniform


@dataclass(slots=True)
class TokenizerConfig:
    kind: TokenizerKind = TokenizerKind.bpe
    vocab_size: Annotated[int, AtLeast(1, 10**7)] = 4096
    """Size of the byte-level BPE that is trained on the train split (bpe)."""
    path: str | None = None
    """A tokenizer.json, a folder that holds one, or a name on the hub (hf)."""


@dataclass(slots=True)
class CheckpointConfig:
    """Checkpoints in the run's checkpoints/. A run that ends, or is stopped by a signal, always saves its last step."""

    every: Annotated[int | None, AtLeast(1)] = 1000
    """Optimizer steps between checkpoints; null for only the last one."""
    keep: Annotated[int, AtLeast(1)] = 2
    """Number of newest checkpoints to keep; an older one is deleted once a newer one is complete."""
    keep_every: Annotated[int | None, AtLeast(1)] = None
    """Keep checkpoints of steps that are multiples of this permanently; must be a multiple of checkpoint.every."""
    background: bool | str = "auto"
    """Write while training continues, from a copy in host memory; auto: on CUDA, but not on a CPU, whose cores train."""


@dataclass(slots=True)
class ProfilerConfig:
    """Steps to profile, on each rank, into the run folder's profiler/."""

    name: ProfilerName = ProfilerName.none
    first_step: Annotated[int, AtLeast(3)] = 10
    """First profiled step, counted from 1 since this process began: step 1 compiles, and step 2 is the counted one."""
    steps: Annotated[int, AtLeast(1)] = 2
    """Number of consecutive profiled steps."""
    memory: bool = False
    """Also record a snapshot of the CUDA allocator's history of those steps."""


@dataclass(slots=True)
class DefectsConfig:
    """Mistakes in the tutorial's scripts, off by default; switch them on to see their effect.

    Two more have other keys: parallel.loss_parallel=false gathers the logits, and model.blocks=[] leaves
    the whole model to one root `fully_shard`.
    """

    keep_gradients: bool = False
    """Never zero the gradients: each update follows the sum of all gradients since the first step."""
    weights_per_rank: bool = False
    """Draw initial weights from a separate generator on each data-parallel rank: FSDP, which broadcasts nothing, assembles
    one model from rows of several, and replicas start from different weights."""
    overlapping_batches: bool = False
    """Seed a data-parallel rank's rows by step + rank: rank 1 reads at step k what rank 0 reads at step k + 1."""


@dataclass(slots=True)
class LoggerConfig:
    """Loggers besides the run folder: Weights & Biases, TensorBoard."""

    wandb: bool = True
    """Log to Weights & Biases; the record in the run folder is kept in any case."""
    tensorboard: bool = False
    """Also write TensorBoard event files into the run folder."""
    mode: WandbMode = WandbMode.auto
    """auto: online when there is a key and the host answers, else offline."""
    project: str = "tpresearch"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; null for the account's default."""
    group: str | None = None
    """Group of runs that are shown side by side; null for none, or in a sweep for the sweep's."""
    name: str | None = None
    """Null for <model>/<plan with its sizes>, such as llama2_tiny/fsdp2-tp2."""
    job_type: str = "train"
    """W&B job type."""
    tags: list[str] = field(default_factory=list)
    """Tags in addition to plan, model, device and dtype."""
    dir: str | None = None
    """Folder of W&B's own files; null for the run folder."""


@dataclass(slots=True)
class VerifyConfig:
    plans: list[str] = field(default_factory=list)
    """Options of the parallel group, each compared with one process."""
    world_size: Annotated[int, AtLeast(1, 1024)] = 4
    """Ranks per plan (1 for none), or more if the plan's mesh needs them to give each axis two."""
    steps: Annotated[int, AtLeast(1, 10_000)] = 3
    """Number of optimizer steps to compare."""
    optimizers: list[OptimizerName] = field(default_factory=list)
    """Options of the optimizer group; AdamW alone hides a gradient scaled by a constant."""
    integers: bool = False
    """Also run each kind of matmul under its rule with integer operands, where the result must match bitwise."""


@dataclass(slots=True)
class ComposedConfig:
    """The config as Hydra composes and type-checks it. `model` is open, since each model has its own settings."""

    name: str = "train"
    """First folder below outputs/."""
    model: dict[str, Any] = field(default_factory=dict)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: str = "auto"
    """Where to resume from: auto (the newest complete checkpoint in the run's folder, if any), never (start from the
    beginning), or the folder of a run or of one of its checkpoints."""
    init_from: str | None = None
    """Initial weights only, for a new run: the folder of a run or checkpoint, or a folder or hub id in Hugging Face's format."""
    profiler: ProfilerConfig = field(default_factory=ProfilerConfig)
    defects: DefectsConfig = field(default_factory=DefectsConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    """Read by `python -m tpresearch.verify` only."""
    cluster: dict[str, Any] = field(default_factory=dict)
    """An option of conf/cluster, or your own file: the cluster of simulate and planner."""
    gpus: Annotated[int | None, AtLeast(1, MAX_RANKS)] = None
    """Number of devices to plan for (planner)."""
    trace: bool = False
    """Write the simulated step as a Chrome trace next to simulate.json (simulate)."""
    device: DeviceKind = DeviceKind.auto
    """auto: CUDA if every local rank can have its own device, else the CPU."""
    plan_only: bool = False
    """Compile the plan on a meta model, print it, and stop."""
    world_size: Annotated[int | None, AtLeast(1, MAX_RANKS)] = None
    """Number of ranks for plan_only, and for a simulated step and a job of a sweep if its mesh leaves that open."""


@dataclass(slots=True)
class Config(ComposedConfig):
    """The config as the framework uses it: as composed, with the model typed."""

    model: ModelConfig = field(default=None)  # pyrefly: ignore[bad-assignment, bad-override]


@dataclass
class LauncherConfig:
    """How a sweep (`-m`) starts its jobs. Numbers are above 0; conf/hydra/launcher says what its keys mean."""

    _target_: str = MISSING
    nproc: int | None = None
    slots: int | None = None
    fail_fast: bool = False
    objective: str = "train/loss"


@dataclass
class TorchrunConfig(LauncherConfig):
    """On this machine."""

    _target_: str = "hydra_plugins.tpresearch_launchers.TorchrunLauncher"
    cpu_slots: int | None = None


@dataclass
class SlurmConfig(LauncherConfig):
    """On a Slurm cluster, through submitit."""

    _target_: str = "hydra_plugins.tpresearch_launchers.SlurmLauncher"
    cluster: SlurmCluster = SlurmCluster.slurm
    ranks_per_node: int = 8
    gpus: bool = True
    cpus_per_slot: int = 1
    timeout_min: int = 60
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    mem_gb: float | None = None
    jobs_at_once: int = 256
    job_name: str = "tpresearch"
    setup: list[str] = field(default_factory=list)
    sbatch: dict[str, Any] = field(default_factory=dict)
