"""Our step against Lightning Fabric, transformers with accelerate, and the tutorial's script, under every plan.

    outputs/peers/.venv/bin/python experiments/peers/measure.py [PLAN...]

A torchrun job of 4 ranks for each plan (turns.py), in a network namespace of its own where that is allowed, so that what the
kernel counts at the loopback interface are these ranks' bytes and nobody else's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ONE_UNIT = "fsdp_one_unit"
PLANS = ("ddp", "fsdp", ONE_UNIT, "tp", "sp", "fsdp_tp")
"""Of ours; `fsdp_one_unit` gathers the model as one, as the tutorial's script does: parallel=fsdp model.blocks=[]."""
RANKS, STEPS = 4, 27
JOB = ("model=llama2_tiny", "schedule=constant", "schedule.warmup_steps=0", "optimizer.weight_decay=0")
APART = ("unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")


def run(plan: str, *overrides: str) -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}")
    chosen = ("parallel=fsdp", "model.blocks=[]") if plan == ONE_UNIT else (f"parallel={plan}",)
    words = (*chosen, f"train.steps={STEPS}", "logger=none", "name=peers", *JOB, *overrides)
    apart = APART if subprocess.run([*APART, "true"], capture_output=True).returncode == 0 else ()
    program = str(Path(__file__).with_name("turns.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*apart, *launcher, program, *words], check=True, env=environment)


if __name__ == "__main__":
    for plan in sys.argv[1:] or PLANS:
        run(plan)
