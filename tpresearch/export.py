"""`python -m tpresearch.export checkpoint=RUN_OR_CHECKPOINT out=FOLDER`: export a checkpoint as a folder that transformers reads.

For Llama models: weights, config.json and tokenizer. It needs no ranks.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from omegaconf import MISSING

from tpresearch.checkpoint.resume import find_checkpoint
from tpresearch.config.errors import ConfigError
from tpresearch.launch.options import command, read_options

ExportDtype = StrEnum("ExportDtype", "float32 bfloat16 float16 float64")


@dataclass
class Options:
    checkpoint: str = MISSING
    """The folder of a checkpoint, or of a run for its newest one."""
    out: str = MISSING
    """The folder to write; it must not exist."""
    dtype: ExportDtype | None = None
    """Dtype of the weights: float32, bfloat16, float16 or float64; by default that of the checkpoint, so that nothing is lost."""


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    out = Path(os.path.expanduser(options.out))
    if os.path.lexists(out):
        fix = {"out": f"{options.out.rstrip('/')}-2"}
        raise ConfigError("out", out, "already exists", "a folder that does not exist", fix=fix)
    checkpoint = find_checkpoint(Path(options.checkpoint), "checkpoint")

    from tpresearch.hf.export import export  # late: a refused command should not wait for torch

    print(export(checkpoint, out, options.dtype))


if __name__ == "__main__":
    command(main, Options)
