"""Parameters that not every plan can shard: tied ones, scalars, and rows that two axes split unevenly."""

from __future__ import annotations

import functools
import itertools

from torch import nn

from tpresearch.config.axes import SHARD
from tpresearch.config.errors import ConfigError, WrongModel
from tpresearch.config.schema import Config, ParallelConfig
from tpresearch.config.validate import uses_fully_shard
from tpresearch.plan.compiler import Plan, sharded_dim, unit_of


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Name of each parameter that is tied to an earlier one -> the earlier one's name, in the model's order."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in named if first.setdefault(id(p), name) != name}


def tie(model: nn.Module, ties: dict[str, str]) -> None:
    """Tie each pair again, after both were replaced: by `to_empty`, or by a sharding rule."""
    for name, owner in ties.items():
        module, _, key = name.rpartition(".")
        setattr(model.get_submodule(module), key, model.get_parameter(owner))


def check_parameters(model: nn.Module, plan: Plan, parallel: ParallelConfig) -> None:
    """Refuse what this plan cannot do to the parameters of a meta model."""
    fully_sharded = uses_fully_shard(parallel, plan.sizes)
    if not any(p.requires_grad for p in model.parameters()):
        why, legal = "none of its parameters requires a gradient", "at least one that does"
        raise WrongModel(type(model).__name__, why, legal)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            _check_embedding(name, module, plan)
    for unit in plan.blocks if fully_sharded else ():
        _check_gathered(type(model).__name__, unit, plan)
    for name, owner in tied_parameters(model).items():
        _check_tie(name, owner, model, plan, fully_sharded)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0 and fully_sharded:
            legal = "a parameter of shape [1], or parallel=none, ddp, tp or sp"
            why = f"{name} is a scalar, which FSDP does not shard"
            raise ConfigError("parallel", parallel.name, why, legal)
        _check_rows(name, parameter, model, plan)


def check_own_gradients(plan: Plan, cfg: Config) -> None:
    """Refuse a forward that takes a gradient through a unit of FSDP, which would be over with its weights then, before backward; or one
    through a sharded layer that backward goes through in turn, of which torch's collectives have no gradient."""
    name, taken = cfg.model.name, sorted(plan.probe.differentiated)
    units = map(plan.unit_of, taken) if uses_fully_shard(cfg.parallel, plan.sizes) else ()
    if unit := next(filter(None, units), None):
        why = f"it takes a gradient through {unit} in its forward, which fully_shard would take for the backward, and not sum that of {unit}"
        raise WrongModel(name, why, f"parallel=ddp, or blocks without {unit}")
    legal = "parallel=ddp, or no sharding rule for that layer"
    converting = [layer for layer, rule in plan.rules.items() if rule.rule.style not in (None, "sequence")]
    twice = (key.rpartition(".")[0] for key in taken if plan.probe.differentiated[key])
    if layer := next((layer for layer in converting if layer in plan.probe.transformed), None):
        why = f"it calls {layer}, which a rule shards, in a transform of torch.func, as vmap or grad, for which torch's collectives have no rule"
        raise WrongModel(name, why, legal)
    if layer := next((layer for layer in twice if layer in converting), None):
        why = f"backward goes through a gradient that it takes through {layer} in its forward, and a rule shards {layer}: torch's collectives are differentiated once alone"
        raise WrongModel(name, why, legal)


def _check_gathered(model: str, unit: str, plan: Plan) -> None:
    """FSDP gathers a block's parameters where the block is called: read elsewhere, they are shards."""
    for owner, running in plan.probe.read_outside_forward.items():
        if f"{owner}.".startswith(f"{unit}.") and unit not in running:
            why = f"its forward reads a parameter of {owner} while {unit} does not run, for which FSDP gathers it"
            raise WrongModel(model, why, f"a call of {unit}, blocks without it, or parallel=ddp")


def _check_embedding(name: str, embedding: nn.Embedding, plan: Plan) -> None:
    """Options by which a table's gradient or values depend on which rows of the batch a rank and a micro-batch have."""
    if embedding.sparse:
        why = "a sparse gradient has only the rows that were read, which is not sharded, clipped or added up"
        raise WrongModel(name, why, "an embedding without sparse=True")
    if embedding.scale_grad_by_freq:
        why = "scale_grad_by_freq counts the tokens of a micro-batch on a rank, where one process counts those of the batch"
        raise WrongModel(name, why, "an embedding without it")
    if embedding.max_norm is not None and plan.sizes.world > 1:
        why = "max_norm changes in forward the rows that a rank reads, and no other rank learns of it"
        raise WrongModel(name, why, "an embedding without it, or parallel=none")


def _shown_cut(axis: str | None, dim: int | None) -> str:
    rule = f"by a rule over {axis}" if axis else "without a rule"
    return f"whole {rule}" if dim is None else f"on dim {dim}"


def _check_tie(name: str, owner: str, model: nn.Module, plan: Plan, fully_sharded: bool) -> None:
    modules = [model.get_submodule(one.rpartition(".")[0]) for one in (owner, name)]
    if modules[0] is modules[1]:  # one module at two places, under one rule
        return
    cuts, groups = [], []
    for one in (owner, name):
        rule = plan.rules.get(one.rpartition(".")[0])
        cuts.append((rule.axis if rule else None, sharded_dim(one, model, plan.rules)))
        groups.append(unit_of(one, plan.blocks))
    if cuts[0] != cuts[1]:
        shown = " and ".join(_shown_cut(*cut) for cut in cuts)
        why = f"it is tied to {name}, and they are kept {shown}"
        legal = (
            "rules that leave the same rows of both on the same rank, such as rowwise for an embedding and "
            "colwise for an output layer"
        )
        raise ConfigError("model.plans", owner, why, legal)
    if fully_sharded and groups[0] != groups[1]:
        legal = "blocks that hold both or neither"
        raise ConfigError("model.blocks", plan.blocks, f"{owner} is tied to {name}, in another block", legal)


def _check_rows(name: str, parameter: nn.Parameter, model: nn.Module, plan: Plan) -> None:
    """FSDP splits a rank's rows, DTensor computes where the splits are: both must agree. And each rank needs some: torch takes no
    row of an empty table, and no maximum of no logits."""
    if sharded_dim(name, model, plan.rules) != 0:
        return
    axis = plan.rules[name.rpartition(".")[0]].axis
    ways, shards, rows = plan.sizes[axis], plan.sizes.shards, parameter.shape[0]
    if not _chunk(rows, ways, ways - 1):
        at_fault, why = axis, f"it leaves ranks without any of the {rows} rows of {name}"
    elif not _same_shards(rows, ways, shards):
        at_fault = SHARD.name
        why = (
            f"it does not cut the {rows} rows of {name} evenly after the {ways} ranks of the plan's rule have"
        )
    else:
        return
    fits = next(
        n for n in itertools.count(rows + 1) if _chunk(n, ways, ways - 1) and _same_shards(n, ways, shards)
    )
    legal = f"{fits} rows, such as model.vocab_size={fits}, or another mesh"
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    is_vocabulary = embedding is not None and embedding.num_embeddings == rows
    fix = {"model.vocab_size": fits} if is_vocabulary else None
    raise ConfigError(f"mesh.{at_fault}", plan.sizes[at_fault], why, legal, fix=fix)


@functools.cache
def _same_shards(rows: int, ways: int, shards: int) -> bool:
    """Whether FSDP and DTensor put the same rows on each rank.

    FSDP splits what a rank holds by its rule. DTensor (its _StridedShard, then Shard) puts together the same shard of all
    ranks of the rule, and splits that among them: both agree where it cuts between two ranks' rows. Only the first shards
    are compared: the others are empty in both.
    """
    if rows % ways == 0:
        return True
    held = [_chunk(rows, ways, way) for way in range(ways)]
    for shard in range(min(shards, -(-rows // ways))):
        by_fsdp = [_chunk(count, shards, shard) for count in held]
        if by_fsdp != [_chunk(sum(by_fsdp), ways, way) for way in range(ways)]:
            return False
    return True


def _chunk(count: int, parts: int, part: int) -> int:
    """Number of elements of one of `torch.chunk`'s parts."""
    size = -(-count // parts)
    return max(0, min(size, count - part * size))
