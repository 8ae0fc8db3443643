"""The numbers behind the panels, against numbers worked out by hand."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from support.made_runs import TOKENS_A_STEP, Made, entry, falling, groups_of

from tpresearch.compare.charts import spec_of
from tpresearch.compare.groups import baseline_of, one_by_one, over_seeds
from tpresearch.compare.labels import labels, telling
from tpresearch.compare.look import Look
from tpresearch.compare.numbers import (
    MOST_DOTS,
    at_most,
    bars,
    curves,
    differences,
    ledger,
    numbers,
    pareto,
    parts,
)
from tpresearch.compare.report import Report
from tpresearch.compare.runs import find
from tpresearch.compare.tables import differences_table, runs_table
from tpresearch.track.panels import SECTIONS

PANELS = {panel.name: panel for panels in SECTIONS.values() for panel in panels}
LOSS = "train/loss"
LEGEND = "A dot a step; the line is the greatest so far."


def nudged(step: int) -> float:
    """Off by 0, 1/16 and 1/2 in turn."""
    return falling(step) + (0, 0.0625, 0.5)[step % 3]


def test_curves_are_over_tokens(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, Made(steps=3), Made("tp", {"tp": 2}, steps=2, loss=lambda step: None))
    shown = curves(groups, LOSS)
    assert shown.points == [
        {"run": "none", "tokens": step * TOKENS_A_STEP, "value": falling(step)} for step in (1, 2, 3)
    ]
    assert curves(groups, "perf/mfu").notes == ["No run has perf/mfu."]


def test_the_difference_is_taken_at_the_same_tokens(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, Made(steps=4), Made("tp", {"tp": 2}, steps=6, loss=nudged))
    shown = differences(groups, groups[0], LOSS)
    floor = 0.0625 / 3
    assert [(point["run"], point["tokens"] // TOKENS_A_STEP) for point in shown.points] == [
        ("tp", 1),
        ("tp", 2),
        ("tp", 3),
        ("tp", 4),
    ]
    assert [point["value"] for point in shown.points] == [0.0625, 0.5, floor, 0.0625]
    assert [point["so_far"] for point in shown.points] == [0.0625, 0.5, 0.5, 0.5]
    assert [point["exact"] for point in shown.points] == ["6.25e-02", "5.00e-01", "0", "6.25e-02"]
    assert shown.notes == [LEGEND, "Dots at the bottom are no difference at all, since a log axis has no 0."]
    assert (at_most(groups[1].first, groups[0]), at_most(groups[0].first, groups[0])) == (0.5, None)


def test_runs_that_log_at_other_steps_meet_where_both_have_a_row(tmp_path: Path) -> None:
    every_third = Made("tp", {"tp": 2}, log_every=3, loss=lambda step: falling(step) + step)
    groups = groups_of(
        tmp_path, Made(log_every=2), every_third, Made("fsdp", {"dp_shard": 2}, log_every=13, steps=13)
    )
    shown = differences(groups, groups[0], LOSS)
    assert [(p["run"], p["tokens"] // TOKENS_A_STEP, p["value"]) for p in shown.points] == [
        ("tp", 6, 6),
        ("tp", 12, 12),
    ]
    assert shown.notes == [LEGEND, "fsdp has no row at the tokens of none's."]


def test_no_difference_at_all_is_said_and_not_drawn(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, Made(), Made("tp", {"tp": 2}))
    assert differences(groups, groups[0], LOSS).notes == ["Every loss equals the baseline's in all digits."]
    assert differences(groups[:1], groups[0], LOSS).points == []


def test_of_many_rows_the_greatest_difference_is_drawn(tmp_path: Path) -> None:
    steps = 2 * MOST_DOTS + 1  # three in a dot, then; the spike is at none of the first in three
    groups = groups_of(
        tmp_path,
        Made(steps=steps),
        Made("tp", {"tp": 2}, steps=steps, loss=lambda step: falling(step) + (0.5 if step == 303 else 0.125)),
    )
    shown = differences(groups, groups[0], LOSS)
    assert len(shown.points) == 167
    assert [point["tokens"] // TOKENS_A_STEP for point in shown.points if point["value"] == 0.5] == [303]
    assert shown.notes == [LEGEND, "Of each 3 rows of 501 the greatest is drawn."]


def test_a_long_curve_is_thinned_and_keeps_its_end(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, Made(steps=1502))
    shown = curves(groups, LOSS)
    assert [point["tokens"] // TOKENS_A_STEP for point in shown.points] == [*range(1, 1502, 2), 1502]
    assert shown.notes == ["Of 1,502 rows a run, one of every 2 is drawn."]


def test_over_seeds_mean_and_standard_deviation(tmp_path: Path) -> None:
    for plan, mesh in (("none", {}), ("tp", {"tp": 2})):
        for seed in (0, 1, 2):
            off = 0.25 if plan == "tp" and seed == 2 else 0

            def loss(step: int, seed: int = seed, off: float = off) -> float:
                return 4.0 + seed + off

            Made(plan, mesh, seed, steps=6, loss=loss, speed=100.0 + seed).write(tmp_path / f"{plan}{seed}")
    one, two = over_seeds(find([str(tmp_path)]).runs)
    assert (one.label, two.label, len(one.runs), len(two.runs)) == ("none", "tp", 3, 3)
    assert curves([one], LOSS).notes == ["The band is a standard deviation over seeds."]
    first = curves([one], LOSS).points[0]
    assert first == {"run": "none", "tokens": TOKENS_A_STEP, "value": 5.0, "low": 4.0, "high": 6.0}
    assert bars([one], "perf/tokens_per_second_per_device").points == [
        {"run": "none", "value": 101.0, "low": 100.0, "high": 102.0}
    ]
    # each seed is held to the baseline's run from the same seed, so that seeds do not show
    shown = differences([one, two], one, LOSS)
    assert [point["value"] for point in shown.points] == pytest.approx([0.25 / 3] * 6)
    assert [at_most(run, one) for run in two.runs] == [0, 0, 0.25]


def test_the_front_is_what_no_other_run_beats_in_both(tmp_path: Path) -> None:
    runs = [Made(memory=m, speed=s, lr=s) for m, s in ((8, 90.0), (4, 50.0), (5, 50.0), (4, 40.0), (2, 10.0))]
    points = pareto(
        groups_of(tmp_path, *runs), "memory/peak_bytes", "perf/tokens_per_second_per_device"
    ).points
    assert [point["front"] for point in points] == [True, True, False, False, True]


def test_parts_of_a_step_and_of_memory(tmp_path: Path) -> None:
    sent = [entry("tp", "all_gather", 300), entry("tp", "all_reduce", 50), entry("dp_shard", "all_gather", 7)]
    groups = groups_of(tmp_path, Made("fsdp_tp", {"dp_shard": 2, "tp": 2}, sent=sent))

    def shown(name: str) -> dict[str, float]:
        return {point["part"]: point["value"] for point in numbers(PANELS[name], groups, groups[0]).points}

    assert shown("step_time") == pytest.approx(
        {"data": 0.1, "forward": 0.2, "loss": 0.3, "backward": 0.4, "clip": 0.5, "optimizer": 0.6}
    )
    assert shown("memory_by_kind") == {"parameters": 2 * 2**20, "activations": 6 * 2**20}  # at the peak
    assert shown("bytes_by_axis") == {"tp": 350, "dp_shard": 7}
    assert parts(groups, ("perf/mfu",)).points == []


def test_at_the_end_of_a_steps_phases_stands_what_the_step_took(tmp_path: Path) -> None:
    panel = PANELS["step_time"]
    groups = groups_of(tmp_path, Made(speed=3072.0), Made("tp", {"tp": 2}, speed=768.0))
    shown = numbers(panel, groups, groups[0])
    assert {(point["run"], point["whole"]) for point in shown.points} == {("none", 1.0), ("tp", 2.0)}
    assert shown.notes == ["The figure at the end is the median step time, not their sum."]
    spec = spec_of(panel, shown.points, Look(["none", "tp"], "none"))
    ends = [(end["run"], end["text"], end["value"]) for end in spec["layer"][1]["data"]["values"]]
    assert ends == [("none", "1 s a step", pytest.approx(2.1)), ("tp", "2 s a step", pytest.approx(2.1))]
    memory = numbers(PANELS["memory_by_kind"], groups, groups[0])
    spec = spec_of(PANELS["memory_by_kind"], memory.points, Look(["none", "tp"], "none"))
    assert [end["text"] for end in spec["layer"][1]["data"]["values"]] == ["8.0 MiB", "8.0 MiB"]


def test_what_was_sent_beside_what_is_expected(tmp_path: Path) -> None:
    sent = [entry("tp", "all_gather", 300), entry("tp", "all_gather", 200, "backward")]
    groups = groups_of(
        tmp_path,
        Made(),
        Made("tp", {"tp": 2}, sent=sent),
        Made("tp", {"tp": 4}, sent=sent, expected=[entry("tp", "all_gather", 499)]),
    )
    shown = ledger(groups)
    assert [(p["run"], p["side"], p["part"], p["value"]) for p in shown.points] == [
        ("tp · 2 ranks", "measured", "tp all-gather", 500),
        ("tp · 2 ranks", "expected", "tp all-gather", 500),
        ("tp · 4 ranks", "measured", "tp all-gather", 500),
        ("tp · 4 ranks", "expected", "tp all-gather", 499),
    ]
    assert shown.notes == ["Measured equals expected to the byte in 1 of 2 runs.", "Not so: tp · 4 ranks."]
    assert ledger(groups[:1]).points == []


def test_the_tables(tmp_path: Path) -> None:
    boom = Made("fsdp", {"dp_shard": 2}, steps=2, error=ValueError("boom"))
    groups = groups_of(tmp_path, Made(), Made("tp", {"tp": 2}, loss=nudged, speed=1200.0), boom)
    runs, names = [group.first for group in groups], [group.label for group in groups]
    table = runs_table(runs, names, groups[0])
    column = {name: [row[i].text for row in table.rows] for i, name in enumerate(table.header)}
    assert column["run"] == ["none", "tp", "fsdp (failed)"]
    assert column["ranks"] == ["1", "2", "2"]
    assert column["tok/s/device"] == ["1k", "1.2k", "–"]  # the last ended within the steps of warm-up
    assert column["difference at most"] == ["baseline", "5.0e-01", "0"]
    assert column["status"] == ["completed", "completed", "failed"]
    speed = table.header.index("tok/s/device")
    assert [row[speed].best for row in table.rows] == [False, True, False]
    unlike = {row[0].text: [cell.text for cell in row[1:]] for row in differences_table(runs, names).rows}
    assert unlike["parallel.name"] == ["none", "tp", "fsdp"]
    assert unlike["mesh.tp"] == ["–", "2", "–"]
    assert "logger.name" not in unlike


def test_among_equal_figures_none_is_best(tmp_path: Path) -> None:
    rounded = Made("tp", {"tp": 2}, loss=lambda step: falling(step) - 1e-7, speed=1000.4)
    groups = groups_of(tmp_path, Made(), rounded, Made("fsdp", {"dp_shard": 2}, memory=2**29))
    table = runs_table([group.first for group in groups], [group.label for group in groups], groups[0])
    best = [
        (row[0].text, name)
        for row in table.rows
        for name, cell in zip(table.header, row, strict=True)
        if cell.best
    ]
    assert [each for each in best if each[1] != "time"] == [("fsdp", "peak memory")]


def test_the_baseline_is_the_run_with_no_plan_or_the_one_that_is_asked_for(tmp_path: Path) -> None:
    alone = Made("fsdp", {"dp_shard": 1})
    groups = groups_of(tmp_path, Made("tp", {"tp": 4}), Made("tp", {"tp": 2}), alone, Made())
    assert baseline_of(groups, None).label == "none · 1 rank"
    assert baseline_of(groups[:2], None).label == "tp · 2 ranks"
    assert baseline_of(groups, "none") is groups[3]
    assert baseline_of(groups, "tp · 4 ranks") is groups[0]
    assert baseline_of(groups, str(tmp_path / "1")) is groups[1]
    assert baseline_of(groups, "0") is groups[0]


def test_runs_of_several_devices_say_so_whatever_they_are_called(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, Made(name="a"), Made(name="b", device="NVIDIA H200"))
    runs, names = [group.first for group in groups], [group.label for group in groups]
    assert names == ["a", "b"]
    table = runs_table(runs, names, groups[0])
    at = table.header.index("device")
    assert [row[at].text for row in table.rows] == ["cpu", "NVIDIA H200"]
    assert "device" not in runs_table(runs[:1], names[:1], groups[0]).header
    unlike = [[cell.text for cell in row] for row in differences_table(runs, names).rows]
    assert unlike == [["device", "cpu", "NVIDIA H200"]]


def test_a_run_from_a_seed_that_the_baseline_lacks_is_held_to_none_of_its_runs(tmp_path: Path) -> None:
    for plan, mesh, seeds in (("none", {}, (0, 1)), ("tp", {"tp": 2}, (1, 2, 3)), ("sp", {"tp": 4}, (4,))):
        for seed in seeds:
            off = 0.25 if plan == "tp" else 0

            def loss(step: int, seed: int = seed, off: float = off) -> float:
                return 4.0 + seed + off

            run = Made("tp" if plan == "sp" else plan, mesh, seed, steps=3, loss=loss)
            run.write(tmp_path / f"{plan}{seed}")
    found = find([str(tmp_path)]).runs
    one, four, two = over_seeds(found)
    assert ([len(each.runs) for each in (one, two, four)], two.label) == ([2, 3, 1], "tp · 2 ranks")
    shown = differences([one, four, two], one, LOSS)
    assert {(point["run"], point["value"]) for point in shown.points} == {("tp · 2 ranks", 0.25)}
    left_out = [
        "The difference of tp · 4 ranks leaves out train.seed=4, of which the baseline has no run.",
        "The difference of tp · 2 ranks leaves out train.seed=2, 3, of which the baseline has no run.",
    ]
    assert shown.notes == [LEGEND, *left_out]
    assert [at_most(run, one) for run in two.runs] == [0.25, None, None]
    names = labels(found, telling(found))
    report = Report(found, names, [one, four, two], one, [], [])
    out = io.StringIO()
    report.print(Console(file=out, width=250), tmp_path)
    for line in left_out:
        assert line in out.getvalue()
        assert line in report.markdown()
    alone = differences([one, four], one, LOSS)
    assert (alone.points, alone.notes) == ([], ["No run has rows at the baseline's tokens.", left_out[0]])
    # of runs one by one, overlaid though seeds differ, the difference is what was asked for
    apart = one_by_one(found, names)
    assert at_most(two.runs[1], apart[0]) == 2.25


def test_a_run_that_failed_before_any_row_is_named_and_is_no_baseline(tmp_path: Path) -> None:
    early = Made(steps=0, error=ValueError("boom"))
    groups = groups_of(tmp_path, early, Made("tp", {"tp": 2}), Made("fsdp", {"dp_shard": 2}, loss=nudged))
    assert [group.label for group in groups] == ["none (failed)", "tp", "fsdp"]
    baseline = baseline_of(groups, None)
    assert baseline is groups[1]
    assert curves(groups, LOSS).notes == ["Ended before its first row: none (failed)."]
    assert {point["run"] for point in curves(groups, LOSS).points} == {"tp", "fsdp"}
    table = runs_table([group.first for group in groups], [group.label for group in groups], baseline)
    at = table.header.index("difference at most")
    assert [row[at].text for row in table.rows] == ["–", "baseline", "5.0e-01"]
    assert differences(groups, groups[0], LOSS).notes == ["none (failed) has no rows to take a loss from."]
    assert baseline_of(groups[:1], None) is groups[0]
