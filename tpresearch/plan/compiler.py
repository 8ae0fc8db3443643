"""The plan compiler: named rules against a meta-device model, judged before any rank exists.

It expands each rule to the modules it matches, refuses what cannot work, and says what each parameter
becomes and what each module sends.
"""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass

from torch import nn

from tpresearch.config.errors import ConfigError, nearest
from tpresearch.config.mesh import MeshSizes
from tpresearch.config.schema import DataPlan, ModelConfig, ParallelConfig
from tpresearch.plan.numbers import modules_given_numbers
from tpresearch.plan.rules import Compiled, compile_rule


@dataclass(frozen=True)
class Plan:
    """What will be done to a model: rules by module name, and the blocks that are wrapped."""

    rules: dict[str, Compiled]
    """Module name -> the rule on it."""
    blocks: list[str]
    """Module names: the units of FSDP, checkpointing and compile."""
    whole: list[str]
    """Parameters that the tensor plan leaves whole on every tp rank."""
    sizes: MeshSizes
    split_output: int | None
    """The dim of the model's output that reaches the loss split over tp: -1 the vocabulary, 0 rows; None if it is whole."""
    given: frozenset[str]
    """Modules that take the model's own numbers: no gradient flows back to their input."""

    @property
    def loss_parallel(self) -> bool:
        """The model's output reaches the loss split over tp."""
        return self.split_output is not None

    def partial(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Parameters whose gradient on a tp rank is that of its part of the sequence: a part of a sum over tp."""
        return {
            f"{name}.{key}": parameter
            for name, rule in self.rules.items()
            if rule.rule.style == "sequence"
            for key, parameter in model.get_submodule(name).named_parameters(recurse=False)
        }


def matching(pattern: str, names: list[str]) -> list[str]:
    """The names that a wildcard pattern matches, part by part between the dots (as parallelize_module does)."""
    parts = pattern.split(".")
    return [
        name
        for name in names
        if len(split := name.split(".")) == len(parts)
        and all(fnmatch.fnmatchcase(part, wanted) for part, wanted in zip(split, parts, strict=True))
    ]


def compile_plan(
    model: nn.Module,
    config: ModelConfig,
    parallel: ParallelConfig,
    sizes: MeshSizes,
    seq_len: int,
    rows: int,
) -> Plan:
    """Judge a plan against the model it is for.

    Args:
        model: on the meta device, whole. config: its config, plans included.
        parallel: the choice of plan. sizes: ranks along each axis. seq_len: tokens a row. rows: in a micro-batch.

    Raises:
        ConfigError: rules that match nothing, overlap or cannot be read; sizes that tp does not divide.
    """
    names = [name for name, _ in model.named_modules() if name]
    blocks = _blocks(config, names)
    rules: dict[str, Compiled] = {}
    if parallel.tensor:
        if parallel.tensor not in config.plans:
            raise ConfigError(
                "parallel",
                parallel.name,
                f"model {config.name} has no sharding plan named {parallel.tensor}",
                f"a plan of its own in conf/plan; it has: {', '.join(config.plans) or 'none'}",
            )
        compiled = [
            compile_rule(parallel.tensor, name, rule, parallel.loss_parallel)
            for name, rule in config.plans[parallel.tensor].items()
        ]
        rules = _expand(compiled, names)
        _check_kinds(model, rules)
        _check_divisible(config, parallel, sizes, _cuts(model, config, rules, seq_len, rows))
        _check_sequence(model, parallel.tensor, rules)
    whole = [
        name
        for name, _ in model.named_parameters()
        if split_dim(name, rules, model.get_submodule(name.rpartition(".")[0])) is None
    ]
    active = rules if sizes.tp > 1 else {}
    split = next((rule.dst[0].dim for rule in active.values() if rule.leaves_split), None)  # type: ignore[union-attr]
    return Plan(active, blocks, whole, sizes, split, modules_given_numbers(model))


def _blocks(config: ModelConfig, names: list[str]) -> list[str]:
    found = []
    for pattern in config.blocks:
        matched = matching(pattern, names)
        if not matched:
            raise ConfigError(
                "model.blocks",
                pattern,
                "matches no module",
                "such as " + ", ".join(nearest(pattern, names)),
                fix={"model.blocks": None},
            )
        found += matched
    nested = next((a for a in found for b in found if a.startswith(b + ".")), None)
    if nested or len(set(found)) < len(found):
        twice = nested or next(name for name in found if found.count(name) > 1)
        raise ConfigError(
            "model.blocks", config.blocks, f"{twice} is in it twice", "modules that do not hold each other"
        )
    return found


def _expand(compiled: list[Compiled], names: list[str]) -> dict[str, Compiled]:
    found: dict[str, Compiled] = {}
    for rule in compiled:
        matched = [""] if rule.rule.match == "." else matching(rule.rule.match, names)
        if not matched:
            raise ConfigError(
                f"{rule.where}.match",
                rule.rule.match,
                "matches no module",
                "such as " + ", ".join(nearest(rule.rule.match, names)),
                fix={f"{rule.where}.match": None},
            )
        for name in matched:
            if name in found:
                raise ConfigError(
                    f"{rule.where}.match",
                    rule.rule.match,
                    f"module {name or '.'} has the rule {found[name].name} already",
                    f"one rule a module: narrow {found[name].name} or {rule.name}",
                    fix={f"{rule.where}.match": None, f"{found[name].where}.match": None},
                )
            found[name] = rule
    order = ["", *names]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def _check_kinds(model: nn.Module, rules: dict[str, Compiled]) -> None:
    for name, rule in rules.items():
        module = model.get_submodule(name)
        if rule.rule.style in ("colwise", "rowwise") and rule.weight_dim(module) is None:
            raise ConfigError(
                f"{rule.where}.style",
                rule.rule.style,
                f"module {name} is a {type(module).__name__}",
                "colwise and rowwise split nn.Linear and nn.Embedding; sequence, input and output fit any module",
                fix={f"{rule.where}.style": None, f"{rule.where}.match": None},
            )


def _check_sequence(model: nn.Module, plan: str, rules: dict[str, Compiled]) -> None:
    """Where tokens are split, a weight that no rule speaks of would get a part of its gradient on each rank."""
    split = next((rule for rule in rules.values() if rule.splits_sequence or rule.splits_rows), None)
    if split is None:
        return
    tokens = "the sequence is split" if split.splits_sequence else "the batch's rows are split"
    for name, _ in model.named_parameters():
        module = name.rpartition(".")[0]
        if module not in rules:
            raise ConfigError(
                f"model.plans.{plan}",
                plan,
                f"no rule speaks of {module or 'the model'}, whose {name} would get a part of its gradient on each tp rank, "
                f"since {tokens}",
                "a rule for it: style sequence, or style input with null layouts where its input is whole",
            )


@dataclass(frozen=True)
class _Cut:
    """A count that tp has to divide."""

    what: str
    count: int
    why: str


def _check_divisible(
    config: ModelConfig, parallel: ParallelConfig, sizes: MeshSizes, cuts: list[_Cut]
) -> None:
    wrong = next((cut for cut in cuts if cut.count % sizes.tp), None)
    if wrong is None:
        return
    common = math.gcd(*(cut.count for cut in cuts))
    legal = [t for t in range(1, common + 1) if common % t == 0]
    fits = [t for t in legal if sizes.world % t == 0]
    alone = parallel.data is DataPlan.none
    below = max(t for t in legal if t <= sizes.tp)
    raise ConfigError(
        "mesh.tp",
        sizes.tp,
        f"does not divide {wrong.what}={wrong.count} ({wrong.why})",
        f"legal for this model: {_few(legal)}",
        fix={"mesh.tp": below}
        if alone
        else {"mesh.tp": fits[-1], "mesh.dp_shard": None, "mesh.dp_replicate": None},
        nproc=below if alone else None,
    )


def _few(numbers: list[int]) -> str:
    return " ".join(map(str, numbers if len(numbers) <= 8 else [*numbers[:8], "..."]))


def _cuts(
    model: nn.Module, config: ModelConfig, rules: dict[str, Compiled], seq_len: int, rows: int
) -> list[_Cut]:
    """Every count that is split over tp, but for the vocabulary: DTensor pads that one."""
    cuts: dict[str, _Cut] = {}
    for name, rule in rules.items():
        for unit in rule.rule.units:
            if unit not in config.args:
                raise ConfigError(
                    f"{rule.where}.units",
                    unit,
                    "no such model setting",
                    "one of "
                    + ", ".join(nearest(unit, [k for k, v in config.args.items() if isinstance(v, int)])),
                    fix={f"{rule.where}.units": None},
                )
            if config.args[unit] is not None:
                cuts.setdefault(
                    unit, _Cut(f"model.{unit}", int(config.args[unit]), f"rule {rule.name} splits it")
                )
        module = model.get_submodule(name)
        dim = rule.weight_dim(module)
        is_vocabulary = rule.rule.dst == "logits" or (isinstance(module, nn.Embedding) and dim == 0)
        if dim is not None and not is_vocabulary:
            weight = module.get_parameter("weight")
            cut = _Cut(
                f"{name}.weight.shape[{dim}]", weight.shape[dim], f"rule {rule.name} splits it {rule.label}"
            )
            cuts.setdefault(f"{rule.name} {weight.shape[dim]}", cut)
        if rule.splits_sequence:
            cuts.setdefault("seq_len", _Cut("data.seq_len", seq_len, f"rule {rule.name} splits the sequence"))
        if rule.splits_rows:
            cuts.setdefault("rows", _Cut("train.micro_batch_size", rows, f"rule {rule.name} splits its rows"))
    return list(cuts.values())


def split_dim(fqn: str, rules: dict[str, Compiled], owner: nn.Module) -> int | None:
    """The dim of a parameter of `owner` that its rule splits over tp, or None where it stays whole."""
    module, _, key = fqn.rpartition(".")
    rule = rules.get(module)
    dim = rule.weight_dim(owner) if rule else None
    if dim is None or rule is None or key == "weight":
        return dim
    return 0 if rule.rule.style == "colwise" else None


def local_shape(fqn: str, parameter: nn.Parameter, plan: Plan, owner: nn.Module) -> tuple[int, ...]:
    """The shape of rank 0's part over tp, the larger one where a dim does not divide evenly."""
    dim = split_dim(fqn, plan.rules, owner)
    return tuple(-(-n // plan.sizes.tp) if i == dim else n for i, n in enumerate(parameter.shape))
