"""A model with its sharding rules, as a file of conf/model and the ones of conf/plan that it takes in make it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Rule:
    """One named sharding rule of a plan: which modules, in which style, with which layouts.

    Layouts are `replicate`, `shard:N`, and for what the model puts out `logits` (vocabulary-sharded) or `rows`
    (split by rows): left so for the loss under loss_parallel, else replicated. A list gives one layout for each
    positional input, null for one left alone.
    """

    match: str = ""
    """Wildcards over module names, matched part by part between the dots; `.` is the model itself."""
    style: str | None = None
    """colwise, rowwise, sequence, input or output."""
    src: str | list[str | None] | None = None
    """Layout in which the input arrives (for `output`: in which the output leaves the module)."""
    dst: str | list[str | None] | None = None
    """Layout that is wanted: of the output (colwise, rowwise, output), or of the input (input)."""
    axis: str = "tp"
    """The mesh axis that it acts on."""
    units: list[str] = field(default_factory=list)
    """Model settings counting what a shard must not cut, such as n_heads."""
    target: str | None = None
    """Instead of a style: the import path of a ParallelStyle of one's own (`_target_` in YAML)."""
    args: dict[str, Any] = field(default_factory=dict)
    """Its arguments: every other key of the rule."""


@dataclass
class ModelConfig:
    """A model: what to call, with what, and the plans that shard it."""

    name: str
    target: str
    """Import path of an nn.Module class (`_target_` in YAML)."""
    args: dict[str, Any]
    """Keyword arguments of that class: every other key of the model's YAML file."""
    blocks: list[str]
    """Wildcards over module names: the units of FSDP, checkpointing and compile."""
    plans: dict[str, dict[str, Rule]]
    """Sharding plans by name (tp, sp), each a dict of named rules."""
