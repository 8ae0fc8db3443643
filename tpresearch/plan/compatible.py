"""Whether a model, its data and its loss go together, judged by shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

from tpresearch.config.choices import Loss
from tpresearch.config.errors import ConfigError, WrongModel, one_line, place_of
from tpresearch.config.schema import Config
from tpresearch.config.validate import needs_logits

OTHER_KIND = re.compile(r"\b(long|int|int64|int32|token ids)\b", re.IGNORECASE)
"""Of errors of layers that are given token ids for numbers, or numbers for token ids."""


class TableTooShort(IndexError):
    """Of a lookup of numbers that count positions."""

    def __init__(self, last: int, rows: int) -> None:
        super().__init__(f"{last} is looked up in a table of {rows} rows")
        self.last, self.rows = last, rows


def check_lookup(table: Tensor, indices: Tensor, last_numbers: Mapping[torch.UntypedStorage, int]) -> None:
    """Refuse a lookup that would end only on a device.

    Args:
        last_numbers: of tensors whose numbers count, as positions do, the last.

    Raises:
        TypeError: for indices that are no whole numbers, for which torch 2.11 does not ask on the meta device.
        TableTooShort: for positions that the table lacks.
    """
    if indices.is_floating_point():
        raise TypeError("an embedding takes token ids")
    last = last_numbers.get(indices.untyped_storage(), 0)
    steps = zip(indices.shape, indices.stride(), strict=True)
    furthest = indices.storage_offset() + sum((size - 1) * stride for size, stride in steps)
    has_last = (furthest + 1) * indices.element_size() == indices.untyped_storage().nbytes()
    if has_last and last >= len(table):
        raise TableTooShort(last, len(table))


def check_loss(output: torch.Size | None, targets: Tensor, cfg: Config) -> None:
    """Refuse a cross-entropy without targets, or without a logit for each entry of the vocabulary: as the loss, and on held-out rows."""
    if not needs_logits(cfg):
        return
    if targets.numel() == 0:
        why, legal = f"data.source={cfg.data.source} has no targets", "sum"
        raise ConfigError("train.loss", cfg.train.loss, why, legal, fix={"train.loss": "sum"})
    if output is not None and (output[:-1] != targets.shape or output[-1] < cfg.tokenizer.vocab_size):
        why = f"its output has shape {_format_shape(output)} for targets {_format_shape(targets.shape)}"
        legal = f"logits [b, s, V] with V at least tokenizer.vocab_size={cfg.tokenizer.vocab_size}"
        if cfg.train.loss is Loss.sum:
            why = f"the held-out loss is a cross-entropy, and of model {cfg.model.name} {why}"
            fix = {"train.eval_rows": 0}
            raise ConfigError("train.eval_rows", cfg.train.eval_rows, why, f"0, or {legal}", fix=fix)
        raise WrongModel(cfg.model.name, why, legal)


def incompatible(inputs: Tensor, cfg: Config, error: Exception) -> ConfigError:
    """The refusal of a model that does not run on a batch, from what it raised."""
    if isinstance(error, TypeError) and "forward()" in str(error):
        why = f"its forward does not take the inputs alone: {one_line(error)}"
        return WrongModel(
            cfg.model.name, why, "forward(tokens) that returns logits: the loss is computed from these"
        )
    if isinstance(error, TableTooShort) and error.last == cfg.data.seq_len - 1:
        why = f"model {cfg.model.name} looks up position {error.last} in a table of {error.rows} rows ({place_of(error)})"
        legal, fix = f"at most {error.rows}, or a longer table", {"data.seq_len": error.rows}
        return ConfigError("data.seq_len", cfg.data.seq_len, why, legal, fix=fix)
    shapes = _format_shape(inputs.shape), "x".join(map(str, inputs.shape))
    of_width = any(shape in str(error) for shape in shapes)  # the first layer's, and no other's
    if not (of_width or OTHER_KIND.search(str(error))):
        why = f"{type(error).__name__} at {place_of(error)}: {one_line(error)}"
        return WrongModel(cfg.model.name, why, f"a forward that takes inputs {_format_shape(inputs.shape)}")
    kind = "numbers" if inputs.is_floating_point() else "token ids"
    other = {"data": "random_tokens"} if kind == "numbers" else {"data": "uniform", "train.loss": "sum"}
    why = f"model {cfg.model.name} does not take {kind} {_format_shape(inputs.shape)}: {one_line(error)}"
    legal = " ".join(f"{key}={value}" for key, value in other.items()) + ", or a model for these data"
    if kind == "numbers" and of_width:
        legal = "the input width of its first layer; by default it follows model.dim"
        return ConfigError("data.width", cfg.data.width, why, legal)
    return ConfigError("data.source", cfg.data.source, why, legal, fix=dict(other))


def _format_shape(shape: torch.Size) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def leaves_between(outputs: object, inputs: object) -> list[Tensor]:
    """The leaves that ops on the way from these outputs to these inputs take besides, such as the weights of layers between them."""
    tensors = ([t for t in tree_leaves(each) if isinstance(t, Tensor)] for each in (outputs, inputs))
    first, last = ([get_gradient_edge(t).node for t in each] for each in tensors)
    leads, left, found = dict.fromkeys(last, True), list(first), list[Tensor]()
    while left:
        node = left[-1]
        after = [other for other, _ in node.next_functions if other is not None]
        if node not in leads:
            leads[node] = False
            left += [other for other in after if other not in leads]
            continue
        if left.pop() not in last and not leads[node] and any(leads[other] for other in after):
            leads[node] = True
            found += [other.variable for other in after if hasattr(other, "variable")]
    return found
