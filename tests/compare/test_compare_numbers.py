"""The numbers behind the panels, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import io
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.made_runs import TOKENS_PER_STEP, Made, entry, falling, groups_of

from tpresearch.compare.charts import chart_spec
from tpresearch.compare.differences import MAX_DOTS, differences, max_differences, pooled_differences
from tpresearch.compare.groups import Comparison, Group, comparisons_of, group_each_run, group_over_seeds
from tpresearch.compare.panel_data import bars, curves, ledger, panel_data, pareto, parts
from tpresearch.compare.points import PanelData
from tpresearch.compare.report import DIFFERENCES, ROUNDING, RUNS, SEEDS, Report, tables
from tpresearch.compare.runs import find_runs
from tpresearch.compare.style import ChartStyle
from tpresearch.config.choices import Dtype
from tpresearch.track.panels import SECTIONS
from tpresearch.track.record import read_record, read_summary, write_config, write_summary
from tpresearch.track.table import Cell, Table, figure_columns, markdown, mean_columns, with_comparable_memory

PANELS = {panel.name: panel for panels in SECTIONS.values() for panel in panels}
LOSS = "train/loss"
LEGEND = "One dot per logged step; the line is the running maximum."


def rows(found: PanelData, *columns: str) -> list[tuple[Any, ...]]:
    """These columns of the points; tokens in steps."""
    points = found.points
    if "tokens" in points:
        points = points.assign(steps=points["tokens"] // TOKENS_PER_STEP)
    return list(points[list(columns)].itertuples(index=False, name=None))


def tables_of(groups: list[Group], baseline: Group) -> dict[str, Table]:
    return tables([group.first for group in groups], groups, [Comparison(groups, baseline)])


def column(table: Table, name: str) -> list[str]:
    return [row[table.header.index(name)].text for row in table.rows]


def nudged(step: int) -> float:
    """Off by 0, 1/16 and 1/2 in turn."""
    return falling(step) + (0, 0.0625, 0.5)[step % 3]


def test_curves_are_over_tokens(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, Made(steps=3), Made("tp", {"tp": 2}, steps=2, loss=lambda step: None))
    found = curves(groups, LOSS)
    assert rows(found, "run", "steps", "value") == [("none", step, falling(step)) for step in (1, 2, 3)]
    assert list(found.points) == ["run", "tokens", "value"]
    assert curves(groups, "perf/mfu").notes == ["No run has perf/mfu."]


def test_the_difference_is_taken_at_the_same_tokens(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, Made(steps=4), Made("tp", {"tp": 2}, steps=6, loss=nudged))
    found = differences([Comparison(groups, groups[0])], LOSS)
    floor = 0.0625 / 3
    assert rows(found, "run", "steps", "value", "so_far", "exact") == [
        ("tp", 1, 0.0625, 0.0625, "6.25e-02"),
        ("tp", 2, 0.5, 0.5, "5.00e-01"),
        ("tp", 3, floor, 0.5, "0"),
        ("tp", 4, 0.0625, 0.5, "6.25e-02"),
    ]
    assert found.notes == [
        LEGEND,
        "Dots at the bottom are differences of exactly 0, which a log axis cannot show.",
    ]
    assert max_differences([Comparison(groups, groups[0])]) == {groups[1].first.folder: 0.5}


def test_runs_that_log_at_other_steps_meet_where_both_have_a_row(tmp_path: Path) -> None:
    every_third = Made("tp", {"tp": 2}, log_every=3, loss=lambda step: falling(step) + step)
    never = Made("fsdp", {"dp_shard": 2}, log_every=13, steps=13)
    groups = groups_of(tmp_path, Made(log_every=2), every_third, never)
    found = differences([Comparison(groups, groups[0])], LOSS)
    assert rows(found, "run", "steps", "value") == [("tp", 6, 6), ("tp", 12, 12)]
    assert found.notes == [LEGEND, "fsdp has no rows at the tokens of none."]


def test_no_difference_at_all_is_said_and_not_drawn(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, Made(), Made("tp", {"tp": 2}))
    found = differences([Comparison(groups, groups[0])], LOSS)
    assert (len(found.points), found.notes) == (0, ["Every loss equals the baseline's in all digits."])
    assert differences([Comparison(groups[:1], groups[0])], LOSS).points.empty


def test_a_loss_that_is_not_finite_is_no_agreement(tmp_path: Path) -> None:
    gone = Made("tp", {"tp": 2}, loss=lambda step: falling(step) if step < 11 else None)
    groups = groups_of(tmp_path, Made(), gone)
    compared = [Comparison(groups, groups[0])]
    assert differences(compared, LOSS).notes == [
        "Every finite loss equals the baseline's in all digits.",
        "tp has no finite loss in 2 of its rows.",
    ]
    assert max_differences(compared) == {groups[1].first.folder: math.inf}


def test_of_many_rows_the_greatest_difference_is_drawn(tmp_path: Path) -> None:
    steps = 2 * MAX_DOTS + 1  # three in a dot, then; the spike is at none of the first in three
    off = Made("tp", {"tp": 2}, steps=steps, loss=lambda s: falling(s) + (0.5 if s == 303 else 0.125))
    groups = groups_of(tmp_path, Made(steps=steps), off)
    found = differences([Comparison(groups, groups[0])], LOSS)
    assert len(found.points) == 167
    assert [steps for steps, value in rows(found, "steps", "value") if value == 0.5] == [303]
    assert found.notes == [LEGEND, "The maximum of every 3 of 501 rows is drawn."]


def test_a_long_curve_is_thinned_and_keeps_its_end(tmp_path: Path) -> None:
    found = curves(groups_of(tmp_path, Made(steps=1502)), LOSS)
    assert rows(found, "steps") == [(step,) for step in range(2, 1503, 2)]
    assert found.notes == ["The last of every 2 of 1,502 rows is drawn."]


def test_over_seeds_mean_and_standard_deviation(tmp_path: Path) -> None:
    for plan, mesh in (("none", {}), ("tp", {"tp": 2})):
        for seed in (0, 1, 2):
            off = 0.25 if plan == "tp" and seed == 2 else 0

            def loss(step: int, seed: int = seed, off: float = off) -> float:
                return 4.0 + seed + off

            Made(plan, mesh, seed, steps=6, loss=loss, speed=100.0 + seed).write(tmp_path / f"{plan}{seed}")
    one, two = group_over_seeds(find_runs([str(tmp_path)]).runs)
    assert (one.label, two.label, len(one.runs), len(two.runs)) == ("none", "tp", 3, 3)
    found = curves([one], LOSS)
    assert found.notes == ["The band is one standard deviation over seeds."]
    assert rows(found, "run", "steps", "value", "low", "high")[0] == ("none", 1, 5.0, 4.0, 6.0)
    speed = bars([one], "perf/tokens_per_second_per_device")
    assert rows(speed, "run", "value", "low", "high") == [("none", 101.0, 100.0, 102.0)]
    # each seed is compared with the baseline's run from the same seed, so that seeds do not show
    found = differences([Comparison([one, two], one)], LOSS)
    assert [value for (value,) in rows(found, "value")] == pytest.approx([0.25 / 3] * 6)
    assert list(max_differences([Comparison([one, two], one)]).values()) == [0, 0, 0.25]
    seeds = tables([*one.runs, *two.runs], [one, two], comparisons_of([one, two]))[SEEDS]
    assert (column(seeds, "runs"), column(seeds, "seeds")) == (["none", "tp"], ["3", "3"])
    assert column(seeds, "tok/s/device") == ["101 ± 1", "101 ± 1"]


def test_a_mean_over_seeds_is_at_the_tokens_that_all_have(tmp_path: Path) -> None:
    """Of two runs, one of which has a loss that is not finite in its third row."""
    losses = (lambda step: step, lambda step: None if step == 3 else step + 1.0)
    ones = groups_of(tmp_path, *(Made(seed=seed, steps=4, loss=loss) for seed, loss in enumerate(losses)))
    both = Group("both", [one.first for one in ones], over_seeds=True)
    assert rows(curves([both], LOSS), "steps", "value") == [(1, 1.5), (2, 2.5), (4, 4.5)]


def test_a_mean_that_lacks_a_run_says_so() -> None:
    lost: list[float | None] = [0.5, 1.5, None]
    means = mean_columns([[{"train/loss": loss, "wall_time_s": 60.0} for loss in lost]])
    assert means == {"loss": [Cell("1.000 ± 0.707 (2 of 3 runs)")], "time": [Cell("1:00 ± 0:00")]}
    assert mean_columns([[{"perf/mfu": 0.5}], [{}]]) == {"MFU": [Cell("50.0%"), Cell("–")]}


def test_the_front_is_what_no_other_run_beats_in_both(tmp_path: Path) -> None:
    runs = [
        Made(memory=m, speed=s, lr=s, device="H200")
        for m, s in ((8, 90.0), (4, 50.0), (5, 50.0), (4, 40.0), (2, 10.0))
    ]
    found = pareto(groups_of(tmp_path, *runs), "memory/peak_bytes", "perf/tokens_per_second_per_device")
    assert rows(found, "memory", "speed", "front") == [
        (8, 90, True),
        (4, 50, True),
        (5, 50, False),
        (4, 40, False),
        (2, 10, True),
    ]


def test_parts_of_a_step_and_of_memory(tmp_path: Path) -> None:
    sent = [entry("tp", "all_gather", 300), entry("tp", "all_reduce", 50), entry("dp_shard", "all_gather", 7)]
    groups = groups_of(tmp_path, Made("fsdp_tp", {"dp_shard": 2, "tp": 2}, sent=sent))

    def shown(name: str) -> dict[str, float]:
        return dict(rows(panel_data(PANELS[name], groups, []), "part", "value"))

    assert shown("step_time") == pytest.approx(
        {"data": 0.1, "forward": 0.2, "loss": 0.3, "backward": 0.4, "clip": 0.5, "optimizer": 0.6}
    )
    assert shown("memory_by_kind") == {"parameters": 2 * 2**20, "activations": 6 * 2**20}  # at the peak
    assert shown("bytes_by_axis") == {"tp": 350, "dp_shard": 7}
    assert parts(groups, ("perf/mfu",)).points.empty


def test_on_a_cpu_the_memory_is_that_of_tensors(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, Made(memory=2**30), Made(device="NVIDIA H200", memory=2**30))
    tensors = 8 * 2**20  # of made_runs: at the moment of the peak
    assert rows(bars(groups, "memory/peak_bytes"), "value") == [(tensors,), (2**30,)]
    table = tables_of(groups, groups[0])[RUNS]
    assert column(table, "peak memory") == ["8.0 MiB", "1.0 GiB"]
    uncounted = groups[0].first.summary | {"memory/at_peak_bytes": None, "memory/peak_bytes": 2**30}
    assert with_comparable_memory(uncounted)["memory/peak_bytes"] is None
    assert with_comparable_memory({"status": "failed"}) == {"status": "failed"}


def test_at_the_end_of_a_steps_phases_stands_what_the_step_took(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, Made(speed=3072.0), Made("tp", {"tp": 2}, speed=768.0))

    def ends(name: str, found: PanelData) -> list[dict[str, Any]]:
        """The rows of the chart's text marks."""
        spec = chart_spec(PANELS[name], found.points, ChartStyle(["none", "tp"], ["none"]))
        return spec["datasets"][spec["layer"][-1]["data"]["name"]]

    phases = panel_data(PANELS["step_time"], groups, [])
    assert set(rows(phases, "run", "whole")) == {("none", 1.0), ("tp", 2.0)}
    assert phases.notes == ["The figure at the end is the median step time, not the sum of the phases."]
    shown = [(end["run"], end["text"], end["value"]) for end in ends("step_time", phases)]
    assert shown == [("none", "1 s per step", pytest.approx(2.1)), ("tp", "2 s per step", pytest.approx(2.1))]
    memory = panel_data(PANELS["memory_by_kind"], groups, [])
    assert [end["text"] for end in ends("memory_by_kind", memory)] == ["8.0 MiB", "8.0 MiB"]


def test_what_was_sent_beside_what_is_expected(tmp_path: Path) -> None:
    sent = [entry("tp", "all_gather", 300), entry("tp", "all_gather", 200, "backward")]
    groups = groups_of(
        tmp_path,
        Made(),
        Made("tp", {"tp": 2}, sent=sent),
        Made("tp", {"tp": 4}, sent=sent, expected=[entry("tp", "all_gather", 499)]),
    )
    found = ledger(groups)
    assert sorted(rows(found, "run", "side", "part", "value")) == [
        ("tp · 2 ranks", "expected", "tp all-gather", 500),
        ("tp · 2 ranks", "measured", "tp all-gather", 500),
        ("tp · 4 ranks", "expected", "tp all-gather", 499),
        ("tp · 4 ranks", "measured", "tp all-gather", 500),
    ]
    assert found.notes == [
        "Measured equals expected to the byte in 1 of 2 runs.",
        "They differ in tp · 4 ranks.",
    ]
    several = dataclasses.replace(
        groups[1], runs=[groups[1].first, groups[2].first]
    )  # as seeds of one experiment
    assert ledger([several]).notes == [
        "Measured equals expected to the byte in 1 of 2 runs.",
        "They differ in tp · 2 ranks.",
    ]
    assert ledger(groups[:1]).points.empty
    groups[1].first.ledger["expected"] = None
    assert "There is no formula for tp · 2 ranks." in ledger(groups).notes


def test_what_a_step_was_predicted_to_send_is_not_called_measured(tmp_path: Path) -> None:
    sent = [entry("tp", "all_gather", 500)]
    groups = groups_of(tmp_path, Made("tp", {"tp": 2}, sent=sent), Made("tp", {"tp": 4}, sent=sent))
    groups[1].first.summary["predicted"], groups[1].first.ledger["expected"] = True, None
    found = ledger(groups)
    assert sorted(rows(found, "run", "side")) == [
        ("2 ranks", "expected"),
        ("2 ranks", "measured"),
        ("4 ranks", "predicted"),
    ]
    assert found.notes == ["Measured equals expected to the byte in 1 of 1 runs."]
    spec = chart_spec(PANELS["ledger"], found.points, ChartStyle(["2 ranks", "4 ranks"], []))
    ends = spec["datasets"][spec["layer"][-1]["data"]["name"]]
    assert {end["text"] for end in ends} == {"500 B measured", "500 B expected", "500 B predicted"}
    assert ledger(groups[1:]).notes == ["Predicted, not measured."]


def test_the_tables(tmp_path: Path) -> None:
    boom = Made("fsdp", {"dp_shard": 2}, steps=2, error=ValueError("boom"))
    groups = groups_of(tmp_path, Made(), Made("tp", {"tp": 2}, loss=nudged, speed=1200.0), boom)
    shown = tables_of(groups, groups[0])
    runs = shown[RUNS]
    assert column(runs, "run") == ["none", "tp", "fsdp (failed)"]
    assert column(runs, "ranks") == ["1", "2", "2"]
    assert column(runs, "tok/s/device") == ["1k", "1.2k", "–"]  # the last ended within the steps of warm-up
    assert column(runs, "max |loss difference|") == ["baseline", "5.0e-01", "0"]
    assert column(runs, "status") == ["completed", "completed", "failed"]
    speed = runs.header.index("tok/s/device")
    assert [row[speed].best for row in runs.rows] == [False, True, False]
    unlike = {row[0].text: [cell.text for cell in row[1:]] for row in shown[DIFFERENCES].rows}
    assert unlike["parallel.name"] == ["none", "tp", "fsdp"]
    assert unlike["mesh.tp"] == ["–", "2", "–"]
    assert "logger.name" not in unlike


def test_among_equal_figures_none_is_best(tmp_path: Path) -> None:
    rounded = Made("tp", {"tp": 2}, loss=lambda step: falling(step) - 1e-7, speed=1000.4, device="H200")
    smaller = Made("fsdp", {"dp_shard": 2}, memory=2**29, device="H200")
    groups = groups_of(tmp_path, Made(device="H200"), rounded, smaller)
    table = tables_of(groups, groups[0])[RUNS]
    cells = [(row[0].text, *cell) for row in table.rows for cell in zip(table.header, row, strict=True)]
    best = [(run, figure) for run, figure, cell in cells if cell.best and figure != "time"]
    assert best == [("fsdp", "peak memory")]


@pytest.mark.parametrize(("rows", "best"), [(96, [False, True]), (8, [False, False])])
def test_the_best_held_out_loss_is_one_among_those_of_as_many_rows(rows: int, best: list[bool]) -> None:
    more = {"status": "completed", "train/loss": 3.0, "val/loss": 3.0, "held_out_rows": 96}
    less = {**more, "train/loss": 2.0, "val/loss": 2.0, "held_out_rows": rows}
    marked = [[cell.best for cell in row] for row in Table.of_columns(figure_columns([more, less])).rows]
    assert marked == [[False, best[0]], [True, best[1]]]


@pytest.mark.parametrize(("rows", "told"), [(96, False), (1008, True), (None, False)])
def test_held_out_losses_of_other_numbers_of_rows_are_told(
    tmp_path: Path, rows: int | None, told: bool
) -> None:
    """Where the plan tells the runs apart, nothing else in a chart says that the losses are not one quantity."""
    groups = groups_of(tmp_path, Made(), Made("tp", {"tp": 2}), Made("fsdp", {"dp_shard": 2}))
    for group, of in zip(groups, (96, rows, 96), strict=True):
        group.first.summary["held_out_rows"] = of
        group.first.rows[-1]["val/loss"] = 3.0
    said = ["Held-out losses are of different numbers of rows: 96 (none, fsdp), 1,008 (tp)."] * told
    assert (curves(groups, "val/loss").notes, curves(groups, LOSS).notes) == (said, [])
    runs = [group.first for group in groups]
    assert Report(runs, groups, comparisons_of(groups), [], []).notes == said


def test_the_baseline_is_the_run_with_no_plan_or_the_one_that_is_asked_for(tmp_path: Path) -> None:
    alone = Made("fsdp", {"dp_shard": 1})
    groups = groups_of(tmp_path, Made("tp", {"tp": 4}), Made("tp", {"tp": 2}), alone, Made())
    assert comparisons_of(groups)[0].baseline.label == "none · 1 rank"
    assert comparisons_of(groups[:2])[0].baseline.label == "tp · 2 ranks"
    assert comparisons_of(groups, "none")[0].baseline is groups[3]
    assert comparisons_of(groups, "tp · 4 ranks")[0].baseline is groups[0]
    assert comparisons_of(groups, str(tmp_path / "1"))[0].baseline is groups[1]
    assert comparisons_of(groups, "0")[0].baseline is groups[0]


def test_runs_whose_learning_rates_follow_from_other_budgets_are_not_compared(tmp_path: Path) -> None:
    """Under a schedule that decays, a run of more steps has another learning rate at the same step: its loss differs by more
    than a plan's rounding."""
    longer = Made("tp", {"tp": 2}, budget=200)
    in_tokens = Made("fsdp", {"dp_shard": 2})
    groups = groups_of(tmp_path, Made(), longer, in_tokens, Made(budget=200))
    in_tokens_config = groups[2].first.config["train"]
    in_tokens_config["steps"], in_tokens_config["tokens"] = None, 100 * TOKENS_PER_STEP - 1
    compared = comparisons_of(groups)
    baselines = {each.baseline.label: [other.label for other in each.others] for each in compared}
    assert baselines == {"none · steps=100": ["fsdp · steps=100"], "none · steps=200": ["tp · steps=200"]}
    for group in groups:
        group.first.config["schedule"]["name"] = "constant"
    assert len(comparisons_of(groups)) == 1


def test_a_run_that_got_more_steps_once_its_rate_had_fallen_is_another_training(tmp_path: Path) -> None:
    """Of 12 steps, then of 200, under a cosine after a warmup of 10."""
    whole, grown = groups_of(tmp_path, Made(budget=200), Made("tp", {"tp": 2}, budget=200))
    config = {**grown.first.config, "train": {**grown.first.config["train"], "steps": 12}}
    write_config(grown.first.folder, config)
    (grown.first.folder / "config.yaml").rename(grown.first.folder / "config.step-00000012.yaml")
    assert (
        len(comparisons_of([whole, dataclasses.replace(grown, runs=[dataclasses.replace(grown.first)])])) == 1
    ), "it has not"
    rows = [{**row, "train/lr": 1e-3 if row["train/step"] == 12 else 3e-3} for row in grown.first.rows]
    fell = dataclasses.replace(grown.first, rows=rows)
    assert len(comparisons_of([whole, dataclasses.replace(grown, runs=[fell])])) == 2
    assert fell.setting("train.steps") == "12 up to step 12, then 200"
    assert fell.setting("train.steps") != whole.first.setting("train.steps") == "200"


def test_initial_weights_tell_experiments_apart_and_not_their_path(tmp_path: Path) -> None:
    """A run that init_from names may have gone on in the meantime."""
    for index, (path, weights) in enumerate((("base", "a"), ("moved", "a"), ("base", "b"))):
        folder = Made("tp", {"tp": 2**index}).write(tmp_path / str(index))
        write_summary(folder, {**read_summary(folder), "initial_weights": weights})
        write_config(folder, {**read_record(folder / "config.yaml"), "init_from": path})
    groups = group_each_run(find_runs([str(tmp_path)]).runs)
    compared = [[group.first.folder.name for group in each.groups] for each in comparisons_of(groups)]
    assert compared == [["0", "1"], ["2"]]
    assert [group.first.setting("initial_weights") for group in groups] == ["a", "a", "b"]


def test_a_resumed_runs_time_is_of_its_last_process_and_not_the_best(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, Made(), Made("tp", {"tp": 2}), Made("fsdp", {"dp_shard": 2}))
    for seconds, group in zip((300.0, 200.0, 5.0), groups, strict=True):
        group.first.summary["wall_time_s"] = seconds
    groups[2].first.summary["resumed"] = [{"step": 10, "world_size": 2, "mesh": {"dp_shard": 2}}]
    table = tables_of(groups, groups[0])[RUNS]
    times = [row[table.header.index("time")] for row in table.rows]
    assert [(time.text, time.best) for time in times] == [
        ("5:00", False),
        ("3:20", True),
        ("0:05 since it resumed", False),
    ]
    means = mean_columns([[group.first.summary for group in groups]])
    assert means["time"] == [Cell("4:10 ± 1:11 (2 of 3 runs)")]


def test_a_markdown_cell_shows_the_text_itself() -> None:
    assert markdown("layers.*.wq layers.*.wk **b** _i_ ~~s~~ llama2_tiny") == (
        r"layers.\*.wq layers.\*.wk \*\*b\*\* \_i\_ \~\~s\~\~ llama2_tiny"
    )


def test_runs_of_several_devices_say_so_whatever_they_are_called(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, Made(name="a"), Made(name="b", device="NVIDIA H200"))
    assert [group.label for group in groups] == ["a", "b"]
    shown = tables_of(groups, groups[0])
    assert column(shown[RUNS], "device") == ["cpu", "NVIDIA H200"]
    assert "device" not in tables_of(groups[:1], groups[0])[RUNS].header
    unlike = [[cell.text for cell in row] for row in shown[DIFFERENCES].rows]
    assert unlike == [["device", "cpu", "NVIDIA H200"]]


def test_a_run_from_a_seed_that_the_baseline_lacks_is_compared_with_none_of_its_runs(tmp_path: Path) -> None:
    for plan, mesh, seeds in (("none", {}, (0, 1)), ("tp", {"tp": 2}, (1, 2, 3)), ("sp", {"tp": 4}, (4,))):
        for seed in seeds:
            off = 0.25 if plan == "tp" else 0

            def loss(step: int, seed: int = seed, off: float = off) -> float:
                return 4.0 + seed + off

            run = Made("tp" if plan == "sp" else plan, mesh, seed, steps=3, loss=loss)
            run.write(tmp_path / f"{plan}{seed}")
    runs = find_runs([str(tmp_path)]).runs
    one, four, two = group_over_seeds(runs)
    assert ([len(each.runs) for each in (one, two, four)], two.label) == ([2, 3, 1], "tp · 2 ranks")
    assert comparisons_of([one, four, two]) == [
        Comparison([one, four, two], one)
    ]  # though their first seeds differ
    found = differences([Comparison([one, four, two], one)], LOSS)
    assert set(rows(found, "run", "value")) == {("tp · 2 ranks", 0.25)}
    left_out = [
        "The difference of tp · 4 ranks leaves out train.seed=4, which the baseline has no run of.",
        "The difference of tp · 2 ranks leaves out train.seed=2, 3, which the baseline has no run of.",
    ]
    assert found.notes == [LEGEND, *left_out]
    assert max_differences([Comparison([one, four, two], one)]) == {two.first.folder: 0.25}
    report = Report(runs, [one, four, two], [Comparison([one, four, two], one)], [], [])
    out = io.StringIO()
    report.print(Console(file=out, width=250), tmp_path)
    for line in left_out:
        assert line in out.getvalue()
        assert line in report.markdown()
    alone = differences([Comparison([one, four], one)], LOSS)
    assert alone.points.empty
    assert alone.notes == ["No run has rows at the baseline's token counts.", left_out[0]]
    # for single runs, overlaid though seeds differ, the difference is what was asked for
    apart = group_each_run(runs)
    assert max_differences([Comparison(apart, apart[0])])[two.runs[1].folder] == 2.25


def test_a_terminal_shows_differences_of_as_many_runs_as_fit(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, *(Made(lr=10.0**-n) for n in range(1, 9)))
    shown = {}
    for runs in (8, 7):
        report = Report([group.first for group in groups[:runs]], groups[:runs], [], [], [])
        report.print(Console(file=(out := io.StringIO()), width=90), tmp_path)
        shown[runs] = DIFFERENCES in out.getvalue(), "The configs differ in 1 setting:" in out.getvalue()
    assert shown == {8: (False, True), 7: (True, False)}


def test_in_a_sweep_of_plans_and_learning_rates_each_is_compared_with_its_own(tmp_path: Path) -> None:
    made = []
    for lr in (1e-3, 2e-3):
        for seed in (0, 1):

            def off(step: int, by: float = 0.0, high: float = 1000 * lr + seed) -> float:
                return high + by * step

            made.append(Made(lr=lr, seed=seed, steps=4, loss=off))
            made.append(Made("tp", {"tp": 2}, lr=lr, seed=seed, steps=4, loss=partial(off, by=lr / 64)))
    groups = groups_of(tmp_path, *made)
    comparisons = comparisons_of(groups)
    assert [comparison.baseline for comparison in comparisons] == groups[::2]
    assert [comparison.others for comparison in comparisons] == [[tp] for tp in groups[1::2]]
    most = max_differences(comparisons)
    expected = [made[i].lr / 16 for i in (1, 3, 5, 7)]
    assert list(most.values()) == pytest.approx(expected, rel=1e-9)
    (pooled,) = pooled_differences(comparisons).to_dict("records")
    squares = [(run.lr / 64 * step) ** 2 for run in made[1::2] for step in range(1, 5)]
    wanted = {"plan": "tp", "ranks": 2, "runs": 4, "most": 2e-3 / 16, "rms": (sum(squares) / 16) ** 0.5}
    assert pooled.pop("plan") == wanted.pop("plan")
    assert pooled == pytest.approx(wanted, rel=1e-9)
    drawn = differences(comparisons, LOSS)
    assert set(drawn.points["run"]) == {tp.label for tp in groups[1::2]}
    shown = tables([group.first for group in groups], groups, comparisons)
    first = f"{most[groups[1].first.folder]:.1e}"
    assert column(shown[RUNS], "max |loss difference|")[:2] == ["baseline", first]
    assert [[cell.text for cell in row] for row in shown[ROUNDING].rows] == [
        ["tp", "2", "4", f"{max(most.values()):.1e}", f"{pooled['rms']:.1e}"]
    ]
    means = comparisons_of(group_over_seeds([group.first for group in groups]))
    assert [(len(each.groups), len(each.baseline.runs)) for each in means] == [(2, 2)] * 2
    assert max_differences(means) == pytest.approx(most)
    asked = comparisons_of(groups, groups[0].label)
    assert [comparison.baseline for comparison in asked] == groups[:1]
    assert max_differences(asked)[groups[4].first.folder] == pytest.approx(1.0)


def test_a_learning_rate_alone_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, Made(), Made(lr=1e-3), Made(lr=2e-3))
    comparisons = comparisons_of(groups)
    assert differences(comparisons, LOSS).notes == ["Each run is an experiment of its own."]
    shown = tables([group.first for group in groups], groups, comparisons)
    assert "max |loss difference|" not in shown[RUNS].header
    assert ROUNDING not in shown


def test_predictions_have_no_losses_to_compare(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, *(Made(plan, lr=lr) for lr in (1e-3, 2e-3) for plan in ("none", "tp")))
    for group in groups:
        group.first.summary["predicted"] = True
    shown = tables([group.first for group in groups], groups, comparisons_of(groups))
    assert "max |loss difference|" not in shown[RUNS].header
    assert ROUNDING not in shown


def test_another_dtype_or_a_mistake_is_seen_beside_the_same_science(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, Made(), Made("tp", {"tp": 2}), Made("fsdp", {"dp_shard": 2}))
    rounding = {"dtype": "bfloat16", "weights": "bfloat16", "float8": "rowwise", "loss_chunk": 7}
    groups[1].first.config["train"].update(rounding)
    groups[2].first.config["defects"]["keep_gradients"] = True
    assert [len(comparison.groups) for comparison in comparisons_of(groups)] == [3]


def test_differences_of_several_dtypes_or_of_a_mistake_are_not_pooled(tmp_path: Path) -> None:
    plans = (
        ("none", 0, Dtype.float32, False),
        ("tp", 2**-20, Dtype.float32, False),
        ("tp", 2**-10, Dtype.bfloat16, False),
        ("tp", 2**-2, Dtype.float32, True),
        ("none", 2**-11, Dtype.bfloat16, False),
    )
    made = [
        Made(plan, {"tp": 2} if plan == "tp" else {}, lr=lr, dtype=dtype, keep_gradients=keeps, loss=loss)
        for lr in (1e-3, 2e-3)
        for plan, by, dtype, keeps in plans
        for loss in [lambda step, by=by: 8 + by]
    ]
    groups = groups_of(tmp_path, *made)
    pooled = pooled_differences(comparisons_of(groups))
    key = ["plan", "train.dtype", "defects.keep_gradients", "runs", "most"]
    assert pooled[key].to_numpy().tolist() == [
        ["tp", "float32", "false", 2, 2**-20],
        ["tp", "bfloat16 against float32", "false", 2, 2**-10],
        ["tp", "float32", "true against false", 2, 2**-2],
        ["none", "bfloat16 against float32", "false", 2, 2**-11],
    ]
    shown = tables([group.first for group in groups], groups, comparisons_of(groups))[ROUNDING]
    assert shown.header[:5] == ["plan", "ranks", "train.dtype", "defects.keep_gradients", "runs"]


def test_moments_in_another_dtype_and_a_compiled_update_are_the_same_science(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, Made(), Made("tp", {"tp": 2}), Made("fsdp", {"dp_shard": 2}))
    groups[1].first.config["optimizer"]["moment_dtype"] = "bfloat16"
    groups[2].first.config["optimizer"]["compile"] = True
    assert [len(comparison.groups) for comparison in comparisons_of(groups)] == [3]


def test_a_run_that_failed_before_any_row_is_named_and_is_no_baseline(tmp_path: Path) -> None:
    early = Made(steps=0, error=ValueError("boom"))
    groups = groups_of(tmp_path, early, Made("tp", {"tp": 2}), Made("fsdp", {"dp_shard": 2}, loss=nudged))
    assert [group.label for group in groups] == ["none (failed)", "tp", "fsdp"]
    baseline = comparisons_of(groups)[0].baseline
    assert baseline is groups[1]
    assert curves(groups, LOSS).notes == ["Ended before the first row: none (failed)."]
    assert set(rows(curves(groups, LOSS), "run")) == {("tp",), ("fsdp",)}
    assert column(tables_of(groups, baseline)[RUNS], "max |loss difference|") == ["–", "baseline", "5.0e-01"]
    said = differences([Comparison(groups, groups[0])], LOSS).notes
    assert said == ["none (failed) has no rows to compare with."]
    assert comparisons_of(groups[:1])[0].baseline is groups[0]
