"""Break runs in two hundred ways, restart them, and compare each with an undisturbed run.

[RECORD=1] python experiments/faults/measure.py [forked=160] [seed=0] [at_once=2]     # root, for a small disk; results.csv
python experiments/faults/measure.py forked=0 damages=0 only=slurm_requeues     # one command of by_signal.py, by_outage.py
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "tests")]
from faults.by_outage import BY_OUTAGE
from faults.by_signal import BY_SIGNAL
from faults.commands import Commands
from faults.damages import DAMAGES, damaged
from faults.exam import Survived, reference, survive
from record import place, write_rows

from tpresearch.launch.options import command, read_options

HERE = Path(__file__).parent
COMMANDS = (*BY_SIGNAL, *BY_OUTAGE)


@dataclass
class Options:
    forked: int = 160
    damages: int = len(DAMAGES)
    only: str | None = None
    """Names of commands, with commas between them; all of them without."""
    seed: int = 0
    at_once: int = 2


def main() -> None:
    options, began = read_options(Options, sys.argv[1:]), time.monotonic()
    out = Path(tempfile.mkdtemp(prefix="faults-"))
    whole = reference(out / "undisturbed")
    rows: list[dict[str, object]] = []
    results: list[Survived] = []

    def note(kind: str, survived: Survived) -> None:
        results.append(survived)
        outcome, history = "; ".join(survived.problems) or "right", " -> ".join(survived.history)
        rows.append({"kind": kind, "number": survived.number, "outcome": outcome, "history": history})
        print(f"{kind} {survived.number}: {outcome}  ({history})", flush=True)

    with ThreadPoolExecutor(options.at_once) as pool:
        for survived in pool.map(
            lambda n: survive(n, options.seed, out / f"forked-{n}", whole), range(options.forked)
        ):
            note("fault", survived)
        for survived in pool.map(lambda n: damaged(n, out / f"damaged-{n}", whole), range(options.damages)):
            note("damage", survived)
        commands = Commands(out)
        names = options.only.split(",") if options.only else [each.__name__ for each in COMMANDS]
        chosen = [n for n, each in enumerate(COMMANDS) if each.__name__ in names]
        for survived in pool.map(lambda n: commands.survive(n, COMMANDS[n]), chosen):
            note("command", survived)
    write_rows(place(HERE) / "results.csv", rows)
    wrong = [survived for survived in results if survived.problems]
    worst = max(survived.apart for survived in results)
    minutes, processor = (time.monotonic() - began) / 60, processor_s() / 60
    print(
        f"{len(results)} runs, seed {options.seed}: {len(wrong)} wrong; worst difference {worst:.1e}; "
        f"{minutes:.0f} min, {processor:.0f} min of processor time"
    )
    sys.exit(bool(wrong))


def processor_s() -> float:
    """Of this process and all that it started, but for those whose parents were killed before they ended."""
    ended = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    total = sum(used.ru_utime + used.ru_stime for used in ended)
    for path in Path("/proc").glob("[0-9]*/stat"):  # the server that forks ranks lives on
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


if __name__ == "__main__":
    command(main)
