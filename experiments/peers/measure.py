"""Our step against Lightning Fabric, transformers with accelerate, and the tutorial's script, under every plan.

    outputs/peers/.venv/bin/python experiments/peers/measure.py [PLAN...]
    outputs/peers/.venv/bin/python experiments/peers/measure.py --apart [PLAN...]

A torchrun job of 4 ranks for each plan (turns.py), in a network namespace of its own where that is allowed, so that what the
kernel counts at the loopback interface are these ranks' bytes and nobody else's. With `--apart`, one for each contender and round,
with the memory settings of its own: ours keeps what it frees, a script has glibc's defaults (apart.csv).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ONE_UNIT = "fsdp_one_unit"
PLANS = ("ddp", "fsdp", ONE_UNIT, "tp", "sp", "fsdp_tp")
"""Of ours; `fsdp_one_unit` gathers the model as one, as the tutorial's script does: parallel=fsdp model.blocks=[]."""
RANKS, STEPS, ROUNDS = 4, 27, 3
CONTENDERS = ("ours", "tutorial", "fabric", "transformers")
JOB = ("model=llama2_tiny", "schedule=constant", "schedule.warmup_steps=0", "optimizer.weight_decay=0")
APART = ("unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")


def run(plan: str, *overrides: str, alone: str = "") -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}")
    chosen = ("parallel=fsdp", "model.blocks=[]") if plan == ONE_UNIT else (f"parallel={plan}",)
    words = (*chosen, f"train.steps={STEPS}", "logger=none", "name=peers", *JOB, *overrides)
    apart = APART if subprocess.run([*APART, "true"], capture_output=True).returncode == 0 else ()
    program = str(Path(__file__).with_name("turns.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"PEERS_ALONE": alone} if alone else {})}
    subprocess.run([*apart, *launcher, program, *words], check=True, env=environment)


if __name__ == "__main__":
    apart = "--apart" in sys.argv
    for plan in [word for word in sys.argv[1:] if word != "--apart"] or PLANS:
        for alone in CONTENDERS * ROUNDS if apart else ("",):
            run(plan, alone=alone)
