"""All measurements that need a GPU, in one call of under ten minutes.

    python experiments/gpu/measure.py --out OUT [--limit 590] [--only facts,calibrate:50]     a stage, and its seconds
    python experiments/gpu/measure.py --out OUT --device cpu --tiny          the rehearsal

Each stage is a process of its own with a limit of its own, in the order of worth over risk; each result is a line of
OUT/results.jsonl as soon as it is there, what all stages printed is in OUT/logs.txt, and the cluster file that
tpresearch.calibrate wrote is OUT/measured.yaml.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from tempfile import gettempdir, mkdtemp

sys.path.append(str(Path(__file__).parents[1]))
from gpu.rows import append

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SMOKE = (
    *(
        "model=llama2_debug",
        "parallel=none",
        "data=random_tokens",
        "train.dtype=bfloat16",
        "parallel.compile=true",
    ),
    *("train.steps=4", "train.eval_rows=0", "logger=none", "data.seq_len=128", "train.global_batch_size=8"),
)
STAGES: dict[str, tuple[float, list[str]]] = {
    "facts": (60, [str(HERE / "facts.py")]),
    "smoke": (60, [str(ROOT / "train.py"), *SMOKE]),
    "calibrate": (65, [str(HERE / "calibrate.py")]),
    "calibrate-command": (110, ["-m", "tpresearch.calibrate"]),
    "training-8b": (260, [str(HERE / "training.py"), "8b"]),
    "correctness": (
        200,
        [
            *("-m", "pytest", "-q", "-m", "gpu", "-p", "gpu.outcomes"),
            *("-p", "no:cacheprovider", "--tb=short"),
            *("-o", "addopts=", f"--rootdir={ROOT}"),  # without options of plugins that may be missing there
            *(
                str(ROOT / "tests" / "verify" / "test_cuda.py"),
                str(ROOT / "tests" / "train" / "test_cross_entropy.py"),
                str(ROOT / "tests" / "train" / "test_draws_on_shards.py"),
                str(ROOT / "tests" / "train" / "test_randomness.py"),
                str(ROOT / "tests" / "commands" / "test_cuda_runs.py"),
                str(ROOT / "tests" / "parallel" / "test_gradient_sums.py"),
                str(ROOT / "tests" / "train" / "test_split_masters.py"),
                str(ROOT / "tests" / "simulate" / "test_calibrate_links.py"),
            ),
            # Small models: all fit beside each other.
            *(["-n", "6", "--dist", "load"] if find_spec("xdist") else []),
        ],
    ),
    "training-8b-compiled-adamw": (170, [str(HERE / "training.py"), "8b-compiled-adamw"]),
    "training-8b-float8": (90, [str(HERE / "training.py"), "8b-float8"]),
    "training-8b-float8-rowwise": (60, [str(HERE / "training.py"), "8b-float8-rowwise"]),
    "peers": (120, [str(ROOT / "experiments" / "peers" / "one_gpu.py")]),
    "training-7b": (90, [str(HERE / "training.py"), "7b"]),
    "training-7b-masters": (60, [str(HERE / "training.py"), "7b-masters"]),
    "training-8b-masters": (110, [str(HERE / "training.py"), "8b-masters"]),
    "training-8b-split-masters": (120, [str(HERE / "training.py"), "8b-split-masters"]),
}
"""Name -> (seconds at most, what Python is given)."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--limit", type=float, default=590)
    parser.add_argument("--only", type=lambda words: words.split(","), default=list(STAGES))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    until = time.monotonic() + given.limit
    words = ["OUT" if word == str(given.out) else word for word in sys.argv[1:]]
    called = shlex.join(["python", "experiments/gpu/measure.py", *words])
    append(given.out, command=called, date=f"{date.today()}")
    for asked in given.only:
        name, _, seconds = asked.partition(":")
        limit, command = STAGES[name]
        left = min(float(seconds or limit), until - time.monotonic())
        if left < 5:
            append(given.out, stage=name, status="no time left")
            continue
        run(name, [*command, *arguments(name, given, left)], left, given.out.resolve())


def arguments(name: str, given: argparse.Namespace, left: float) -> list[str]:
    """What a stage is told beside its command."""
    if name == "smoke":
        eager = ["parallel.compile=false"] if given.tiny else []  # the compiler takes longer than the rest
        return [f"device={given.device}", f"hydra.run.dir={mkdtemp()}/smoke", *eager]
    if name == "correctness":
        return []
    if name == "calibrate-command":
        out = given.out.resolve()
        on_cpu = [
            f"rows={out / 'results.jsonl'}",
            "base=h200_dgx",
        ]  # of the stage before: a CPU takes minutes
        return [f"out={out / 'measured.yaml'}", *(on_cpu if given.device == "cpu" else [])]
    tiny = ["--tiny"] if given.tiny else []
    return ["--out", str(given.out.resolve()), "--device", given.device, "--limit", str(left - 5), *tiny]


def run(name: str, command: list[str], limit: float, out: Path) -> None:
    """Run a stage in a session of its own, so that all of it ends with its time."""
    paths = [str(ROOT), str(ROOT / "tests"), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OUT": str(out),
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    began = time.monotonic()
    with (out / "logs.txt").open("a+", errors="replace") as log:
        print(f"===== {name}", file=log, flush=True)
        start = log.tell()
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=env,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            status = "done" if code == 0 else f"exit {code}"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:  # also where this process is told to end: the stage would go on, and hold the card
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(start)
        said = log.read().replace(str(out), "OUT").replace(gettempdir(), "TMP")  # results are published
        last = said.strip().splitlines()[-1:]
    seconds = round(time.monotonic() - began, 1)
    append(out, stage=name, status=status, seconds=seconds, last_line=(last or [""])[0][:300])


if __name__ == "__main__":
    main()
