"""Simulate published measurements and report the signed error of the predictions by family.

python experiments/published/score.py ROWS.csv [MORE.csv] out=DIR     # rows in the columns of rows.csv; writes DIR/predicted.csv
python experiments/published/score.py rows.csv unseen.csv out=DIR left_out=true     # each site by what the others say
python experiments/published/score.py rows.csv out=DIR one_run=true     # each site's other rows by its first
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

sys.path.extend(map(str, Path(__file__).parents[1:3]))
from published.left_out import by_the_others
from published.one_run import by_first_row
from published.recorded import Scored, recorded
from published.row import read
from published.stacks import cluster_of_row
from record import write_rows

from tpresearch.config.errors import ConfigError
from tpresearch.launch.options import command, read_options

ABOUT = {"s": "seq", "gpus": "gpus", "tp": "tp", "mb": "mb", "ac": "ac"}
PREDICTED = ("predicted_step_s", "low", "high", "memory_gib")


@dataclass
class Options:
    out: str
    left_out: bool = False
    """Whether each site is predicted without what was fitted on it; see `left_out`. (predicted.csv has the steps before.)"""
    one_run: bool = False
    """Whether a second table has each site's rows but the first, with rates by that one; see `one_run`."""


def table(found: Sequence[Scored]) -> str:
    """Error by family, then the worst ten."""
    families: dict[str, list[Scored]] = defaultdict(list)
    for one in found:
        if one.error is not None:
            families[one.row["family"] or "rows"].append(one)
    lines = [f"{'family':16}{'rows':>6}{'mean |e|':>10}{'greatest':>10}{'bias':>8}{'in range':>10}"]
    every = [one for ones in families.values() for one in ones]
    for name, ones in [*families.items(), ("all", every)]:
        if ones:
            errors = [one.error or 0.0 for one in ones]
            worst = max(errors, key=abs)
            inside = mean(one.is_inside for one in ones)
            lines.append(
                f"{name:16}{len(ones):>6}{mean(map(abs, errors)):>10.1%}{worst:>+10.1%}{mean(errors):>+8.1%}{inside:>10.0%}"
            )
    lines += ["", "the ten that are off most:"]
    for one in sorted(every, key=lambda one: -abs(one.error or 0.0))[:10]:
        row = one.row
        about = " ".join(f"{name}={row[column]}" for name, column in ABOUT.items())
        times = f"{one.step_s:.4g} s for {row.measured_s:.4g} s"
        lines.append(f"  {row['id']:8}{one.error:+7.1%}  {times}  {row['model']} {about}")
    return "\n".join(lines)


def main() -> None:
    files = [word for word in sys.argv[1:] if "=" not in word]
    options = read_options(Options, [word for word in sys.argv[1:] if "=" in word])
    named, legal = " ".join(files), "a CSV in the columns of experiments/published/rows.csv"
    if not files or not all(Path(file).is_file() for file in files):
        raise ConfigError("ROWS.csv", named, "the command scores files of rows", legal, {})
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = [row for file in files for row in read(Path(file))]
    if not rows:
        raise ConfigError("ROWS.csv", named, "it has no rows", "a line of names, then a row per line", {})
    found: list[Scored] = []
    told: list[Scored] = []
    factors: dict[str, float] = {}
    lines: list[dict[str, str]] = []
    for row in rows:
        lines.append({"id": row["id"], **dict.fromkeys(PREDICTED, ""), "measured_step_s": row["step_s"]})
        lines[-1] |= {"error": "", "refused": ""}
        try:
            on_clusters = recorded(row)
            one = on_clusters.on(cluster_of_row(row, sites=not options.left_out))
            by_first = by_first_row(on_clusters, factors) if options.one_run else None
        except Exception as error:  # whatever a row cannot be: the others are scored all the same
            why = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
            print(f"{row['id']}: {why}", file=sys.stderr)
            lines[-1]["refused"] = " ".join(why.split())
        else:
            found.append(one)
            told += [by_first] if by_first else []
            numbers = (one.step_s, one.low_s, one.high_s, one.memory_gib)
            lines[-1] |= {name: f"{value:.6g}" for name, value in zip(PREDICTED, numbers, strict=True)}
            lines[-1]["error"] = "" if one.error is None else f"{one.error:.4f}"
        write_rows(out / "predicted.csv", lines)
    if found:
        print(table(by_the_others(found) if options.left_out else found))
    if told:
        given = {id(one.row) for one in told}
        print("\nthe rows after the first of each site:\n")
        print(table([one for one in found if id(one.row) in given]))
        print("\nthe same, with rates by that first row:\n")
        print(table(told))
    if len(found) < len(rows):
        print(
            f"\n{len(rows) - len(found)} of {len(rows)} rows could not be simulated: see above, and {out / 'predicted.csv'}"
        )


if __name__ == "__main__":
    command(main)
