"""The plan compiler: named rules against a meta-device model, validated before any rank exists.

It expands each rule to the modules it matches, refuses what cannot work, and says what each parameter
becomes and what each module sends.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.distributed.tensor import Shard

from tpresearch.config.axes import MeshSizes
from tpresearch.config.errors import ConfigError
from tpresearch.config.mesh import ShardedCount, check_divisible, declared_counts
from tpresearch.config.model import ModelConfig
from tpresearch.config.near_names import nearest
from tpresearch.config.schema import Config
from tpresearch.config.validate import micro_batch_size
from tpresearch.plan.initializers import Initializer, read_initializers
from tpresearch.plan.probe import Probe
from tpresearch.plan.rules import (
    ResolvedRule,
    can_chunk_logits,
    check_layouts,
    resolve_rule,
    runs_as,
    tensors_of,
)
from tpresearch.plan.sequence import check_sequence, splits_sequence


@dataclass(frozen=True)
class Plan:
    """A compiled plan: rules by module name, and the blocks that are wrapped."""

    rules: dict[str, ResolvedRule]
    """Module name -> its rule."""
    blocks: list[str]
    """Module names: the units of FSDP, checkpointing and compile."""
    replicated: list[str]
    """Parameters that the rules leave replicated on every rank; of a custom ParallelStyle nobody knows."""
    sizes: MeshSizes
    output_shard_dim: int | None = None
    """The sharded dim of the model's output at the loss: -1 the vocabulary, 0 the batch; None if it is not sharded."""
    probe: Probe = field(default_factory=Probe)
    """What a forward pass over shapes shows about the plain model."""
    initializers: dict[str, Initializer] = field(default_factory=dict)
    """Initializers of the parameters, read from the plain model before a rule or a narrow dtype replaces a layer."""
    chunked_head: str | None = None
    """The output layer, if the cross-entropy can be computed for a few tokens at a time."""
    end_layers: list[str] = field(default_factory=list)
    """Embeddings and the output layer: each is also an FSDP unit, gathered only when used."""
    after_blocks: list[str] = field(default_factory=list)
    """What is called between the last block and the output layer, such as the last norm: gathered with that block."""
    across_rows: str | None = None
    """An op that works across the rows of a batch, of which each data-parallel rank and micro-batch has its own; and its module."""
    followed_to: str | None = None
    """The line of the model's code up to which alone a rank's forward was followed; None if all of it was."""
    float8: list[str] = field(default_factory=list)
    """Linear layers that multiply in float8."""

    @property
    def loss_parallel(self) -> bool:
        """The model's output reaches the loss sharded."""
        return self.output_shard_dim is not None

    def unit_of(self, parameter: str) -> str | None:
        """The block or end layer with which a parameter is gathered, or its gradient summed; None for the rest of the model."""
        unit = unit_of(parameter, (*self.blocks, *self.end_layers, *self.after_blocks))
        return self.blocks[-1] if unit in self.after_blocks else unit

    def partial_grads(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Replicated parameters with partial gradients: each rank has seen only its part of the sequence."""
        return {
            f"{name}.{key}": parameter
            for name, rule in self.rules.items()
            if rule.rule.style == "sequence"
            for key, parameter in model.get_submodule(name).named_parameters(recurse=False)
            if parameter.requires_grad
        }


def matching_names(pattern: str, names: list[str]) -> list[str]:
    """The names that a wildcard pattern matches, component by component (as in parallelize_module)."""
    parts = pattern.split(".")
    return [
        name
        for name in names
        if len(split := name.split(".")) == len(parts)
        and all(fnmatch.fnmatchcase(part, wanted) for part, wanted in zip(split, parts, strict=True))
    ]


def compile_plan(model: nn.Module, cfg: Config, sizes: MeshSizes, probe: Probe) -> Plan:
    """Compile the configured plan against its model.

    Args:
        model: on the meta device, whole. sizes: ranks along each axis.
        probe: what a forward pass over shapes shows about the model.

    Raises:
        ConfigError: for rules that match nothing, overlap or cannot be read, and sizes that tp does not divide.
    """
    config, parallel = cfg.model, cfg.parallel
    names = [name for name, _ in model.named_modules() if name]
    blocks = _blocks(config, names)
    rules: dict[str, ResolvedRule] = {}
    if parallel.tensor:
        if parallel.tensor not in config.plans:
            why = f"model {config.name} has no sharding plan named {parallel.tensor}"
            legal = f"a plan of its own in conf/plan; it has: {', '.join(config.plans) or 'none'}"
            raise ConfigError("parallel", parallel.name, why, legal, fix={"parallel": "fsdp"})
        compiled = [
            resolve_rule(parallel.tensor, name, rule, parallel.loss_parallel)
            for name, rule in config.plans[parallel.tensor].items()
        ]
        rules = _expand_rules(compiled, names)
        _check_module_types(model, rules)
        check_layouts(rules, probe)
        check_divisible(
            parallel, sizes, [*declared_counts(cfg), *_sharded_counts(model, cfg, sizes, rules, probe)]
        )
        check_sequence(model, cfg, rules, probe)
    by_own_style = {name for name, rule in rules.items() if rule.rule.target}
    replicated = [
        name
        for name, _ in model.named_parameters()
        if sharded_dim(name, model, rules) is None and name.rpartition(".")[0] not in by_own_style
    ]
    active = {name: rule for name, rule in rules.items() if sizes[rule.axis] > 1}
    head = probe.head
    if head and not can_chunk_logits(model.get_submodule(head), active.get(head)):
        head = None
    outputs = [rule.dst[0] for rule in active.values() if rule.output_stays_sharded]
    split = next((layout.dim for layout in outputs if isinstance(layout, Shard)), None)
    initializers, ends = read_initializers(model), _end_layers(model, blocks, probe)
    after = _after_blocks(model, blocks, ends, probe)
    return Plan(active, blocks, replicated, sizes, split, probe, initializers, head, ends, after)


def _matched(key: str, pattern: str, names: list[str]) -> list[str]:
    """The modules that the pattern of this key matches, of which there must be one."""
    if found := matching_names(pattern, names):
        return found
    raise ConfigError(key, pattern, "matches no module", "such as " + ", ".join(nearest(pattern, names)))


def _blocks(config: ModelConfig, names: list[str]) -> list[str]:
    found = [name for pattern in config.blocks for name in _matched("model.blocks", pattern, names)]
    nested = next((a for a in found for b in found if a.startswith(b + ".")), None)
    if nested or len(set(found)) < len(found):
        twice = nested or next(name for name in found if found.count(name) > 1)
        why, legal = f"{twice} is matched twice", "modules that are not nested in each other"
        raise ConfigError("model.blocks", config.blocks, why, legal)
    return found


def _end_layers(model: nn.Module, blocks: list[str], probe: Probe) -> list[str]:
    """Embeddings and the output layer outside of the blocks, if there are blocks. A tied layer stays in the root unit; so does one that
    others read, or may read where the probe could not run: it would be gathered for its own forward alone. An embedding
    with a forward of its own may read its weight in backward too.
    """
    return [
        name
        for name, module in _separable(model, probe)
        if blocks
        and (name == probe.head or runs_as(module, nn.Embedding))
        and unit_of(f"{name}.", blocks) is None
    ]


def _after_blocks(model: nn.Module, blocks: list[str], end_layers: list[str], probe: Probe) -> list[str]:
    """Modules with parameters of their own that are called once, after the last block, if that too is called once and last of all blocks."""
    called = [(at, name) for at, name in enumerate(probe.called) if name in blocks]
    if not called or called[-1][1] != blocks[-1] or [name for _, name in called].count(blocks[-1]) > 1:
        return []
    later, found = Counter(probe.called[called[-1][0] :]), list[str]()
    for name, module in _separable(model, probe):
        has_own = any(True for _ in module.parameters(recurse=False))
        is_free = unit_of(f"{name}.", (*blocks, *end_layers, *found)) is None
        is_free &= (
            name not in probe.recomputed
        )  # whose backward would be over before the block's, and free its weights
        if has_own and is_free and later[name] == probe.called.count(name) == 1:
            found.append(name)
    return found


def _separable(model: nn.Module, probe: Probe) -> list[tuple[str, nn.Module]]:
    """Modules whose parameters nothing but their own forward is known to read."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return [
        (name, module)
        for name, module in model.named_modules()
        if name in probe.shapes
        and name not in probe.read_outside_forward
        and all(uses[id(p)] == 1 for p in module.parameters())
    ]


def _expand_rules(compiled: list[ResolvedRule], names: list[str]) -> dict[str, ResolvedRule]:
    found: dict[str, ResolvedRule] = {}
    for rule in compiled:
        key, pattern = f"{rule.config_key}.match", rule.rule.match
        for name in [""] if pattern == "." else _matched(key, pattern, names):
            if name in found:
                why = f"module {name or '.'} has the rule {found[name].name} already"
                legal = f"one rule per module: narrow {found[name].name} or {rule.name}"
                fix = {key: None, f"{found[name].config_key}.match": None}
                raise ConfigError(key, pattern, why, legal, fix=fix)
            found[name] = rule
    order = ["", *names]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def _check_module_types(model: nn.Module, rules: dict[str, ResolvedRule]) -> None:
    for name, rule in rules.items():
        module = model.get_submodule(name)
        if rule.rule.style in ("colwise", "rowwise") and rule.weight_dim(module) is None:
            why = f"module {name} is a {type(module).__name__}"
            legal = "colwise and rowwise split nn.Linear and nn.Embedding; sequence, input, output and a _target_ of your own fit any module"
            fix = {f"{rule.config_key}.style": None, f"{rule.config_key}.match": None}
            raise ConfigError(f"{rule.config_key}.style", rule.rule.style, why, legal, fix=fix)


def _sharded_counts(
    model: nn.Module, cfg: Config, sizes: MeshSizes, rules: dict[str, ResolvedRule], probe: Probe
) -> Iterator[ShardedCount]:
    """Every other count that a rule shards, except the vocabulary, which DTensor pads."""
    for name, rule in rules.items():
        module = model.get_submodule(name)
        dim = rule.weight_dim(module)
        is_vocabulary = rule.rule.dst == "logits" or (isinstance(module, nn.Embedding) and dim == 0)
        if dim is not None and not is_vocabulary:
            what, count = f"{name}.weight.shape[{dim}]", module.get_parameter("weight").shape[dim]
            yield ShardedCount(rule.axis, what, count, f"rule {rule.name} splits it {rule.label}")
        if splits_sequence(name, rule, cfg, probe):
            yield ShardedCount(
                rule.axis, "data.seq_len", cfg.data.seq_len, f"rule {rule.name} splits the sequence"
            )
        tensors = [*tensors_of(rule, probe.shapes[name])] if name in probe.shapes else []
        rows, firsts = micro_batch_size(cfg, sizes), [x[0] for *_, dim, x in tensors if dim == Shard(0) and x]
        if rule.shards_batch and (rows in firsts or not tensors):  # not of learned positions, [s, h]
            yield ShardedCount(rule.axis, "train.micro_batch_size", rows, f"rule {rule.name} splits its rows")
        for _, side, layout, shape in tensors:
            if isinstance(layout, Shard) and shape and not (rule.output_stays_sharded and side == "output"):
                what = f"{name}.{side}.shape[{layout.dim}]"
                yield ShardedCount(rule.axis, what, shape[layout.dim], f"rule {rule.name} splits it")


def unit_of(name: str, units: Iterable[str]) -> str | None:
    """The module among `units` that a parameter or module belongs to, or None."""
    return next((unit for unit in units if name.startswith(f"{unit}.")), None)


def sharded_dim(fqn: str, model: nn.Module, rules: dict[str, ResolvedRule]) -> int | None:
    """The dim of a parameter that its module's rule shards, or None if it stays replicated."""
    module, _, key = fqn.rpartition(".")
    rule = rules.get(module)
    dim = rule.weight_dim(model.get_submodule(module)) if rule else None
    if dim is None or rule is None or key == "weight":
        return dim
    return 0 if rule.rule.style == "colwise" else None


def tp_local_shape(fqn: str, model: nn.Module, plan: Plan) -> tuple[int, ...]:
    """Shape of rank 0's shard of a parameter under its rule, before FSDP; the larger one if a dim does not divide evenly."""
    dim = sharded_dim(fqn, model, plan.rules)
    size = plan.sizes[plan.rules[fqn.rpartition(".")[0]].axis] if dim is not None else 1
    return tuple(-(-n // size) if i == dim else n for i, n in enumerate(model.get_parameter(fqn).shape))


def fsdp_local_shape(fqn: str, model: nn.Module, plan: Plan) -> tuple[int, ...]:
    """Shape of rank 0's shard under its rule and the data plan, which also shards dim 0."""
    shape = tp_local_shape(fqn, model, plan)
    return (-(-shape[0] // plan.sizes.shards), *shape[1:]) if shape else shape
