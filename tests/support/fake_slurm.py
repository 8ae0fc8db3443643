"""A Slurm of this machine alone, for tests: sbatch, srun, sacct, scancel and scontrol requeue as far as submitit uses them.

Linked into a folder on PATH under each of these names. Jobs start at once; their nodes are all `localhost`, and that
of the array task FAKE_SLURM_LOST fails. In the folder FAKE_SLURM it keeps `<id>.sh` (the script as submitted), `<id>[_<task>].state`, and the processes of each step's
nodes in `<id>[_<task>].nodes`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "scancel", "scontrol")


def install(folder: Path) -> dict[str, str]:
    """The environment in which these commands are found."""
    (folder / "bin").mkdir(parents=True)
    for name in COMMANDS:
        path = folder / "bin" / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        path.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "FAKE_SLURM": str(folder)}


def sbatch(script: str) -> None:
    folder = _folder()
    number = 41 + len(list(folder.glob("*.sh")))
    text = Path(script).read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    nodes = int(options.get("nodes", 1))
    if nodes > int(os.environ.get("FAKE_SLURM_NODES", nodes)):
        sys.exit("sbatch: error: Node count specification invalid")
    (folder / f"{number}.sh").write_text(text)
    of_job = {
        "SLURM_JOB_ID": str(number),
        "SLURM_NTASKS": str(nodes * int(options.get("ntasks-per-node", 1))),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": ",".join(["localhost"] * nodes),
    }
    array = re.match(r"(\d+)-(\d+)", options.get("array", ""))
    tasks = [str(task) for task in range(int(array[1]), int(array[2]) + 1)] if array else [None]
    for task in tasks:
        of_task = {"SLURM_ARRAY_JOB_ID": str(number), "SLURM_ARRAY_TASK_ID": task} if task else {}
        state = folder / f"{number}{f'_{task}' if task else ''}.state"
        if task and task == os.environ.get("FAKE_SLURM_LOST"):
            state.write_text("NODE_FAIL")
            continue
        state.write_text("RUNNING")
        again = state.with_suffix(".requeue")
        once = f"bash {folder}/{number}.sh && echo COMPLETED > {state} || echo FAILED > {state}"
        command = f"{once}; while rm {again}; do echo RUNNING > {state}; {once}; done"
        started = subprocess.Popen(
            ["bash", "-c", command],
            env=os.environ | of_job | of_task,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        state.with_suffix(".pid").write_text(str(started.pid))
    print(f"Submitted batch job {number}")


def srun(*words: str) -> None:
    """The command after the options, once a node, each of which gets all signals of the step."""
    command = list(words[next(i for i, word in enumerate(words) if word == sys.executable) :])
    (output,) = (words[i + 1] for i, word in enumerate(words) if word == "--output")
    nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    job = os.environ["SLURM_JOB_ID"]
    array = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    started = []
    for node in range(nodes):
        of_task = {"SLURM_PROCID": str(node), "SLURM_NODEID": str(node), "SLURM_LOCALID": "0"}
        of_step = {"SLURM_STEP_NUM_TASKS": str(nodes), "SLURM_STEP_NUM_NODES": str(nodes)}
        named = {"%j": job, "%A": array[0] or "", "%a": array[1] or "", "%t": str(node)}
        path = output
        for pattern, value in named.items():
            path = path.replace(pattern, value)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as log:
            env = os.environ | of_task | of_step
            started.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    task = f"_{array[1]}" if array[1] else ""
    pids = " ".join(str(process.pid) for process in started)
    (_folder() / f"{array[0] or job}{task}.nodes").write_text(pids)
    sys.exit(max(process.wait() for process in started))


def sacct(*words: str) -> None:
    print("JobID|State|NodeList")
    for path in sorted(_folder().glob("*.state")):
        print(f"{path.stem}|{path.read_text().strip()}|localhost")


def scancel(job: str) -> None:
    path = _folder() / f"{job}.pid"
    os.killpg(int(path.read_text()), signal.SIGTERM)
    path.with_suffix(".state").write_text("CANCELLED")


def scontrol(_: str, job: str) -> None:
    (_folder() / f"{job}.requeue").touch()


def _folder() -> Path:
    return Path(os.environ["FAKE_SLURM"])


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {"sbatch": sbatch, "srun": srun, "sacct": sacct}
    commands |= {"scancel": scancel, "scontrol": scontrol}
    commands[sys.argv[1]](*sys.argv[2:])
