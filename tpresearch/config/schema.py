"""The typed shape of a config. Hydra composes `conf/` into it; past that boundary only these classes are seen.

Every field is a key that can be set on the command line; the text below it says what it means, and its annotation
what numbers it takes. What combinations are legal is judged in `validate.py`.
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
from tpresearch.config.values import SHARE, AtLeast, Is, Within

LENGTH = AtLeast(1, 10**8)
MOST_RANKS = 10**6


@dataclass
class FsdpConfig:
    reshard_after_forward: bool = True
    """Free each block's gathered weights after its forward and gather them again in backward (ZeRO-3)."""
    reduce_dtype: Dtype = Dtype.float32
    """Dtype in which gradients are summed over data-parallel ranks when train.dtype is bfloat16."""
    cpu_offload: bool = False
    """Keep sharded parameters, gradients and optimizer state in host memory."""


@dataclass
class ParallelConfig:
    name: str = "none"
    """What records and tables call the plan."""
    tensor: TensorPlan | None = None
    """Which of the model's sharding plans runs over the mesh's tp axis."""
    data: DataPlan = DataPlan.none
    """What the data axes do: ddp replicates over dp_replicate, fsdp shards over dp_shard, hsdp does both."""
    loss_parallel: bool = True
    """Leave the logits sharded over the vocabulary and compute the cross-entropy on the shards."""
    async_tp: bool = False
    """Split tensor-parallel matmuls so that their collectives overlap with them (CUDA and compile only)."""
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    activation_checkpointing: Checkpointing = Checkpointing.none
    """Recompute in backward: nothing, all but the matmuls and attention, each whole block, or what is cheapest until the
    rest is within activation_budget (compile only)."""
    activation_budget: Annotated[float, SHARE] = 0.9
    """About which share a compiled block may keep of what it would for backward, where activation_checkpointing=budget."""
    compile: bool = False
    """torch.compile each block."""


@dataclass
class MeshConfig:
    """Ranks along each axis; null lets the parallel plan choose, -1 takes what is left of the world."""

    dp_replicate: Annotated[int | None, Within(-1, MOST_RANKS)] = None
    dp_shard: Annotated[int | None, Within(-1, MOST_RANKS)] = None
    tp: Annotated[int | None, Within(-1, MOST_RANKS)] = None


@dataclass
class DataConfig:
    source: DataSource = DataSource.pystdlib
    path: Annotated[Any, Is(str | list[str] | None)] = None
    """Local path, glob or a list of them (text, jsonl, parquet); hub id or local folder (hf)."""
    name: str | None = None
    """The data set's configuration name (hf)."""
    split: str = "train"
    """The split to read (hf)."""
    text_field: str = "text"
    """The field that holds the text (jsonl, parquet, hf)."""
    streaming: bool = False
    """Read over the network as far as max_tokens asks, instead of downloading all of it (hf)."""
    max_tokens: Annotated[int | None, AtLeast(1)] = None
    """Stop reading after about this many tokens; required when streaming."""
    max_record_bytes: Annotated[int, AtLeast(1)] = 64 << 20
    """Refuse a longer line or row, or a Parquet row group, of a file: a small one can unpack to more than there is memory."""
    seq_len: Annotated[int, LENGTH] = 128
    """Tokens per row that the model sees; rows are stored with one more, for the last target. 1 for rows of numbers."""
    width: Annotated[int | None, LENGTH] = None
    """Numbers per row (uniform); tokens are drawn below tokenizer.vocab_size (random_tokens)."""
    repeat_batches: Annotated[int | None, AtLeast(1)] = None
    """Read the first this many global batches over and over, such as 1 to overfit a single one; null reads all."""
    held_out_every: Annotated[int, AtLeast(2)] = 20
    """One document in this many, chosen by a hash of its name, is kept for evaluation."""
    cache_dir: str = "~/.cache/tpresearch"
    """Where packed rows and trained tokenizers are kept; shared by all runs on a host."""


@dataclass
class TokenizerConfig:
    kind: TokenizerKind = TokenizerKind.bpe
    vocab_size: Annotated[int, AtLeast(1, 10**7)] = 4096
    """Entries of the byte-level BPE that is trained on the train split (bpe)."""
    path: str | None = None
    """A tokenizer.json, a folder that holds one, or a name on the hub (hf)."""


@dataclass
class CheckpointConfig:
    """What is written to the run's checkpoints/. A run that ends, or is stopped by a signal, always saves its last step."""

    every: Annotated[int | None, AtLeast(1)] = 1000
    """Optimizer steps between checkpoints; null for only the last one."""
    keep: Annotated[int, AtLeast(1)] = 2
    """How many of the newest stay; an older one is deleted once a newer one is whole."""
    keep_every: Annotated[int | None, AtLeast(1)] = None
    """Checkpoints of steps that are multiples of this stay for ever; it has to be a multiple of checkpoint.every."""
    background: bool | str = "auto"
    """Write while training goes on, from a copy in host memory. auto: on CUDA, not on a CPU, whose cores train."""


@dataclass
class ProfilerConfig:
    """What of a run is profiled, on each rank, into the run folder's profiler/."""

    name: ProfilerName = ProfilerName.none
    first_step: Annotated[int, AtLeast(3)] = 10
    """The first that is, counted from 1 since this process began: the second one is counted, and the first compiles."""
    steps: Annotated[int, AtLeast(1)] = 2
    """How many are, one after another."""
    memory: bool = False
    """A snapshot of the CUDA allocator's history of those steps too."""


@dataclass
class DefectsConfig:
    """Mistakes of the tutorial's scripts, off by default, to be switched on to see what they do.

    Two more have keys of their own: parallel.loss_parallel=false gathers the logits, and model.blocks=[] leaves
    the whole model to one root `fully_shard`.
    """

    keep_gradients: bool = False
    """Never zero the gradients: each update follows the sum of all gradients since the first step."""
    weights_per_rank: bool = False
    """Draw first weights from a generator of each data-parallel rank's own: FSDP, which broadcasts nothing, puts one
    model together from rows of several, and replicas start apart."""
    overlapping_batches: bool = False
    """Seed a data-parallel rank's rows by step + rank: rank 1 reads at step k what rank 0 reads at step k + 1."""


@dataclass
class LoggerConfig:
    """Who hears of a run beside its own folder: Weights & Biases, TensorBoard."""

    wandb: bool = True
    """Log to Weights & Biases; the record in the run folder is kept anyhow."""
    tensorboard: bool = False
    """Write TensorBoard's event files into the run folder, too."""
    mode: WandbMode = WandbMode.auto
    """auto: online when there is a key and the host answers, else offline."""
    project: str = "tpresearch"
    entity: str | None = None
    group: str | None = None
    """Runs of one name are set side by side; null for none, and in a sweep for the sweep's."""
    name: str | None = None
    """Null for <model>/<plan with its sizes>, such as llama2_tiny/fsdp2-tp2."""
    job_type: str = "train"
    tags: list[str] = field(default_factory=list)
    """Added to the plan, the model, the device and the dtype."""
    dir: str | None = None
    """Folder that holds W&B's own files; null for the run folder."""


@dataclass
class VerifyConfig:
    plans: list[str] = field(default_factory=list)
    """Options of the parallel group, each held to one process."""
    world_size: Annotated[int, AtLeast(1, 1024)] = 4
    """Ranks to start for each plan but none, or as many as give each axis of its mesh two."""
    steps: Annotated[int, AtLeast(1, 10_000)] = 3
    """Optimizer steps that are compared."""
    optimizers: list[OptimizerName] = field(default_factory=list)
    """Options of the optimizer group; AdamW alone hides a gradient scaled by a constant."""
    integers: bool = False
    """Put each kind of matmul under its rule with integer operands too, where the result must match bitwise."""


@dataclass
class ComposedConfig:
    """What Hydra composes and checks. `model` is open, since each model has settings of its own."""

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
    """auto: from the newest whole checkpoint in the run's folder, if there is one. never: from the beginning. Else the
    folder of a run, or of one of its checkpoints, to go on from."""
    init_from: str | None = None
    """Weights alone for a new run: the folder of a run or of a checkpoint, or a folder or hub id in Hugging Face's format."""
    profiler: ProfilerConfig = field(default_factory=ProfilerConfig)
    defects: DefectsConfig = field(default_factory=DefectsConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    """Read by `python -m tpresearch.verify` only."""
    cluster: dict[str, Any] = field(default_factory=dict)
    """An option of conf/cluster, or a file of one's own: what simulate and planner price with."""
    gpus: Annotated[int | None, AtLeast(1)] = None  # how many devices the planner plans for
    trace: bool = False  # write the simulated step as a Chrome trace beside simulate.json
    device: DeviceKind = DeviceKind.auto
    """auto: CUDA when every local rank can have a device of its own, else the CPU."""
    plan_only: bool = False
    """Compile the plan on a meta model, print it, and stop."""
    world_size: Annotated[int | None, AtLeast(1, MOST_RANKS)] = None
    """For how many ranks plan_only compiles, and how many a job of a sweep has where its mesh leaves that open."""


@dataclass
class Config(ComposedConfig):
    """The config that the framework sees: as composed, with the model typed."""

    model: ModelConfig = field(default=None)  # type: ignore[assignment]


@dataclass
class LauncherConfig:
    """How a sweep (`-m`) starts its jobs. Numbers are above 0."""

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
