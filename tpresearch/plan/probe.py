"""A batch sent through the meta model: whether the two are compatible, and where no gradient flows back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config, Loss


@dataclass(frozen=True)
class Probe:
    """What one forward pass over shapes alone has shown."""

    output: torch.Size | None
    """The shape of the model's output; None where the model cannot run on the meta device."""
    no_input_grad: frozenset[str]
    """Modules whose input depends on no parameter, so that it needs no gradient."""


def probe(model: nn.Module, inputs: Tensor, cfg: Config) -> Probe:
    """Send `inputs`, on the meta device, through a meta model.

    Raises:
        ConfigError: for data that the model does not take, an output that is no tensor, and a loss that does not
            fit it.
    """
    found: set[str] = set()

    def look(name: str, args: tuple[object, ...]) -> None:
        if not any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            found.add(name)

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: look(name, args))
        for name, module in model.named_modules()
    ]
    try:
        with torch.device("meta"):
            output = model(inputs)
    except NotImplementedError:  # an op that has no meaning without data
        return Probe(None, frozenset())
    except Exception as error:
        if "meta" in str(error):  # a tensor of its own on another device
            return Probe(None, frozenset())
        raise _incompatible(inputs, cfg, error) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(output, Tensor):
        raise ConfigError(
            "model",
            cfg.model.name,
            f"its output is a {type(output).__name__}",
            "a forward that returns one tensor: logits [b, s, V], or [b, ...] for train.loss=sum",
        )
    return Probe(output.shape, frozenset(found))


def check_loss(output: torch.Size | None, targets: Tensor, cfg: Config) -> None:
    """Refuse a cross-entropy without targets, or without a logit for each entry of the vocabulary.

    Raises:
        ConfigError: naming train.loss or the model's output.
    """
    if cfg.train.loss is Loss.sum:
        return
    if targets.numel() == 0:
        raise ConfigError(
            "train.loss",
            cfg.train.loss,
            f"data.source={cfg.data.source} has no targets",
            "sum",
            fix={"train.loss": "sum"},
        )
    if output is not None and (output[:-1] != targets.shape or output[-1] < cfg.tokenizer.vocab_size):
        raise ConfigError(
            "model",
            cfg.model.name,
            f"its output has shape {_shape(output)} for targets {_shape(targets.shape)}",
            f"logits [b, s, V] with V at least tokenizer.vocab_size={cfg.tokenizer.vocab_size}",
        )


def _incompatible(inputs: Tensor, cfg: Config, error: Exception) -> ConfigError:
    kind = "numbers" if inputs.is_floating_point() else "token ids"
    other = {"data": "random_tokens"} if kind == "numbers" else {"data": "uniform", "train.loss": "sum"}
    why = f"model {cfg.model.name} does not take {kind} {_shape(inputs.shape)}: {_line(error)}"
    legal = " ".join(f"{key}={value}" for key, value in other.items()) + ", or a model for these data"
    if kind == "numbers" and ("cannot be multiplied" in str(error) or "reduction dim" in str(error)):
        legal = "as many numbers as its first layer takes; left alone, it follows model.dim"
        return ConfigError("data.width", cfg.data.width, why, legal)
    return ConfigError("data.source", cfg.data.source, why, legal, fix=dict(other))


def _shape(shape: torch.Size) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
