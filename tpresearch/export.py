"""`python -m tpresearch.export checkpoint=RUN_OR_STEP out=DIR`: a checkpoint as a folder that transformers reads."""

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

USAGE = """\
python -m tpresearch.export checkpoint=RUN_OR_CHECKPOINT out=FOLDER [dtype=float32|bfloat16|float16|float64]

  writes a Llama's weights, config.json and tokenizer as Hugging Face's libraries read them; needs no ranks
  checkpoint  the folder of a run, for its newest checkpoint, or of a checkpoint
  out         a folder that is not there yet
  dtype       of the weights that are written; by default that of the checkpoint, so that nothing is lost
"""


class WeightDtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


@dataclass
class Options:
    checkpoint: str = MISSING
    out: str = MISSING
    dtype: WeightDtype | None = None


def main() -> None:
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(USAGE, file=sys.stdout if words else sys.stderr)
        sys.exit(0 if words else 2)
    options = read_options(Options, words)
    out = Path(options.out).expanduser()
    if os.path.lexists(out):
        fix = {"out": f"{options.out.rstrip('/')}-2"}
        raise ConfigError("out", out, "it is there already", "a folder that is not", fix=fix)
    checkpoint = find_checkpoint(Path(options.checkpoint), "checkpoint")

    from tpresearch.hf.export import export  # late: a refused command should not wait for torch

    print(export(checkpoint, out, options.dtype))


if __name__ == "__main__":
    command(main)
