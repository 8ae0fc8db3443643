"""Break runs in two hundred ways, start them again, and hold each to the run that nothing befell.

python experiments/faults/measure.py [forked=160] [seed=0] [at_once=2]     # writes results.csv beside this file
"""

from __future__ import annotations

import csv
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1]), str(HERE.parents[1] / "tests")]

from faults.commands import COMMANDS, Commands  # noqa: E402
from faults.damages import DAMAGES, damaged  # noqa: E402
from faults.exam import Survived, reference, survive  # noqa: E402

from tpresearch.launch.options import command, read_options  # noqa: E402


@dataclass
class Options:
    forked: int = 160
    damages: int = len(DAMAGES)
    commands: int = len(COMMANDS)
    seed: int = 0
    at_once: int = 2


def main() -> None:
    options, began = read_options(Options, sys.argv[1:]), time.monotonic()
    out = Path(tempfile.mkdtemp(prefix="faults-"))
    whole = reference(out / "undisturbed")
    results: list[tuple[str, Survived]] = []

    def note(kind: str, survived: Survived) -> None:
        results.append((kind, survived))
        said = "; ".join(survived.problems) or "right"
        print(f"{kind} {survived.number}: {said}  ({' -> '.join(survived.history)})", flush=True)

    with ThreadPoolExecutor(options.at_once) as pool:
        for survived in pool.map(
            lambda n: survive(n, options.seed, out / f"forked-{n}", whole), range(options.forked)
        ):
            note("fault", survived)
        for survived in pool.map(lambda n: damaged(n, out / f"damaged-{n}", whole), range(options.damages)):
            note("damage", survived)
    commands = Commands(out)
    for number in range(options.commands):
        note("command", commands.survive(number))
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kind", "number", "outcome", "history"])
        for kind, survived in results:
            outcome = "; ".join(survived.problems) or "right"
            writer.writerow([kind, survived.number, outcome, " -> ".join(survived.history)])
    wrong = [survived for _, survived in results if survived.problems]
    worst = max(survived.apart for _, survived in results)
    minutes = (time.monotonic() - began) / 60
    print(
        f"{len(results)} runs, seed {options.seed}: {len(wrong)} wrong; worst difference {worst:.1e}; {minutes:.0f} min"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    command(main)
