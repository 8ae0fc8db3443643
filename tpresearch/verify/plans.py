"""The plans to verify: their configs, their traces, and their errors against one process."""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass, field

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from rich.progress import track

from tpresearch.config import Config
from tpresearch.config.choices import DeviceKind, Float8, OptimizerName
from tpresearch.config.errors import ConfigError, WrongModel
from tpresearch.config.mesh import used_axes, warning_of_unused_axes
from tpresearch.config.near_names import nearest
from tpresearch.config.validate import OPTIMIZER_OPTIONS, validate
from tpresearch.config.world import World
from tpresearch.data.check import check_data
from tpresearch.data.pipeline import prepare
from tpresearch.data.rows import AnyCorpus, SyntheticCorpus
from tpresearch.launch.command import is_override
from tpresearch.launch.composition import typed_config
from tpresearch.parallel.device import choose_device, gpu_count
from tpresearch.train.preflight import plan_model
from tpresearch.verify.integers import IntegerResult, check_matmuls, max_over_ranks
from tpresearch.verify.ranks import RankError, Ranks
from tpresearch.verify.reference import reference
from tpresearch.verify.trace import MaxError, RunTrace, compare, out_of_tolerance, tolerance, trace_run

log = logging.getLogger(__name__)

TIMEOUT_S = 900
"""Timeout without progress on any rank; one that raises or dies is noticed at once."""

TRAIN_ROWS = 256
"""Number of train rows used: enough for a few steps, few enough to pass to each rank."""


@dataclass
class Result:
    """One plan under one optimizer."""

    plan: str
    optimizer: str
    tolerance: float
    """The largest of its quantities'."""
    mesh: dict[str, int]
    """Ranks along each axis."""
    worst: dict[str, MaxError] = field(default_factory=dict)
    out: list[str] = field(default_factory=list)
    """Quantities that are out of tolerance."""
    note: str | None = None
    """Note on axes of the plan that have size 1 on its mesh."""
    integers: list[IntegerResult] | None = None
    """The plan's matmuls on integers, if that was asked for: with the first optimizer, since none is involved."""
    error: str | None = None
    """Why it did not run, if it did not."""

    @property
    def passed(self) -> bool:
        return not self.out and self.error is None and all(exact.passed for exact in self.integers or ())


def configs_by_plan(cfg: Config, arguments: list[str]) -> dict[str, list[Config]]:
    """One config per plan and optimizer: the given config with only those two choices changed. A plan or optimizer that is chosen as
    for a run is the only one.

    Raises:
        ConfigError: for a plan that is not in conf/parallel, and for choices of both kinds.
    """
    loader = GlobalHydra.instance().config_loader()
    known = loader.get_group_options("parallel")
    parser = OverridesParser.create()
    words = [word for word in arguments if is_override(word)]
    keys = {word: parser.parse_override(word).key_or_group for word in words}
    typed = {keys[word]: word.partition("=")[2] for word in words}
    for one, several in (("parallel", "verify.plans"), ("optimizer", "verify.optimizers")):
        if one in typed and several in typed:
            raise ConfigError(one, typed[one], f"{several} is given too", "one of both", fix={one: None})
    plans = [typed["parallel"]] if "parallel" in typed else cfg.verify.plans
    optimizers = [cfg.optimizer.name] if "optimizer" in typed else cfg.verify.optimizers
    for plan in plans:
        if plan not in known:
            why, legal = "no such plan", "one of " + ", ".join(nearest(plan, known))
            raise ConfigError("verify.plans", plan, why, legal)

    def config(plan: str, name: OptimizerName) -> Config:
        others = {key for owner, options in OPTIMIZER_OPTIONS.items() if owner is not name for key in options}
        taken = [word for word in words if keys[word] not in others]
        overrides = [*taken, f"parallel={plan}", f"optimizer={typed.get('optimizer', name)}"]
        composed = loader.load_configuration("verify", overrides, run_mode=RunMode.RUN)
        return _with_two_micro_batches(typed_config(composed))

    found = {plan: [config(plan, name) for name in optimizers] for plan in plans}
    left = [plan for plan, (c, *_) in found.items() if c.parallel.tensor in (None, *c.model.plans)]
    if 0 < len(left) < len(found):
        lacking = ", ".join(plan for plan in found if plan not in left)
        why = f"model {cfg.model.name} has no sharding rules for {lacking} in its plans ({', '.join(cfg.model.plans) or 'none'})"
        rest = f"[{','.join(left)}]"
        raise ConfigError("verify.plans", f"[{','.join(found)}]", why, rest, fix={"verify.plans": rest})
    return found


def _with_two_micro_batches(cfg: Config) -> Config:
    """The config with two micro-batches per rank where train.micro_batch_size is left open, so that accumulation is verified too."""
    if cfg.train.micro_batch_size is not None:
        return cfg
    half, odd = divmod(cfg.train.global_batch_size // validate(cfg, ranks_of(cfg)).dp, 2)
    if odd or not half:
        return cfg
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, micro_batch_size=half))


def ranks_of(cfg: Config) -> int:
    """verify.world_size, or more if the plan needs them to give two ranks to each axis that its mesh leaves open."""
    sizes = [getattr(cfg.mesh, axis.name) for axis in used_axes(cfg.parallel)]
    if not sizes:
        return 1
    return max(cfg.verify.world_size, math.prod(2 if size in (None, -1) else size for size in sizes))


def with_device_chosen(plans: dict[str, list[Config]]) -> dict[str, list[Config]]:
    """The plans with device=auto resolved once, by the plan with most ranks: otherwise one process would take the only GPU,
    and four ranks the CPU.
    """
    most = max(ranks_of(cfgs[0]) for cfgs in plans.values())
    kind = DeviceKind.cuda if gpu_count() >= most else DeviceKind.cpu
    return {
        plan: [dataclasses.replace(c, device=kind) if c.device is DeviceKind.auto else c for c in cfgs]
        for plan, cfgs in plans.items()
    }


def check_plan(cfg: Config) -> None:
    """Refuse what cannot run, before anything is started."""
    ranks = ranks_of(cfg)
    sizes = validate(cfg, ranks)
    choose_device(cfg, World(size=ranks, local_size=ranks))
    check_data(cfg.data, cfg.tokenizer)
    if cfg.train.float8 is not Float8.none:
        why = "each rank scales by its own rows, so that plans round otherwise: equality with one process is not claimed"
        raise ConfigError("train.float8", cfg.train.float8, why, "none", fix={"train.float8": "none"})
    _, plan = plan_model(cfg, sizes)
    if plan.probe.draws:
        names = ", ".join(name or "the model itself" for name in plan.probe.draws)
        why = f"it draws random numbers in {names}, which differ between plans"
        legal = "a model that draws none in training, such as with a dropout of 0; equality is not claimed otherwise"
        raise WrongModel(cfg.model.name, why, legal)


def check_moments(cfg: Config) -> None:
    """Refuse moments that round, whichever optimizer comes first."""
    if (moments := cfg.optimizer.moment_dtype) not in (None, cfg.train.weight_dtype):
        why = "a sum in another order may round to the next of its numbers: equality with one process is not claimed"
        key = "optimizer.moment_dtype"
        raise ConfigError(key, moments, why, "null", fix={key: None})


def verify_plans(plans: dict[str, list[Config]], cfg: Config) -> list[Result]:
    """Train in one process, then under each plan, and compare."""
    plans = with_device_chosen(plans)
    ranks = Ranks(TIMEOUT_S)
    ranks.start()
    corpus = _with_few_rows(prepare(cfg.data, cfg.tokenizer))
    first = next(iter(plans.values()))
    references = [reference(c, corpus, cfg.verify.steps) for c in first]
    jobs = [(plan, *pair) for plan, cfgs in plans.items() for pair in zip(cfgs, references, strict=True)]
    results: list[Result] = []
    for plan, c, right in track(jobs, description="verifying", transient=True):
        integers = c.verify.integers and c is plans[plan][0]
        results.append(_verify_plan(ranks, plan, c, right, corpus, integers))
    return results


def _verify_plan(
    ranks: Ranks, plan: str, cfg: Config, right: RunTrace, corpus: AnyCorpus, integers: bool
) -> Result:
    """One plan and optimizer compared with the reference; its matmuls on integers too if requested."""
    sizes = validate(cfg, ranks_of(cfg))
    result = Result(plan, cfg.optimizer.name, tolerance("weights", cfg.train.dtype), dict(sizes))
    result.note = warning_of_unused_axes(sizes, cfg.parallel)
    try:
        ours = ranks.run(ranks_of(cfg), trace_on_rank_0, cfg, corpus)[0]
        if integers:
            result.integers = max_over_ranks(ranks.run(ranks_of(cfg), check_matmuls, cfg))
    except RankError as error:
        result.error = str(error).strip().splitlines()[-1]
        log.error("%s: %s", plan, error)
        return result
    result.worst = compare(ours, right)
    result.out = out_of_tolerance(result.worst, cfg.train.dtype)
    return result


def trace_on_rank_0(world: World, cfg: Config, corpus: AnyCorpus) -> RunTrace | None:
    """The trace from rank 0 alone, since all ranks have the same, and it is large to send."""
    found = trace_run(cfg, corpus, world, cfg.verify.steps)
    return found if world.rank == 0 else None


def _with_few_rows(corpus: AnyCorpus) -> AnyCorpus:
    if isinstance(corpus, SyntheticCorpus):
        return corpus
    return dataclasses.replace(
        corpus, train=corpus.train[:TRAIN_ROWS].copy(), held_out=corpus.held_out[:TRAIN_ROWS].copy()
    )
