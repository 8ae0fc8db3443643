"""What is said of an op that computes something else on a rank's shards than one process on whole tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NoReturn

from torch.distributed.tensor import Shard

from tpresearch.config.errors import ConfigError, WrongModel
from tpresearch.config.schema import Config
from tpresearch.plan.compiler import Plan
from tpresearch.plan.rules import SEQUENCE
from tpresearch.plan.sequence import rule_to_add

PARTIAL = "is whole on each rank and meets"
LEGAL = "a forward that computes the same on shards as on whole tensors"
LOCAL_INPUT = (
    f"{LEGAL}, with a rule for each layer that takes what one of style input leaves: colwise, or a _target_ that makes it "
    "local, as CopyToShards in docs/plans.md does"
)


class Refusals:
    """The refusals of a plan. In each, `op` is the op's name and `module` the one that calls it."""

    def __init__(self, plan: Plan, cfg: Config) -> None:
        self._plan, self._cfg = plan, cfg

    def along(self, op: str, module: str, layer: str) -> NoReturn:
        """Of an op along the dim in which a layer's output is sharded; no layer is known of a tensor in the size of a shard."""
        if not layer:
            self.other(op, module, "works along a dim with as many elements as a rank's shard has")
        rule = self._plan.rules[layer]
        layout = next(each for each in rule.dst if isinstance(each, Shard))
        key, value = f"{rule.config_key}.dst", rule.rule.dst or f"shard:{layout.dim}"
        if layout == SEQUENCE and self._cfg.data.has_sequence:
            why = (
                f"{op} in {module or 'the model'} needs all positions of the output of {layer}, and each rank would apply it to "
                "its part of the sequence alone"
            )
            legal = "parallel.tensor=tp, or a module of its own for that, with a rule whose _target_ is a ParallelStyle that gathers its input"
            fix: dict[str, object] = {"parallel.tensor": "tp"} if "tp" in self._cfg.model.plans else {}
            raise ConfigError(key, value, why, legal, fix=fix)
        why = f"{op} needs all features of the output of {layer}, and each rank would apply it to its shard alone"
        legal = "replicate; or in the model a layer of its own for each part, or heads in a dim of their own before it"
        raise ConfigError(key, value, why, legal, fix={key: "replicate"})

    def pair(self, op: str, module: str, layers: Iterable[str]) -> NoReturn:
        """Of an op on shards of which a rank has other elements than of each other."""
        of = " and ".join(dict.fromkeys(layer for layer in layers if layer))
        self.other(op, module, f"takes shards of {of}, and a rank's elements of them do not belong together")

    def view(
        self, op: str, module: str, layer: str, whole: Sequence[int], own: Sequence[int], ranks: int
    ) -> NoReturn:
        """Of a view by which a shard becomes no part of what the whole tensor becomes."""
        why = (
            f"{op}{_in(module)} makes {'x'.join(map(str, whole))} of the output of {layer}, and of one of {ranks} "
            f"ranks' shards {'x'.join(map(str, own))}, which is no part of that"
        )
        legal = "a number of heads that follows from the tensor, before what each head has several of, as in view(b, s, -1, 3, head_dim)"
        raise WrongModel(self._cfg.model.name, why, legal)

    def partial_activation(self, op: str, module: str, given_by: str, layer: str) -> None:
        """Of what a layer has given to each rank whole, and whose gradient is that of this rank's shard alone."""
        plan = self._cfg.parallel.tensor
        why = f"what {given_by} has given {PARTIAL} {_shard_of(layer)} ({op}{_in(module)}), so that its gradient is partial"
        legal = "a rule for its module with a style by which that is summed, as CopyToShards in docs/plans.md"
        raise ConfigError(f"model.plans.{plan}", plan, why, legal, fix={})

    def partial_parameter(self, op: str, module: str, dim: int | None, layer: str) -> None:
        """The same of a parameter, unless a rule sums it; `dim` is the one in which its module's input is sharded."""
        plan, rule = self._cfg.parallel.tensor, self._plan.rules.get(module)
        if rule is not None and rule.rule.style == "sequence":
            return
        why = f"a parameter of {module or 'the model'} {PARTIAL} {_shard_of(layer)} ({op}), so that its gradient is partial"
        legal = (
            "a rule for its module by which partial gradients are summed: style sequence, with the dim that is "
            "sharded there as src and dst, such as shard:2"
        )
        fix = {} if rule or dim is None else rule_to_add(self._cfg, module, f"shard:{dim}")
        raise ConfigError(f"model.plans.{plan}", plan, why, legal, fix)

    def other(self, op: str, module: str, what: str, legal: str = LEGAL) -> NoReturn:
        raise WrongModel(self._cfg.model.name, f"{op}{_in(module)} {what}", legal)


class AcrossRows(Exception):
    """An op works across the rows of a batch; the message says which and where."""


class RowRefusals(Refusals):
    """Where what is divided are the rows of a batch, over ranks and micro-batches: their gradients are summed."""

    def along(self, op: str, module: str, layer: str) -> NoReturn:
        raise AcrossRows(f"{op} in {module or 'the model'}")

    def pair(self, op: str, module: str, layers: Iterable[str]) -> NoReturn:
        self.along(op, module, "")

    def view(
        self, op: str, module: str, layer: str, whole: Sequence[int], own: Sequence[int], ranks: int
    ) -> NoReturn:
        self.along(op, module, layer)

    def other(self, op: str, module: str, what: str, legal: str = "") -> NoReturn:
        self.along(op, module, "")

    def partial_activation(self, op: str, module: str, given_by: str, layer: str) -> None:
        pass

    def partial_parameter(self, op: str, module: str, dim: int | None, layer: str) -> None:
        pass


def _in(module: str) -> str:
    return f" in {module}" if module else ""


def _shard_of(layer: str) -> str:
    return f"a shard of the output of {layer}" if layer else "the size of a shard"
