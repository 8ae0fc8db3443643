"""The tutorial's three scripts and each of their mistakes, one at a time: its effect on bytes, loss and gradients.

    python experiments/seed/measure.py [case ...] [--tables-only]

For each case (a name below; all, if none is given) it runs `torchrun ... train.py`, traces what
`python -m tpresearch.verify` compares, and writes results.csv and losses.csv (record.py says where), keeping the rows of cases
that were not run. Then it prints the tables of README.md.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from tpresearch.api import load
from tpresearch.config import Config
from tpresearch.config.schema import Dtype
from tpresearch.config.validate import validate
from tpresearch.data.pipeline import prepare
from tpresearch.ledger.formulas import expected_entries
from tpresearch.track.record import read_metrics, read_summary
from tpresearch.track.text import bytes_text
from tpresearch.train.preflight import plan_model
from tpresearch.verify.plans import trace_on_rank_0
from tpresearch.verify.ranks import Ranks
from tpresearch.verify.reference import reference
from tpresearch.verify.trace import MaxError, compare, out_of_tolerance

sys.path.append(str(Path(__file__).parents[1]))
from record import place, read_rows, write_rows

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
QUANTITIES = ("initial weights", "loss", "grad norm", "gradients", "weights", "between ranks")
SHORTER = ("data.seq_len=64",)
"""Of the 2D script: a quarter of its 256 tokens a row, so that the table takes minutes on two cores."""
NARROWER = ("data.seq_len=16", "tokenizer.vocab_size=512")
"""Of the 2D script, where whole gradients and weights of every step are compared in float64."""


@dataclass(frozen=True)
class Case:
    experiment: str
    switch: str
    overrides: tuple[str, ...] = ()
    plan: str | None = None
    """Another plan than the script's."""

    @property
    def name(self) -> str:
        return f"{self.experiment}/{self.switch}"

    def train(self, folder: Path) -> list[str]:
        plan = [f"parallel={self.plan}", "mesh=auto"] if self.plan else []
        launch = ["torchrun", "--standalone", "--nproc-per-node=4", "train.py"]
        shorter = SHORTER if self.experiment == "seed_2d" else ()
        typed = [f"experiment={self.experiment}", *plan, *self.overrides, *shorter]
        return [*launch, *typed, f"hydra.run.dir={folder}"]

    def verify(self) -> list[str]:
        plan = [f"verify.plans=[{self.plan}]", "mesh=auto"] if self.plan else []
        narrower = NARROWER if self.experiment == "seed_2d" else ()
        typed = [f"experiment={self.experiment}", *plan, *self.overrides, *narrower]
        return ["python", "-m", "tpresearch.verify", *typed, "verify.steps=3", "verify.optimizers=[adamw]"]


KEEP, OWN = ("defects.keep_gradients=true",), ("defects.weights_per_rank=true",)
OVERLAP, GATHER = ("defects.overlapping_batches=true",), ("parallel.loss_parallel=false",)
ROOT_ONLY, SUM = ("model.blocks=[]",), ("train.loss=sum",)
CASES = [
    Case("seed_tp", "none"),
    Case("seed_tp", "keep_gradients", KEEP),
    Case("seed_tp", "weights_per_rank", OWN),
    Case("seed_tp", "weights_per_rank, ddp", OWN, "ddp"),
    Case("seed_tp", "overlapping_batches", OVERLAP),
    Case("seed_tp", "overlapping_batches, ddp", OVERLAP, "ddp"),
    Case("seed_sp", "none"),
    Case("seed_sp", "keep_gradients", KEEP),
    Case("seed_sp", "weights_per_rank", OWN),
    Case("seed_sp", "outputs gathered", GATHER),
    Case("seed_2d", "none"),
    Case("seed_2d", "keep_gradients", KEEP),
    Case("seed_2d", "weights_per_rank", OWN),
    Case("seed_2d", "overlapping_batches", OVERLAP),
    Case("seed_2d", "logits gathered", GATHER),
    Case("seed_2d", "one FSDP unit", ROOT_ONLY),
    Case("seed_2d", "sum of outputs", SUM),
    Case("seed_2d", "all of them", KEEP + OWN + OVERLAP + GATHER + ROOT_ONLY + SUM),
]


def run(words: list[str], out: Path) -> None:
    """A command, shown and run; its output goes to a file."""
    print(shlex.join(words), flush=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    with out.open("w") as file:
        subprocess.run(words, cwd=ROOT, env=environment, stdout=file, stderr=file, check=True)


def composed(name: str, words: list[str]) -> Config:
    """The config that a command line composes."""
    overrides = [word for word in words if "=" in word and not word.startswith(("-", "hydra."))]
    return load(*overrides, config_name=name)


def verified(case: Case, ranks: Ranks) -> dict[str, MaxError]:
    """What the case's verify command compares, on ranks that are there already."""
    words = case.verify()
    plan = case.plan or composed("verify", words).verify.plans[0]
    cfg = composed("verify", [*words, f"parallel={plan}"])
    corpus = prepare(cfg.data, cfg.tokenizer)
    right = reference(cfg, corpus, cfg.verify.steps)
    return compare(ranks.run(4, trace_on_rank_0, cfg, corpus)[0], right)


def sent_by_the_script(case: Case) -> int:
    """Bytes that rank 0 sends in a step at the script's own sizes, by the formulas that the measured ones equal."""
    words = [word for word in case.train(Path()) if word not in SHORTER]
    cfg = composed("train", words)
    entries = expected_entries(*plan_model(cfg, validate(cfg, 4)), cfg)
    assert entries is not None
    return sum(entry.sent_bytes for entry in entries)


def measure(case: Case, folder: Path, ranks: Ranks) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row of results.csv, and the case's rows of losses.csv."""
    folder.mkdir(parents=True)
    run(case.train(folder / "train"), folder / "train.out")
    worst = verified(case, ranks)
    rows, summary = read_metrics(folder / "train"), read_summary(folder / "train")
    ledger = json.loads((folder / "train" / "ledger.json").read_text())
    assert ledger["measured"] == ledger["expected"], "what was sent is not what the formulas say"
    held = {kind["kind"]: kind["most_bytes"] for kind in ledger["memory"]["measured"]}
    gathers = [e for e in ledger["measured"] if (e["axis"], e["collective"]) == ("dp_shard", "all_gather")]
    row = {
        "experiment": case.experiment,
        "switch": case.switch,
        "first_loss": rows[0]["train/loss"],
        "last_loss": rows[-1]["train/loss"],
        "sent_bytes_per_step": summary["comm/bytes_per_step"],
        "sent_bytes_at_script_size": sent_by_the_script(case),
        "sent_over_tp": sum(e["sent_bytes"] for e in ledger["measured"] if e["axis"] == "tp"),
        "weights_gathered_times": sum(e["count"] for e in gathers),
        "weights_gathered_bytes": sum(e["tensor_bytes"] for e in gathers),
        "temporaries_most_bytes": held["temporaries"],
        "activations_most_bytes": held["activations"],
        "peak_bytes": ledger["memory"]["peak_bytes"],
        **{f"error of {name}": worst[name].error for name in QUANTITIES},
        "out": ", ".join(out_of_tolerance(worst, Dtype.float64)),
        "torch": torch.__version__,
        "date": datetime.now().date().isoformat(),
        "command": shlex.join(case.train(folder)[:-1]),
        "verify_command": shlex.join(case.verify()),
    }
    keys = {"experiment": case.experiment, "switch": case.switch}
    return row, [{**keys, "step": r["train/step"], "loss": r["train/loss"]} for r in rows]


def update(name: str, rows: list[dict[str, Any]]) -> None:
    """The file with these rows in the place of those of their case, in the order of CASES."""
    new = {(row["experiment"], row["switch"]) for row in rows}
    kept = [row for row in read_rows(HERE, name) if (row["experiment"], row["switch"]) not in new]
    order = [(case.experiment, case.switch) for case in CASES]
    together = sorted([*kept, *rows], key=lambda row: order.index((row["experiment"], row["switch"])))
    write_rows(place(HERE) / name, together)


def print_tables() -> None:
    results = read_rows(HERE, "results.csv")
    errors = ("initial weights", "loss", "gradients", "weights", "between ranks")
    for experiment in dict.fromkeys(row["experiment"] for row in results):
        mine = [row for row in results if row["experiment"] == experiment]
        print(f"\n`experiment={experiment}`\n")
        columns = [
            "switch",
            "loss at step 1",
            "at step 10",
            "sent per step",
            "of it over tp",
            "weights gathered",
        ]
        columns += ["temporaries", *(f"error of {name}" for name in errors[:-1]), "apart between ranks"]
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for row in mine:
            cells = [
                row["switch"],
                *(f"{float(row[key]):.6g}" for key in ("first_loss", "last_loss")),
                *(bytes_text(int(row[key])) for key in ("sent_bytes_per_step", "sent_over_tp")),
                f"{row['weights_gathered_times']} x, {bytes_text(int(row['weights_gathered_bytes']))}",
                bytes_text(int(row["temporaries_most_bytes"])),
                *(error_text(row[f"error of {name}"]) for name in errors),
            ]
            print(f"| {' | '.join(cells)} |")


def error_text(value: str) -> str:
    return f"{float(value):.0e}" if float(value) else "0"


def main() -> None:
    wanted = [word for word in sys.argv[1:] if word != "--tables-only"]
    if "--tables-only" in sys.argv:
        print_tables()
        return
    unknown = set(wanted) - {case.name for case in CASES}
    assert not unknown, f"no such case: {unknown}; there are {[case.name for case in CASES]}"
    ranks = Ranks()
    folder = ROOT / f"outputs/seed/{datetime.now():%Y-%m-%d/%H-%M-%S}"
    for case in CASES:
        if not wanted or case.name in wanted:
            row, losses = measure(case, folder / case.name.replace(" ", "_").replace(",", ""), ranks)
            update("results.csv", [row])
            update("losses.csv", losses)
    print_tables()


if __name__ == "__main__":
    main()
